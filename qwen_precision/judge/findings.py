"""What judging gives: findings, headroom and the report that holds them. Data only."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from qwen_precision.judge.logits import Bought, bought
from qwen_precision.judge.precision import Precision, Sums, sums
from qwen_precision.record import Run
from qwen_precision.settings import Engine, Option, Rule


@dataclass(frozen=True)
class Limits:
    """From where on something is worth a finding."""

    near_overflow: float = 2.0
    """Headroom below which an operation is near overflow."""
    underflow_share: float = 0.01
    """Share of a tensor's elements that may become zero in a dtype."""
    kl: float = 0.1
    """Nats that the next token's distribution may be from fp32's, where the likeliest token differs too."""
    logprob: float = 0.25
    """Nats, root mean square, that a token's log-probability may be from fp32's, then."""
    loss: float = 0.02
    """Nats a token that a loss may be off by its softmax: 2 % of perplexity. Or half a step of the dtype at that loss,
    where that is more (in bf16 0.031 from 8 nats on): writing it down does that, and no gradient sees it."""
    loss_most: float = 0.1
    """But never more than so many: 10 % of perplexity hides what a curve of training is read for. In bf16 half a step
    is less below 32 nats, far above the loss of a uniform guess over any vocabulary (12.5 over 2^18 tokens)."""
    next_tokens: float = 0.05
    """Share of next tokens that a softmax may change. One alone is never told of: two were about equally likely."""
    mass: float = 0.01
    """Probability that a softmax may lose or make: five times what rounding one token's to bf16 can move, which is half
    a step of 2^-8 below 1."""


def limits_of(settings: dict[str, Any]) -> Limits:
    """The limits a run was made with; a record from elsewhere may hold anything, then the defaults hold."""
    default = Limits()
    near, share = settings.get("near_overflow"), settings.get("underflow_share")
    return Limits(
        near if isinstance(near, (int, float)) and near >= 1 else default.near_overflow,
        share if isinstance(share, (int, float)) and share > 0 else default.underflow_share,
    )


@dataclass(frozen=True)
class Token:
    """A token of a prompt."""

    position: int
    """In the padded row."""
    id: int | None
    """None at padding."""
    text: str | None
    row: int
    padding: bool


@dataclass(frozen=True)
class Place:
    """Where something was found; what does not apply is None."""

    layer: int | None
    module: str
    op: str
    name: str
    """The operation in Qwen3's words."""
    site: int | None = None
    """Index of the operation in the run's ``sites``, where it is one."""
    prompt: str | None = None
    """Name of the worst prompt, or None where no prompt is involved."""
    token: Token | None = None
    key: Token | None = None
    """Of attention scores: the token whose key the query at ``token`` met."""
    channel: int | None = None
    head: int | None = None
    expert: int | None = None
    row: int | None = None
    """Of the batch, in a generation."""
    step: int | None = None
    """Generated token, in a generation."""


@dataclass(frozen=True)
class Magnitude:
    """How large it is, and how much of it is not finite."""

    reference: float | None = None
    """Largest magnitude in the fp32 reference."""
    headroom: float | None = None
    """Largest number of the format over that magnitude."""
    nan: int = 0
    inf: int = 0


class Tried(NamedTuple):
    """A control run that was made to tell a cause."""

    what: str
    """Of ``record.ControlKind``."""
    detail: str
    """What was changed, in words."""
    outcome: str
    """``fails``, ``clean``, or ``fails in a later layer only``."""


class Cause(NamedTuple):
    """Why, with what shows it and what to do."""

    kind: str | None
    """Of ``meanings.CAUSES``, where it could be told."""
    sentence: str
    facts: tuple[str, ...]
    """What was measured that shows the cause, and is not the magnitude itself."""
    advice: str
    tried: tuple[Tried, ...] = ()
    """Control runs that it was told by."""
    done: str = ""
    """What was done about it already, by a guard."""

    @property
    def evidence(self) -> tuple[str, ...]:
        """Measurements, and control runs with their outcome."""
        return (*self.facts, *(f"control, {each.detail}: {each.outcome}" for each in self.tried))


@dataclass(frozen=True)
class Spread:
    """Where else the same thing happened."""

    prompts: tuple[str, ...] = ()
    """All prompts that show it."""
    propagated: int = 0
    """Later operations (or steps) that only passed it on."""


@dataclass(frozen=True)
class Finding:
    """One judged fact."""

    kind: str
    severity: str
    dtype: str
    place: Place
    magnitude: Magnitude
    cause: Cause
    spread: Spread = Spread()
    origin: bool = True
    predicted: bool = False
    """Known from the reference alone: the dtype's own stream did not get here."""


@dataclass(frozen=True)
class EngineVerdict:
    """What comes of a checkpoint in an engine, as far as its range goes."""

    engine: Engine
    verdict: str
    """ok; risk (near the limit, or beyond it and saturated: finite, and another number than fp32's); fail; incomplete
    (nothing found, and the record lacks what a rule needs)."""
    place: Place | None
    """Of a failure the first, else the one with the least headroom; None where nothing passes through fp16."""
    value: str | None
    """Of ``settings.VALUES``: as what it passes through fp16; None of what is not finite in fp32 either."""
    rule: Rule | None
    """That says so."""
    magnitude: float | None
    """Largest magnitude there in fp32."""
    headroom: float | None
    missing: tuple[str, ...]
    """What the record does not hold and a rule needs."""
    absent: tuple[str, ...] = ()
    """What rules are about and the model has none of."""
    rules: tuple[Rule, ...] = ()
    """All by which it fails, or is at risk; the one above is among them."""
    values: tuple[str, ...] = ()
    """As what it passes through fp16 there."""
    avoid: tuple[tuple[Option, ...], ...] = ()
    """Ways to avoid it, the best first: each the options to be taken together, after which none of the rules fails;
    empty where the engine has no such options."""


