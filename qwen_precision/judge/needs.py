"""What a rescue has to do, from a probe alone: the bits that each power must take away, and what none can. No torch."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from qwen_precision.dtypes import RESCUED
from qwen_precision.judge.columns import Columns
from qwen_precision.judge.findings import Headroom, Limits
from qwen_precision.qwen3 import GATE_AND_UP, HEAD, Scale, expert_of, layer_of, name_of, powers_of, row_of
from qwen_precision.record import Run, Site, Stuck

FAR = 120
"""More bits than any format has: stands for no need at all, and for room without end."""

LOGITS = "logits"
ANSWER = "without an lm_head the final hidden states are the model's answer; a factor would change it"
"""Why the final norm of a bare model takes no factor."""


Key = tuple[str, int | None, int | None]
"""A power, a layer, an expert."""


@dataclass
class Needs:
    """What every power is asked for, and what none can move."""

    bits: dict[Key, int] = field(default_factory=dict)
    """How many bits of headroom are missing to the margin; below 0, to spare."""
    short: dict[Key, list[Stuck]] = field(default_factory=dict)
    """Who asks for them: stuck if the power has to be left at 0."""
    stuck: list[Stuck] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    """Modules that would have to compute in fp32, for what is stuck and fails."""

    def ask(self, power: str, who: Stuck, bits: int) -> None:
        """The most that was asked for counts."""
        layer = None if power in ("stream", "final_norm") else who.layer
        key = (power, layer, expert_of(who.module) if power == "product" else None)
        self.bits[key] = max(self.bits.get(key, -FAR), bits)
        if bits > 0:
            self.short.setdefault(key, []).append(who)

    def stick(self, who: Stuck) -> None:
        """Nothing moves it."""
        self.stuck.append(who)
        if who.fails and who.headroom != 0:
            self.held.append(_unit(who.module))

    @property
    def modules(self) -> list[str]:
        """Those that hold all others."""
        return _least(self.held)

    def of(self, power: str, layer: int | None = None, expert: int | None = None) -> int:
        """What is asked for: of one expert its own need, or that of all of them together."""
        return max(self.bits.get((power, layer, each), -FAR) for each in {expert, None})


def needs(columns: Columns, margin: float, gate_channels: int) -> Needs:
    """Everything that has less headroom in fp16 than the margin, sorted into what a power can move and what none can.

    Args:
        columns: of a whole probe with fp16 and the reference in it.
        margin: headroom that everything shall have.
        gate_channels: channels of the experts' fused gate and up projection that belong to the gate.
    """
    found = Needs()
    _weights(columns, found)
    failing, harmless = _failing(columns)
    for row in columns.headroom(RESCUED):
        site, power = mover(columns, row, gate_channels)
        dead = row.headroom == 0
        fails = dead or ((row.headroom < 1 or row.site in failing) and row.site not in harmless)
        who = _stuck(site, row, fails)
        if power is None or dead:
            if row.headroom < margin or fails:
                found.stick(who)
            continue
        # Not finite although the reference is in range: the sum left it half-way; then nothing counts as spare.
        room = min(row.headroom, 1.0) if row.site in failing else row.headroom
        bits = math.ceil(math.log2(margin / room)) if math.isfinite(room) else -FAR
        found.ask(power, who, bits)
    return found


def beyond(columns: Columns) -> list[str]:
    """The modules that would have to compute in fp32 where nothing is rescaled: all in which fp16 leaves the range."""
    failing, harmless = _failing(columns)
    rows = [row for row in columns.headroom(RESCUED) if row.headroom < 1 or row.site in failing]
    sites = [columns.run.sites[row.site] for row in rows if row.headroom and row.site not in harmless]
    heavy = [weight.parameter.rpartition(".")[0] for weight in columns.run.weights if weight.overflow.get(RESCUED)]
    return _least([*(_unit(site.module) for site in sites), *heavy])


def _failing(columns: Columns) -> tuple[set[int], set[int]]:
    """Sites at which the fp16 pass itself left the range first, and those at which that never did any harm."""
    origins = [event for each in columns.passes(RESCUED) for event in columns.origins(each)]
    failing = {event.site for event in origins if not event.harmless}
    return failing, {event.site for event in origins} - failing


def mover(columns: Columns, row: Headroom, gate_channels: int) -> tuple[Site, str | None]:
    """The operation (for a cast, the one whose output it casts), and the power that moves it, or None."""
    source = columns.run.casts.get(row.site)
    site = columns.run.sites[row.site if source is None else source]
    power: str | None = row_of(site.module, site.op, site.call, site.layer in columns.sparse).mover(columns.qk_norm)
    shared = name_of(site.module, site.op, site.call) == GATE_AND_UP
    if power is not None and shared and not _in_up(columns, row, gate_channels):
        power = None
    if power == "final_norm" and answer_of(columns.run) != LOGITS:
        power = None
    return site, power


def answer_of(run: Run) -> str:
    """What the model answers with: logits, or the final hidden states of a bare model, of which no lm_head was run."""
    return LOGITS if any(site.module == HEAD.removesuffix(".weight") for site in run.sites) else "final hidden states"


def _in_up(columns: Columns, row: Headroom, gate_channels: int) -> bool:
    """Whether the extreme of the fused projection was seen to lie in the half that is not the gate."""
    events = (event for each in columns.run.passes if each.prompt == row.prompt for event in each.events)
    channels = [event.channel for event in events if event.site == row.site and event.channel is not None]
    return bool(channels) and min(channels) >= gate_channels


def _stuck(site: Site, row: Headroom, fails: bool) -> Stuck:
    known = row_of(site.module, site.op, site.call)
    why = ANSWER if known.power == "final_norm" else known.stuck
    if row.headroom == 0:
        why = "it is not finite in fp32 either"
    name = name_of(site.module, site.op, site.call)
    return Stuck(layer=site.layer, module=site.module, name=name, headroom=row.headroom, fails=fails, why=why)


_WITHIN = ("gate_proj", "act_fn", "q_proj", "k_proj", "q_norm", "k_norm")
"""Modules whose output another of the same parent reads."""


def _unit(module: str) -> str:
    """The module whose inputs and outputs are in range, so that it alone can be kept in fp32."""
    parent, _, leaf = module.rpartition(".")
    return parent if leaf in _WITHIN else module


def _weights(columns: Columns, found: Needs) -> None:
    """Weights that no factor reaches, or that are damaged."""
    for weight in columns.run.weights:
        damaged = weight.nan or weight.inf
        fixed = weight.overflow.get(RESCUED) and not powers_of(weight.name, columns.qk_norm)
        if not damaged and not fixed:
            continue
        module, _, leaf = weight.parameter.rpartition(".")
        largest = float(weight.abs_max)
        why = "the checkpoint is damaged: it holds NaN or infinity" if damaged else f"fp16 cannot hold {largest:.6g}"
        found.stuck.append(
            Stuck(
                layer=layer_of(module),
                module=module,
                name=f"{module.rpartition('.')[2] or module} {leaf}",
                headroom=None,
                fails=True,
                why=why if damaged else f"{why}, and no exact factor moves it",
            )
        )
        if not damaged:
            found.held.append(module)


def _least(modules: list[str]) -> list[str]:
    """Each once, without those inside another."""
    return sorted({each for each in modules if not any(each.startswith(f"{other}.") for other in modules)}, key=_order)


def _order(module: str) -> tuple[int, str]:
    layer = layer_of(module)
    return (FAR * FAR if layer is None else layer), module


class HeadroomGain(NamedTuple):
    """One operation, the worst of all layers, in fp16."""

    name: str
    layer: int | None
    """Where it has the least headroom before."""
    before: float
    after: float
    """The least of all layers, after."""


def headroom_gains(run: Run) -> list[HeadroomGain]:
    """Headroom of each operation before and after the planned rescue, the tightest first; nothing without a plan."""
    if run.rescue is None:
        return []
    scale, columns = Scale(run.rescue.rescaling), Columns(run, Limits())
    found: dict[str, HeadroomGain] = {}
    for row in columns.headroom(RESCUED):  # smallest first
        site, power = mover(columns, row, run.rescue.gate_channels)
        exponent = scale.output(site.module, site.op, site.call, site.layer in columns.sparse) if power else 0
        after = row.headroom * 2.0**-exponent
        own = run.sites[row.site]
        name = name_of(own.module, own.op, own.call)
        first = found.setdefault(name, HeadroomGain(name, own.layer, row.headroom, after))
        if after < first.after:
            found[name] = first._replace(after=after)
    return sorted(found.values(), key=lambda each: each.before)
