"""What a planned rescue does to every operation's headroom: derived from the run, like every judgement. No torch."""

from typing import NamedTuple

from qwen_precision.judge.columns import Facts
from qwen_precision.judge.findings import Limits
from qwen_precision.judge.needs import DTYPE, mover
from qwen_precision.qwen3.names import name_of
from qwen_precision.qwen3.rescaling import Scale
from qwen_precision.record.run import Run


class Moved(NamedTuple):
    """One operation, the worst of all layers, in fp16."""

    name: str
    layer: int | None
    """Where it has the least headroom before."""
    before: float
    after: float
    """The least of all layers, after."""


def moved(run: Run) -> list[Moved]:
    """Headroom of each operation before and after the planned rescue, the tightest first; nothing without a plan."""
    if run.rescue is None:
        return []
    scale, facts = Scale(run.rescue.rescaling), Facts(run, Limits())
    found: dict[str, Moved] = {}
    for row in facts.headroom(DTYPE):  # smallest first
        site, power = mover(facts, row, run.rescue.gate_channels)
        exponent = scale.output(site.module, site.op, site.call, site.layer in facts.sparse) if power else 0
        after = row.headroom * 2.0**-exponent
        own = run.sites[row.site]
        name = name_of(own.module, own.op, own.call)
        first = found.setdefault(name, Moved(name, own.layer, row.headroom, after))
        if after < first.after:
            found[name] = first._replace(after=after)
    return sorted(found.values(), key=lambda each: each.before)
