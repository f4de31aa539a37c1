"""A Run as the checks look at it: columns by dtype and prompt, limits by site, headroom by site."""

import math
from collections.abc import Iterator

from qwen_precision.dtypes import REFERENCE, largest
from qwen_precision.findings import Headroom, Limits
from qwen_precision.record import Event, Pass, Run


class Facts:
    """Columns of a Run by dtype and prompt, and what headroom means for each site."""

    def __init__(self, run: Run, limits: Limits) -> None:
        self.run, self.limits = run, limits
        self.by_key = {(each.dtype, each.prompt): each for each in run.passes}
        self._headroom: dict[str, list[Headroom]] = {}

    def passes(self, dtype: str) -> list[Pass]:
        """All passes of a dtype, prompt by prompt."""
        return [each for each in self.run.passes if each.dtype == dtype]

    def limit(self, dtype: str, site: int) -> float:
        """The largest finite number of the format the site computes in."""
        return largest(self.run.wider.get(dtype, {}).get(site, dtype))

    def computes_wider(self, dtype: str, site: int) -> bool:
        """Whether the site computes in another format than the dtype (norms do, in fp32)."""
        return self.run.wider.get(dtype, {}).get(site, dtype) != dtype

    def magnitude(self, each: Pass, site: int) -> float | None:
        """Largest magnitude the site would have: the reference's if it ran it, else the dtype's own.

        A cast has no counterpart in the reference, which has nothing to cast: its input's is taken.
        """
        reference = self.by_key.get((REFERENCE, each.prompt))
        if reference is None or each.dtype == REFERENCE:
            return each.abs_max[site]
        value = reference.abs_max[site]
        if value is None and site in self.run.casts:
            value = reference.abs_max[self.run.casts[site]]
        return each.abs_max[site] if value is None else value

    def judged(self, dtype: str) -> Iterator[tuple[Pass, int, float]]:
        """(pass, site, magnitude) wherever a site ran and computes in the dtype itself."""
        for each in self.passes(dtype):
            for site in range(len(self.run.sites)):
                value = self.magnitude(each, site)
                if value is not None and each.abs_max[site] is not None and not self.computes_wider(dtype, site):
                    yield each, site, value

    def headroom(self, dtype: str) -> list[Headroom]:
        """The least headroom of every site that computes in the dtype itself, smallest first."""
        if dtype not in self._headroom:
            worst: dict[int, Headroom] = {}
            for each, site, value in self.judged(dtype):
                room = math.inf if value == 0 else self.limit(dtype, site) / value if math.isfinite(value) else 0.0
                if site not in worst or room < worst[site].headroom:
                    worst[site] = Headroom(dtype, site, value, room, each.prompt)
            self._headroom[dtype] = sorted(worst.values(), key=lambda row: row.headroom)
        return self._headroom[dtype]


def token_of(run: Run, each: Pass, event: Event) -> dict[str, int | str | bool | None] | None:
    """Position, id and text of the token an event was placed at, or None where it has no place."""
    if event.position is None or event.row is None:
        return None
    row = run.prompts[each.prompt].rows[event.row]
    index = event.position - row.padding
    padding = index < 0 or index >= len(row.ids)
    return {
        "position": event.position,
        "id": None if padding else row.ids[index],
        "text": None if padding or index >= len(row.tokens) else row.tokens[index],
        "row": event.row,
        "padding": padding,
    }
