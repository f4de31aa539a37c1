"""What an operation is in Qwen3: its name for a person, its role, the power that moves it, why none can. One row each.

An operation is told by the module whose forward ran it, its own name, and its call number (from 0, within one forward
of the module). What has no row keeps its path and its own name, so an unknown architecture needs none.
"""

import re
from functools import lru_cache
from typing import Literal, NamedTuple

Role = Literal["embedding", "residual", "scores", "router", "product", "logits"]
"""What the judgement asks about: the residual stream and what it starts from; the scores of eager attention (q times k,
then scaled, then masked) and the logits of a router, which a softmax reads; a sum of products, where partial sums may
leave the range; and the model's answer."""

Power = Literal["stream", "query", "key", "value", "product", "input_norm", "post_norm", "final_norm"]
"""Which power of a ``Rescaling`` an operation's output goes with; ``key`` is minus ``query``."""


class Row(NamedTuple):
    """One operation."""

    module: str
    """Pattern of the module's path."""
    op: str
    """The operation's own name; ``*`` for every other of the module."""
    call: int | None = None
    """None for any."""
    name: str | None = None
    """None: after its module, or its own."""
    role: Role | None = None
    power: Power | None = None
    """None: no exact factor moves it."""
    stuck: str = "nothing exact can move it"
    """Why, where no power does."""
    sparse: bool | None = None
    """Only in layers with experts, only in those without, or in both."""
    every: int | None = None
    """A Python loop, over experts say, repeats the calls after so many: ``call`` is the number within one round."""
    unnormed: Power | None = None
    """The power instead, where q and k have no norms of their own and meet each other as they are."""
    reads: tuple[str, ...] = ()
    """Of a product: the names of the operations of its layer whose outputs it multiplies, with ``|`` between them where
    only the first that the layer has is meant. Attention weights are left out: they are at most 1."""

    def mover(self, qk_norm: bool) -> Power | None:
        """The power that moves it, in a model whose q and k have norms of their own, or in one where they have none."""
        return self.power if qk_norm or self.unnormed is None else self.unnormed


GATE_AND_UP = "gate and up projection of the experts"
"""Name of the product whose first half of the channels is the gate, which no power moves."""

_LAYER, _ATTENTION, _EXPERTS = r"layers\.\d+$", r"self_attn$", r"mlp\.experts$"
_SCORES = "the attention softmax depends on how large the scores are"
_QK = "the attention softmax depends on how large q and k are"
_SILU = "SiLU is not linear: a smaller gate would be another function"
_ROUTER = "the router's softmax depends on how large its input is"
_LOGIT = "a logit is the model's answer; a factor would change it"

_FROM_ATTENTION_NORM = ("input_layernorm output",)
_FROM_MLP_NORM = ("pre_feedforward_layernorm output|post_attention_layernorm output",)
_FROM_GATE = ("SwiGLU product",)
_FROM_EXPERT_GATE = ("SwiGLU product of the experts|SwiGLU product of an expert",)
_QUERIES, _KEYS, _VALUES = "rotary embedding of q", "rotary embedding of k", "v_proj output"
CACHED = (_KEYS, _VALUES)
"""Names of what a KV cache holds."""

