"""What is known of each row of a generation while it runs, on the host; and what the record gets of it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen_precision.generate.draw import Drawn
from qwen_precision.record import Continuation, Finish, Stretch, Trip, bad_trips, rounded
from qwen_precision.settings import as_text


@dataclass
class RowState:
    """One row."""

    row: int
    ids: list[int] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)
    finish: Finish | None = None
    """None while it goes on."""
    repairs: int = 0
    stays: bool = False
    """Whether going back to the first dtype was tried and failed."""

    @property
    def step(self) -> int:
        """The next step."""
        return len(self.ids)

    @property
    def dtype(self) -> str:
        """The dtype it is computed in now."""
        return self.stretches[-1].dtype

    def since(self) -> int:
        """Tokens accepted in the present dtype since it was last changed."""
        return self.step - self.stretches[-1].start

    def moved(self, dtype: str, rescaled: bool = False) -> None:
        """From the next step on it is computed in ``dtype``, with rescaled weights or the checkpoint's own."""
        if self.stretches and self.stretches[-1].start == self.step:
            self.stretches.pop()
        last = self.stretches[-1] if self.stretches else None
        if last is None or (last.dtype, last.rescaled) != (dtype, rescaled):
            self.stretches.append(Stretch(start=self.step, dtype=dtype, rescaled=rescaled))

    def accept(self, drawn: Drawn) -> None:
        """One token more."""
        self.ids.append(drawn.token)
        self.drawn.append(drawn)


def continuation(state: RowState, given: str, trips: Sequence[Trip], tokenizer: Any) -> Continuation:
    """A row for the record.

    Args:
        state: as the run left it.
        given: the text that was tokenised.
        trips: of the whole run.
        tokenizer: to turn ids into text.
    """

    def column(value: Callable[[Drawn], float]) -> list[float | None]:
        return [rounded(value(each)) for each in state.drawn]

    def known(value: Callable[[Drawn], float]) -> list[float | None]:
        return [rounded(value(each)) if math.isfinite(value(each)) else None for each in state.drawn]

    def counts(place: int) -> list[int | None]:
        return [int(each.rounded[place]) if _is_known(each) else None for each in state.drawn]

    bad = [trip.step for trip in bad_trips(trips, state.row)]
    return Continuation(
        row=state.row,
        input=given,
        ids=state.ids,
        tokens=[as_text(token, tokenizer) for token in state.ids],
        text=tokenizer.decode(state.ids, skip_special_tokens=True),
        clean_text=tokenizer.decode(state.ids[: min(bad)]).rstrip("\ufffd") if bad else None,
        stretches=state.stretches,
        top1=column(lambda each: each.top1),
        margin=column(lambda each: each.margin),
        entropy=column(lambda each: each.entropy),
        logprob=known(lambda each: each.logprob),
        logprob_error=known(lambda each: each.rounded[0]),
        mass_lost=known(lambda each: each.rounded[1]),
        ranks=counts(2),
        changed=counts(3),
        finish=state.finish or "interrupted",
    )


def _is_known(drawn: Drawn) -> bool:
    """Whether a step's softmax was looked at in its dtype, and was finite."""
    return math.isfinite(drawn.rounded[1])
