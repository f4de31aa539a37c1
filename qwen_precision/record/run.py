"""The Run: everything a probe or a generation measured, as one frozen record that can be saved and loaded again.

Columns only. What they mean (findings, verdict, exit code) is derived in ``checks.py``, so that a new limit
works on last month's file with no GPU. The tensors are gone: a reading is one number per operation.

Layout: ``sites`` lists every operation once; each ``Pass`` (one dtype on one prompt) holds a column of
magnitudes in the same order, null where that operation did not run. A generation has none of these; what it
has is in ``generation``.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field

from qwen_precision.record.closeup import Closeup, Massive
from qwen_precision.record.explanation import Explanation, Sweep
from qwen_precision.record.generation import Generation
from qwen_precision.record.logits import LogitsCost, Upcast
from qwen_precision.record.parts import Column, Count, Many, Number, Part, Site
from qwen_precision.record.rescue import Rescue

Schema = Literal[4]
"""The schema this version writes; older ones are upgraded on loading, newer ones are refused."""

SCHEMA: Schema = get_args(Schema)[0]
"""Its number."""


class Choice(Part):
    """An automatic or asked-for choice and why it was made."""

    what: str
    value: str
    reason: str


class WeightFile(Part):
    """A file that holds weights of the checkpoint."""

    name: str
    bytes: Count
    sha256: str | None
    """What the hub's cache names it by, else that of what was read; null where that would have taken long."""


class Model(Part):
    """Which checkpoint was probed."""

    source: str
    """What the user typed: a hub id, a folder, or ``demo``."""
    revision: str | None
    """The commit on the hub, where it came from there."""
    architecture: str
    layers: int
    hidden_size: int
    vocabulary: int
    parameters: Annotated[int, Field(ge=0, le=2**53)]
    weight_bytes: Annotated[int, Field(ge=0, le=2**53)]
    source_dtype: str
    """The dtype of most weights in the files, as safetensors spells it (BF16, F16, F32), or what they are quantised to
    (FP8, INT8, INT4, NVFP4, MXFP4)."""
    tied_embeddings: bool
    files: Many[WeightFile]
    """By name: which bytes were measured. Empty in records that were made before it was kept."""


class Row(Part):
    """One sequence of a prompt."""

    text: str
    ids: Many[int]
    """Token ids without padding."""
    tokens: Many[str]
    """Each id as text, for naming a token in a finding."""
    padding: int
    """How many pad positions stand before the ids."""


class FailedStep(Part):
    """What a generation's record says of the step that a prompt is what it was given: its logits were not finite."""

    dtype: str
    """In which it was computed."""
    step: Count
    """So many of each row's last ids were generated, one by one; those before them were prefilled."""
    rows: Many[Count]
    """Rows whose logits failed."""
    chunk: Count
    """So many tokens of the prompt went through the model at once; 0 for all."""

    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether rows of so many ids can be what the step was given."""
        return all(self.step < length for length in lengths) and all(row < len(lengths) for row in self.rows)


class Prompt(Part):
    """A batch of one or more rows that goes through the model together, padded on the left."""

    name: str
    rows: Many[Row]
    failed: FailedStep | None
    """Of a prompt that a failing step of a generation was given; null for all others."""


class Event(Part):
    """An operation looked at closely because it was not finite or came near a limit."""

    site: int
    """Index into ``sites``."""
    step: int
    """Orders the events of a pass as they ran; sites are in the order in which any pass first met them."""
    nan: int
    inf: int
    elements: int
    value: Number
    """The largest magnitude (inf or nan where there is one)."""
    clean_inputs: bool
    """Whether it began here: all that went in for this element was finite. In the reference, whose own numbers are
    finite, an event tells where it leaves the narrowest dtype's range, and this whether all that went in was inside."""
    clean_weights: bool
    """Whether all weights that went in were finite in this dtype."""
    row: int | None
    position: int | None
    """Token position in the padded row of the extreme element (of the first non-finite one)."""
    channel: int | None
    head: int | None
    expert: int | None
    in_padding: bool
    """Whether only pad positions are affected."""
    harmless: bool | None
    """Of an origin that gave -inf alone: whether its part of the model gives the same bits with the largest finite
    number in its place, so that whatever stands there comes to nothing; null where that was not tried."""
    closeup: Closeup | None
    """Of an origin; null where it only passed something on, or was finite."""


class Reseed(Part):
    """A stream that had gone non-finite and was replaced by the reference before a layer."""

    layer: int
    """The layer that read the replaced stream."""
    rows: Many[int]
    clamped: bool
    """Whether the reference itself had to be clamped to the dtype's range."""