ROWS: tuple[Row, ...] = (
    # the first row that fits wins
    Row(r"embed_tokens$", "embedding", name="token embedding", role="embedding", power="stream"),
    Row(_LAYER, "add", 0, "residual add after attention", "residual", "stream"),
    Row(_LAYER, "add", 1, "residual add after mlp", "residual", "stream"),
    Row(_LAYER, "add", None, None, "residual", "stream"),
    Row(r"q_proj$", "linear", role="product", power="stream", unnormed="query", reads=_FROM_ATTENTION_NORM),
    Row(r"k_proj$", "linear", role="product", power="stream", unnormed="key", reads=_FROM_ATTENTION_NORM),
    Row(r"o_proj$", "linear", role="product", power="stream", reads=("attention output",)),
    Row(r"experts\.\d+\.down_proj$", "linear", role="product", power="stream", reads=_FROM_EXPERT_GATE),
    Row(r"down_proj$", "linear", role="product", power="stream", reads=_FROM_GATE),
    Row(r"v_proj$", "linear", role="product", power="value", reads=_FROM_ATTENTION_NORM),
    Row(r"up_proj$", "linear", role="product", power="product", reads=_FROM_MLP_NORM),
    Row(r"gate_proj$", "linear", role="product", stuck=_SILU, reads=_FROM_MLP_NORM),
    Row(_ATTENTION, "mul", 0, "rotary embedding: q times cos", stuck=_SCORES, unnormed="query"),
    Row(_ATTENTION, "mul", 1, "rotary embedding: rotated q times sin", stuck=_SCORES, unnormed="query"),
    Row(_ATTENTION, "add", 0, "rotary embedding of q", stuck=_SCORES, unnormed="query"),
    Row(_ATTENTION, "mul", 2, "rotary embedding: k times cos", stuck=_SCORES, unnormed="key"),
    Row(_ATTENTION, "mul", 3, "rotary embedding: rotated k times sin", stuck=_SCORES, unnormed="key"),
    Row(_ATTENTION, "add", 1, "rotary embedding of k", stuck=_SCORES, unnormed="key"),
    Row(_ATTENTION, "matmul", 0, "attention scores", "scores", stuck=_SCORES, reads=(_QUERIES, _KEYS)),
    Row(_ATTENTION, "mul", 4, "scaled attention scores", "scores", stuck=_SCORES),
    Row(_ATTENTION, "add", 2, "masked attention scores", "scores", stuck=_SCORES),
    Row(_ATTENTION, "softmax", None, "attention softmax", stuck=_SCORES),
    Row(_ATTENTION, "cast", 0, "attention weights", stuck=_SCORES),
    Row(_ATTENTION, "matmul", 1, "attention output", "product", "value", reads=(_VALUES,)),
    Row(_ATTENTION, "scaled_dot_product_attention", None, "attention output", power="value", reads=(_QUERIES, *CACHED)),
    Row(r"mlp$", "mul", 0, "SwiGLU product", power="product", sparse=False),
    # where experts are modules of their own, the block around them weighs and adds what they give
    Row(r"mlp$", "mul", None, "expert output times routing weight", power="stream", sparse=True),
    Row(r"mlp$", "index_add_", power="stream", sparse=True),
    Row(r"act_fn$", "silu", None, "SiLU of the gate", stuck=_SILU),
    Row(r"mlp\.gate$", "linear", None, "router logits", "router", stuck=_ROUTER, reads=_FROM_MLP_NORM),
    Row(r"mlp\.gate$", "softmax", None, "router softmax", stuck=_ROUTER),
    Row(r"mlp\.experts\.\d+$", "mul", 0, "SwiGLU product of an expert", power="product"),
    Row(_EXPERTS, "grouped_mm", 0, GATE_AND_UP, "product", "product", _SILU, reads=_FROM_MLP_NORM),
    Row(_EXPERTS, "grouped_mm", 1, "down projection of the experts", "product", "stream", reads=_FROM_EXPERT_GATE),
    # where one module runs them in a loop, each in its slice of the weights, an expert has two calls of each
    Row(_EXPERTS, "linear", 0, GATE_AND_UP, "product", "product", _SILU, every=2, reads=_FROM_MLP_NORM),
    Row(_EXPERTS, "linear", 1, "down projection of the experts", "product", "stream", every=2, reads=_FROM_EXPERT_GATE),
    Row(_EXPERTS, "mul", 0, "SwiGLU product of the experts", power="product", every=2),
    Row(_EXPERTS, "mul", 1, "expert output times routing weight", power="stream", every=2),
    Row(_EXPERTS, "sum", None, "sum over the experts", "product", "stream"),
    Row(_EXPERTS, "index_add_", None, "sum over the experts", "product", "stream"),
    Row(r"input_layernorm$", "mul", 1, "output", power="input_norm"),
    Row(r"post_attention_layernorm$", "mul", 1, "output", power="post_norm"),
    Row(r"^(.*\.)?norm$", "mul", 1, "output", power="final_norm"),
    Row(r"[qk]_norm$", "mul", 1, "output", stuck=_QK),
    Row(r"norm$", "pow", None, "square"),
    Row(r"norm$", "mean", None, "mean square"),
    Row(r"norm$", "add", 0, "mean square plus eps"),
    Row(r"norm$", "rsqrt", None, "reciprocal root"),
    Row(r"norm$", "mul", 0, "normalised values"),
    Row(r"norm$", "mul", 1, "output"),
    Row(r"lm_head$", "linear", None, "logits", "logits", stuck=_LOGIT, reads=("norm output",)),
    # serving engines fuse: projections into one, the residual add into the norm behind it
    Row(r"qkv_proj$", "linear", None, "q, k and v projection", "product"),
    Row(r"gate_up_proj$", "linear", None, "gate and up projection", "product", stuck=_SILU),
    Row(r"act_fn$", "mul", None, "SwiGLU product", power="product"),
    Row(r"act_fn$", "silu_and_mul", None, "SwiGLU product", power="product"),
    Row(r"rotary_emb$", "rotary_embedding", 0, "rotary embedding of q", stuck=_SCORES, unnormed="query"),
    Row(r"rotary_emb$", "rotary_embedding", 1, "rotary embedding of k", stuck=_SCORES, unnormed="key"),
    Row(r"attn$", "unified_attention_with_output", None, "attention output", power="value"),
    Row(r"norm$", "residual_add", None, "residual add", "residual", "stream"),
    Row(r"norm$", "residual_cast", None, "residual stream", "residual", "stream"),
    Row(r"norm$", "fused_add_rms_norm", 1, "residual add", "residual", "stream"),
    Row(r"norm$", "fused_add_rms_norm", 0, "output"),
    Row(r"norm$", "rms_norm", None, "output"),
    Row(r"logits_processor$", "linear", None, "logits", "logits", stuck=_LOGIT),
    # whatever else such a module does
    Row(r"embed_tokens$", "*", role="embedding"),
    Row(r"lm_head$", "*", role="logits", stuck=_LOGIT),
    Row(r"mlp\.gate$", "*", stuck=_ROUTER),
    Row(r"experts$", "linear", role="product", stuck=_SILU),
    Row(r"(gate_proj|act_fn|experts)$", "*", stuck=_SILU),
    Row(r"[qk]_norm$", "*", stuck=_QK),
    Row(_ATTENTION, "*", stuck=_SCORES),
    Row(r"", "linear", role="product"),
    Row(r"", "matmul", role="product"),
    Row(r"", "grouped_mm", role="product"),
    Row(r"", "sum", role="product"),
)

