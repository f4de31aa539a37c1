"""The one writer of trips: what a guard saw or did, at which step of which row, before and after."""

from qwen_precision.generate.rows import RowState
from qwen_precision.record import Kind, Poison, Trip

LOOKS_ONLY = "watch"
"""The guard that never changes anything."""


class Trips(list[Trip]):
    """The record's list of trips, in the order in which guards fired.

    Args:
        act: whether guards may change something, or only report.
    """

    def __init__(self, act: bool) -> None:
        super().__init__()
        self.act = act

    def write(
        self,
        state: RowState,
        guard: str,
        kind: Kind,
        why: str,
        before: dict[str, float],
        after: dict[str, float] | None = None,
        *,
        poisoned: Poison | None = None,
        dtype: str | None = None,
        step: int | None = None,
        acted: bool | None = None,
    ) -> None:
        """Add a trip.

        Args:
            state: the row.
            guard: its name.
            kind: what it is about.
            why: in words.
            before: numbers of what was found.
            after: numbers of what was made of it.
            poisoned: where the row's cache is not finite.
            dtype: the row was computed in; None for the one it is in now.
            step: None for the next one.
            acted: whether something was changed; None for what the guard is there for.
        """
        self.append(
            Trip(
                step=state.step if step is None else step,
                row=state.row,
                guard=guard,
                kind=kind,
                dtype=dtype or state.dtype,
                why=why,
                acted=self.act and guard != LOOKS_ONLY if acted is None else acted,
                before=before,
                after=after or {},
                poisoned=poisoned,
            )
        )
