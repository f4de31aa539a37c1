"""What the watcher may conclude from an operation's name alone: one table, no tensors.

A dispatch mode sees every operation that runs. Most need one look at their output. Some need none, because
their values were seen before (views, copies), or follow exactly from what was seen (a cast rounds
monotonically, so the largest magnitude of the result is the cast of the largest magnitude that went in).
"""

import re
from enum import Enum
from typing import Any, NamedTuple

ALIASES = {
    # The same operation is called differently with and without autograd, and by device.
    "to": "cast",
    "_to_copy": "cast",
    "type_as": "cast",
    "mm": "linear",
    "addmm": "linear",
    "bmm": "matmul",
    "_softmax": "softmax",
    "_safe_softmax": "softmax",  # of an attention that torch writes out: no fused kernel takes it
    "native_dropout": "dropout",
    "_grouped_mm": "grouped_mm",
    "grouped_mm_fallback": "grouped_mm",
    "onednn_mm": "linear",  # vLLM's, on a CPU
    "_scaled_dot_product_flash_attention": "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention_for_cpu": "scaled_dot_product_attention",
    "_scaled_dot_product_efficient_attention": "scaled_dot_product_attention",
    "_scaled_dot_product_cudnn_attention": "scaled_dot_product_attention",
    "_scaled_dot_product_attention_math": "scaled_dot_product_attention",
    "_scaled_dot_product_attention_math_for_mps": "scaled_dot_product_attention",
    "_scaled_dot_product_fused_attention_overrideable": "scaled_dot_product_attention",
}


class Kind(Enum):
    """How the watcher treats an operation."""

    READ = "look at the output"
    EXACT = "the largest magnitude follows from that of the input"
    MOVE = "the values were seen before, elsewhere"
    CREATE = "the values are constants"
    FILL = "may put an intended extreme value (a mask) into a tensor"
    SORT = "orders rows; an inspector wants to know how"
    IGNORE = "looks, indexes or compares; makes no new magnitudes"


_MOVES = frozenset(
    "view reshape contiguous clone transpose permute expand unsqueeze squeeze flatten unflatten t alias detach "
    "slice select index index_select gather take_along_dim cat stack split split_with_sizes chunk unbind repeat "
    "repeat_interleave narrow neg flip roll _unsafe_view as_strided movedim swapaxes expand_as view_as lift_fresh "
    "dropout constant_pad_nd tril triu".split()
)
_CREATES = frozenset(
    "arange zeros ones empty full zeros_like ones_like empty_like full_like new_zeros new_ones new_empty "
    "new_full empty_strided new_empty_strided scalar_tensor eye linspace rand randn randint one_hot".split()
)
_FILLS = frozenset(["where", "masked_fill", "masked_fill_"])
_IGNORES = frozenset("topk argmax argmin aminmax histc _local_scalar_dense item is_nonzero equal all any".split())
_CACHE = re.compile("_and_cache|(copy|swap)_blocks")
"""An engine's kernels that only put keys and values into its cache, which is large, and not all of it in use."""

OUTPUTS = frozenset("out output result c".split())
"""What such kernels call an argument that they only write into; it is fresh memory, and anything may lie there."""

ELEMENTWISE = frozenset("add sub mul div neg cast pow silu gelu relu sigmoid tanh exp where clamp".split())
"""Every element of the output comes from the elements of the inputs in the same place."""

WITHIN_A_TOKEN = frozenset("linear mean rsqrt softmax".split())
"""Every token of the output comes from the same token of the inputs."""


def name_of_operator(func: Any) -> str:
    """The operation's public name: ``aten._to_copy.default`` is ``cast``."""
    name: str = func.overloadpacket.__name__
    return ALIASES.get(name, name)


def kind_of(func: Any) -> Kind:
    """How to treat one operator, from its schema name.

    ``pow`` follows exactly only for the square (``x * x`` is monotonic in ``|x|`` and rounds so); the watcher
    checks the exponent.
    """
    name: str = func.overloadpacket.__name__
    if name in {"to", "_to_copy", "type_as", "pow"}:
        return Kind.EXACT
    if name in _MOVES:
        return Kind.MOVE
    if name in _CREATES:
        return Kind.CREATE
    if name in _FILLS:
        return Kind.FILL
    if name == "sort":
        return Kind.SORT
    if name in _IGNORES:
        return Kind.IGNORE
    if _CACHE.search(name):
        return Kind.MOVE
    if func.is_view:
        return Kind.MOVE
    return Kind.READ


COMBINES_WITH_MASK = frozenset("add sub rsub mul div cast maximum max".split())
"""Elementwise operations after which masked entries are still masked; softmax, for one, ends it."""

CONSTANT = frozenset("full full_like new_full".split())
"""Operations that fill a new tensor with one number."""

AS_VALUES: dict[str, tuple[int, ...]] = {
    "full": (1,),
    "full_like": (1,),
    "new_full": (2,),
    "where": (1, 2),
    "masked_fill": (0, 2),
    "fill": (0, 1),
    "zero": (0,),
    "fill_diagonal": (0, 1),
    "triu": (0,),
    "tril": (0,),
    "copy": (0, 1),
    "index_put": (0, 2),
    "index_fill": (0, 3),
    "index_copy": (0, 3),
    "scatter": (0, 3),
    "masked_scatter": (0, 2),
    "slice_scatter": (0, 1),
    "select_scatter": (0, 1),
    "constant_pad_nd": (0, 2),
    "pad": (0, 3),
}
"""Operations that put values into a tensor, and which of their arguments are values (the others say where)."""

_MAY_MASK = CONSTANT | frozenset("where masked_fill fill index_put index_fill scatter constant_pad_nd pad mul".split())


class Rule(NamedTuple):
    """What the watcher does with one operator."""

    kind: Kind
    op: str
    base: str
    """The name of the same operation out of place."""
    mutates: bool
    may_mask: bool
    """Whether it may put an extreme constant into its output."""
    writes: tuple[str, ...]
    """Of an operation that returns nothing: the arguments that hold what it gave, by name."""

    def written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> list[tuple[str, Any]]:
        """What it wrote into, each with its name."""
        names = (argument.name for argument in func._schema.arguments)
        given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        return [(name, given[name]) for name in self.writes if name in given]


def rule_for(func: Any) -> Rule:
    """The rule for one operator, from its schema."""
    op, schema = name_of_operator(func), func._schema
    base = op.rstrip("_")
    silent = () if schema.returns else schema.arguments
    writes = tuple(each.name for each in silent if each.alias_info is not None and each.alias_info.is_write)
    return Rule(kind_of(func), op, base, bool(schema.is_mutable), base in _MAY_MASK, writes)
