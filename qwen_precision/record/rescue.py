"""What the record keeps of a rescue: the factors, what they cost, what they cannot reach, and what was exported."""

from typing import Annotated

from pydantic import Field

from qwen_precision.record.parts import Count, Many, Number, Part

MOST_POWER = 120
"""Of an exponent of two; float32 has not many more."""

Power = Annotated[int, Field(ge=-MOST_POWER, le=MOST_POWER)]
"""An exponent of two."""


class LayerPowers(Part):
    """Powers taken out of one layer: what is named comes out 2^-n as large as it was."""

    layer: Annotated[int, Field(ge=0)]
    input_norm: Power
    """Output of input_layernorm; q, k and v_proj make up for it."""
    query: Power
    """Output of q_proj where q and k have no norm of their own; k_proj makes up for it."""
    value: Power
    """Output of v_proj and so of attention; o_proj makes up for it."""
    post_norm: Power
    """Output of post_attention_layernorm; gate, up_proj and the router make up for it."""
    product: Annotated[Many[Power], Field(min_length=1)]
    """Output of up_proj and so the SwiGLU product; down_proj makes up for it. One number, or one an expert."""


class Rescaling(Part):
    """All powers of one checkpoint."""

    stream: Power
    """The residual stream comes out 2^-stream as large, and so do q_proj and k_proj where a norm reads them."""
    qk_norm: bool
    """Whether q and k have norms of their own, which have the same eps as those that read the stream."""
    final_norm: Power
    """The final norm's weight is multiplied by 2^final_norm, lm_head by its inverse."""
    untied: bool
    """Whether lm_head, tied to the embedding before, becomes a tensor of its own."""
    eps: Number
    """``rms_norm_eps`` as config.json has it now; it is multiplied by 2^(-2 stream)."""
    layers: Many[LayerPowers]
    """Those in which a power is not 0."""

    @property
    def new_eps(self) -> float:
        """``rms_norm_eps`` of the rescaled checkpoint."""
        return float(self.eps) * 2.0 ** (-2 * self.stream)

    @property
    def changes_nothing(self) -> bool:
        """Whether every power is 0."""
        return not (self.stream or self.final_norm or self.untied or self.layers)


class Loss(Part):
    """Weights of one kind (``q_proj``, say, of all layers) that fp16 does not hold exactly, before and after."""

    kind: str
    tensors: Count
    """That take a factor other than 1."""
    elements: Count
    inexact_before: Count
    """Cast as they are. Of fp32 and fp64 weights only those that fp16 holds with fewer bits than its usual 11."""
    inexact: Count
    """Cast after the factor, where some fall below fp16's normal range and lose bits."""
    to_zero: Count
    badly: Count
    """Those of the inexact that change by more than 1 %."""
    error: Number
    """Root mean square of the changes over that of the weights."""


class Stuck(Part):
    """What no exact factor can move, and is too close to fp16's largest number, or beyond it."""

    layer: int | None
    module: str
    name: str
    """The operation or tensor in Qwen3's words."""
    headroom: Number | None
    fails: bool
    """Whether it is not finite in fp16; else it only has less headroom than was asked for."""
    why: str


class Exported(Part):
    """What was written and how it was proven."""

    folder: str
    """Its name, without where it lies."""
    dtype: str
    bytes: Count
    identical: bool
    """Whether the rescaled model's fp32 outputs equal the original's bit for bit."""
    compared: Count
    """Tokens at which they were compared."""
    verdict: str
    """Of the written folder in fp16."""
    headroom: Number | None
    """The least of all its operations in fp16."""
    where: str
    """That operation."""
    logit_error: dict[str, Number | None]
    """Relative root mean square error of the last logits against fp32: of the dtypes before, and of fp16 ``after``."""
    verified: bool
    why: str | None
    """What failed, where something did."""
    kept: bool
    """Whether the folder is there."""


class Rescue(Part):
    """The plan for fp16, made from the reference's magnitudes and the weights."""

    margin: Number
    """Headroom that every operation shall have."""
    unsupported: str | None
    """Why there is no plan for this model; then nothing follows but ``fp32_modules``."""
    rescaling: Rescaling
    losses: Many[Loss]
    stuck: Many[Stuck]
    fp32_modules: Many[str]
    """The smallest set of modules that would have to compute in fp32 instead, for what fails and is stuck."""
    gate_channels: Count
    """Channels of the experts' fused gate and up projection that belong to the gate, which no power moves."""
    exported: Exported | None

    @property
    def possible(self) -> bool:
        """Whether the plan brings everything inside fp16."""
        return self.unsupported is None and not any(each.fails for each in self.stuck)