_COMPILED = tuple((re.compile(row.module), row) for row in ROWS)
_NOTHING_KNOWN = Row("", "*")
_SELF_NAMED = ("norm", "layernorm")


@lru_cache(maxsize=1 << 16)
def row_of(module: str, op: str, call: int, sparse: bool = False) -> Row:
    """The row of an operation; one that knows nothing where there is none.

    Args:
        module, op, call: as in a ``Site``.
        sparse: whether its layer has experts.
    """
    for pattern, row in _COMPILED:
        number = call % row.every if row.every else call
        if row.op not in (op, "*") or row.call not in (None, number) or not pattern.search(module):
            continue
        if row.sparse in (None, sparse):
            return row
    return _NOTHING_KNOWN


def name_of(module: str, op: str, call: int) -> str:
    """What a person calls this operation, for a sentence: "SwiGLU product", "down_proj output".

    An operation outside the table keeps its own name and, beyond the first, its number.
    """
    short, name = module.rsplit(".", 1)[-1], row_of(module, op, call).name
    if name is not None:
        return f"{short} {name}" if short.endswith(_SELF_NAMED) else name
    if op == "linear":
        return f"{short} output"
    if op == "cast":
        return f"{short} cast" + (f" {call + 1}" if call else "")
    return f"{op} in {short}" + (f", call {call + 1}" if call else "")
