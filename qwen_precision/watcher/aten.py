"""What the watcher may conclude from an operation's name alone: one table, no tensors.

A dispatch mode sees every operation that runs. Most need one look at their output. Some need none, because
their values were seen before (views, copies), or follow exactly from what was seen (a cast rounds
monotonically, so the largest magnitude of the result is the cast of the largest magnitude that went in).
"""

from enum import Enum
from typing import Any

ALIASES = {
    # The same operation is called differently with and without autograd, and by device.
    "to": "cast",
    "_to_copy": "cast",
    "type_as": "cast",
    "mm": "linear",
    "addmm": "linear",
    "bmm": "matmul",
    "_softmax": "softmax",
    "native_dropout": "dropout",
    "_grouped_mm": "grouped_mm",
    "grouped_mm_fallback": "grouped_mm",
    "_scaled_dot_product_flash_attention": "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention_for_cpu": "scaled_dot_product_attention",
    "_scaled_dot_product_efficient_attention": "scaled_dot_product_attention",
    "_scaled_dot_product_cudnn_attention": "scaled_dot_product_attention",
    "_scaled_dot_product_attention_math": "scaled_dot_product_attention",
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
    if func.is_view:
        return Kind.MOVE
    return Kind.READ


def writes_in_place(func: Any) -> bool:
    """Whether the operator changes one of its arguments."""
    return bool(func._schema.is_mutable)


COMBINES_WITH_MASK = frozenset("add sub mul div cast clone contiguous maximum max where masked_fill".split())
"""Elementwise operations after which masked entries are still masked; softmax, for one, ends it."""