class Pass(Part):
    """One dtype on one prompt."""

    dtype: str
    prompt: int
    """Index into ``prompts``."""
    abs_max: Column
    """Largest magnitude by site; null where the site did not run (or was not reached)."""
    events: Many[Event]
    reseeded: Many[Reseed]
    top1: Many[int | None]
    """The likeliest next token of each row, null where its logits were not finite or not computed."""
    layer_error: Many[Number | None]
    """After each layer, the norm of the difference from the reference's hidden states over the norm of those, real
    tokens only; null from where the stream was not this dtype's own any more, and in the reference itself."""
    massive: Many[Massive]
    """Of the reference: massive activations, after each layer that has one."""
    local_error: Many[Number | None]
    """As ``layer_error``, but with the reference's hidden states going into each layer; empty unless asked for."""
    logprob_error: Many[Number | None]
    """Of each row, the root mean square over its tokens of the difference of their log-probability (nats) from the
    reference's, each token given those before it."""
    kl: Many[Number | None]
    """Of each row, the Kullback-Leibler divergence (nats) of the next token's distribution from the reference's."""
    upcast: Many[Upcast | None]
    """Of each row, what its softmax is worth in float32; null where the stream was not the dtype's own, empty in
    float32 itself, without logits, and in older records."""

    @property
    def failed(self) -> bool:
        """Whether something was not finite, and made a difference."""
        bad = [each for each in self.events if each.nan or each.inf]
        began = any(not each.clean_weights or (each.clean_inputs and not each.harmless) for each in bad)
        # What nothing watched began shows where it ends: in a stream that was replaced, or in the answer.
        last = self.last
        return began or bool(self.reseeded) or any(each.nan and each.site == last for each in bad)

    @property
    def last(self) -> int | None:
        """The last site that ran."""
        return next((site for site in reversed(range(len(self.abs_max))) if self.abs_max[site] is not None), None)


class Weight(Part):
    """A tensor of the checkpoint that is damaged, or that some dtype does not hold exactly."""

    name: str
    """In the files."""
    parameter: str
    """The model's parameter it is, or is a part of."""
    file: str
    elements: int
    nan: int
    inf: int
    abs_max: Number
    """Largest finite magnitude."""
    overflow: dict[str, int]
    """Elements beyond the largest finite number, by dtype."""
    underflow: dict[str, int]
    """Non-zero elements that become zero, by dtype."""
    inexact: dict[str, int]
    """Elements whose value changes in any way, by dtype."""


class ScaleFault(Part):
    """Scales of a quantised weight that cannot be right, or with which its numbers leave a dtype's range."""

    name: str
    """The tensor of scales, in the files."""
    parameter: str
    """The model's parameter they are for, or for a part of."""
    file: str
    kind: Literal["nan", "infinite", "unwritten", "zero", "overflow"]
    """Unwritten: the lowest finite number of a format, which is what a loader fills scales with before it reads them.
    Overflow: the scale is a number, and times it a weight is larger than ``dtype`` can hold."""
    dtype: str | None
    """Of an overflow; what else is wrong is wrong in every dtype."""
    count: Count
    """How many scales (blocks of weights) it is."""
    scales: Count
    """How many there are."""
    expert: Count | None = None
    """Of the first: which, where one tensor holds the scales of all experts."""
    row: Count
    """Of the first: the block's place, counted in blocks down the weight's outputs …"""
    column: Count
    """… and across its inputs."""
    height: Count
    """Rows of weights that one scale is for …"""
    width: Count
    """… and columns."""
    value: Number
    """The first one's scale."""


class WeightTotals(Part):
    """What casting the checkpoint to one dtype costs, over all tensors."""

    dtype: str
    elements: int
    overflow: int
    underflow: int
    inexact: int
    """Elements whose value changes in any way."""


class Run(Part):
    """One run of ``qprec probe`` or ``qprec generate``."""

    schema_: Schema = Field(default=SCHEMA, alias="schema")
    tool: str
    verb: Literal["probe", "generate"]
    created: str
    """UTC, ISO 8601."""
    stopped: str | None
    """Why the run ended early, or null when it is whole."""
    unfinished: str | None
    """What was asked for beside the run (a sweep, a rescue) and could not be finished, and why."""
    model: Model
    environment: dict[str, str]
    settings: dict[str, Any]
    choices: Many[Choice]
    prompts: Many[Prompt]
    redacted: bool
    """Whether texts were taken out: each is its length and digest, token strings are empty, token ids are made up."""
    dtypes: Many[str]
    """The dtypes asked for, in the order asked."""
    reference: bool
    """Whether the fp32 pass ran."""
    sites: Many[Site]
    wider: dict[str, dict[int, str]]
    """By dtype: sites whose output is in another format than the dtype (norms compute in fp32)."""
    casts: dict[int, int]
    """By site of a cast: the site of what ran just before, whose output it casts."""
    not_run: Many[str]
    """Modules with weights of their own in which no pass ran any operation."""
    passes: Many[Pass]
    weights: Many[Weight]
    """Tensors that are damaged or inexact in some dtype; every other is exact in all of them."""
    weight_totals: Many[WeightTotals]
    scale_faults: Many[ScaleFault]
    """Of quantised weights; empty where all scales are sound, and where nothing is quantised."""
    seconds: dict[str, float]
    """Wall time by part: reading, arithmetic of each dtype, everything."""
    logits: LogitsCost | None
    """What the logits of a probe took; null without any, and in a generation, which has its own."""
    generation: Generation | None
    """What was generated; null in a probe."""
    rescue: Rescue | None
    """The plan that would make the checkpoint safe in fp16; null where none was made."""
    explanation: Explanation | None
    """Control runs; null where none were made."""
    sweep: Sweep | None
    """A search for triggers; null where none was asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True, populate_by_name=True)