class Headroom(NamedTuple):
    """One site's headroom in one dtype, over all prompts; there can be a hundred thousand of them."""

    dtype: str
    site: int
    abs_max: float
    headroom: float
    prompt: int


class Across(NamedTuple):
    """What came of all prompts in a dtype."""

    dtype: str
    failing: int
    places: tuple[tuple[str, int], ...]
    """Where they fail first, and how many of them; the place of most of them first."""
    quantiles: tuple[tuple[float, float], ...]
    """Shares of the prompts, and the headroom that so many of them do not exceed."""
    worst: tuple[tuple[str, float], ...]
    """Names of the prompts with the least headroom, and what they have; those that fail first."""
    fail: tuple[str, ...] = ()
    """Names of all prompts that fail, in the order of the corpus."""


@dataclass(frozen=True)
class Corpus:
    """How a report over a folder of records came about."""

    prompts: int
    """That were seen; the run of the report holds those that are worst somewhere."""
    asked: int
    """That all plans ask for, seen or not."""
    blocks: int
    """Of the plans."""
    missing: tuple[str, ...]
    """Prompts of the plans that were not seen, in words."""
    missing_blocks: int
    """Blocks of which something was not seen."""
    do: tuple[str, ...]
    """What to do about what was not seen, a sentence each."""
    across: tuple[Across, ...]
    record: str
    """Path of the record with the prompt that fails first, else of one with a prompt that is worst in something."""
    sums: dict[str, Sums]
    """By dtype: what the precision of all of them is made of."""
    bought: dict[str, Bought]
    """By dtype: what a softmax in float32 is worth, over all of them."""
    left_out: int = 0
    """Prompts that are worst somewhere, and were too many to be opened again."""
    replaced: int = 0
    """Prompts in records of weights that it had before, which are left out."""
    sources: tuple[str, ...] = ()
    """Every name that the weights were given, as typed; the first is the report's."""
    settings: str = ""
    """A hash of the settings that change what is measured, without the version of qprec."""


@dataclass(frozen=True)
class Report:
    """A judged Run."""

    verdict: dict[str, str]
    """By dtype: ok, risk, fail, or incomplete (stopped before anything was found)."""
    findings: list[Finding]
    headroom: dict[str, list[Headroom]] = field(repr=False)  # too long to print
    """By dtype, smallest first; only sites that compute in that dtype itself."""
    stopped: str | None
    run: Run = field(repr=False)
    name: str = ""
    """Name of the file it came from, where it is shown beside others."""
    engines: tuple[EngineVerdict, ...] = ()
    """Of each engine that was asked about."""
    corpus: Corpus | None = None
    """Of a report over a folder of records; its run is then joined from those that are worst somewhere."""
    record: str = ""
    """Where the run is saved, as a word of a command line; empty where that is not known."""

    @property
    def precision(self) -> dict[str, Precision]:
        """By dtype: how far it is from the reference, over all prompts; empty without one."""
        found = self.corpus.sums if self.corpus is not None else sums(self.run)
        return {dtype: each.precision for dtype, each in found.items()}

    @cached_property
    def bought(self) -> dict[str, Bought]:
        """By dtype: what a softmax in float32 is worth, over all prompts or steps; empty where none was compared."""
        found = self.corpus.bought if self.corpus is not None else bought(self.run)
        return {dtype: each for dtype, each in found.items() if each.rows}

    def tightest(self, dtype: str) -> list[Headroom]:
        """The operation with the least headroom of each layer (and of what is outside them), smallest first."""
        found: dict[int | None, Headroom] = {}
        for row in self.headroom[dtype]:
            found.setdefault(self.run.sites[row.site].layer, row)
        return list(found.values())

    def exit_code(self, fail_on: str) -> int:
        """0 nothing at or above ``fail_on``, 1 findings, 3 the run did not finish and nothing was found."""
        bad = {"fail": {"fail"}, "risk": {"fail", "risk"}, "never": set()}[fail_on]
        if bad & set(self.verdict.values()):
            return 1
        return 3 if self.stopped or self.run.unfinished else 0


def exit_code_of(report: Report, fail_on: str) -> int:
    """Exit code of a saved run: that with which the command that made it ended."""
    # Only what was asked for is exported.
    exported = report.run.rescue is not None and report.run.rescue.exported is not None
    return rescue_exit_code(report, fail_on) if exported else report.exit_code(fail_on)


def rescue_exit_code(report: Report, fail_on: str) -> int:
    """Exit code of a run that was to be rescued: in fp16 the exported checkpoint counts, not the one probed."""
    plan = report.run.rescue
    if plan is None or plan.unsupported is not None:
        return report.exit_code(fail_on) or 1
    if plan.rescaling.changes_nothing and plan.possible:
        return report.exit_code(fail_on)
    if report.stopped or report.run.unfinished:
        return 3
    if plan.exported is None or not plan.exported.verified:
        return 1
    return replace(report, verdict={**report.verdict, "fp16": plan.exported.verdict}).exit_code(fail_on)
