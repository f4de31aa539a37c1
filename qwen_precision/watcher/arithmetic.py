"""Products of 16-bit operands computed as a graphics card does, in place of the CPU's own 16-bit kernels.

A dispatch mode that stands outside the watcher: that sees one operation with its rounded 16-bit output, whatever is
done here to make it. *tensor-core*: the operands are cast to fp32, which is exact, their products are summed in fp32, a
bias is added, and the result is rounded once. So do a GPU's matrix units (PTX ISA, ``mma`` with ``.f32`` accumulators)
and the epilogue of a GEMM behind them (cuBLASLt, ``CUBLAS_COMPUTE_32F``). *fp16-accumulate*: the running sum is rounded
to fp16 after every ``BLOCK`` products, as where ``torch.backends.cuda.matmul.allow_fp16_accumulation`` is set
(``CUBLAS_COMPUTE_16F``). There is no such unit for bf16: its products are those of tensor-core.

Left as they are: fp32 products; ``scaled_dot_product_attention``, whose fused kernels keep scores and sums in fp32 on a
CPU and on a GPU, whatever that flag says; convolutions and ``einsum``; grouped products other than of rows and experts.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BLOCK = 16
"""Products that are summed before the sum is rounded to fp16: the K of the widest 16-bit instruction of a tensor core
(PTX ISA, ``mma.m16n8k16`` with ``.f16`` accumulators). A V100's has 4 (``m8n8k4``): it may overflow earlier still."""

_CACHED = 4 << 20
"""Bytes of a weight that are cast to fp32 at once. They stay in the processor's cache until they are multiplied: cast
whole, a weight is written to memory and read again, which takes as long as the product."""
_LEAST_ROWS = 64
"""Of a weight; a product with fewer is slow."""

_Sum = Callable[[Tensor, Tensor], Tensor]
"""``[…, m, k]`` and ``[…, k, n]`` (or ``[k]``) in fp32 to their product in fp32."""


def computing(arithmetic: str) -> AbstractContextManager[Any]:
    """What stands around a forward that computes so; around the watcher, too. May be entered again and again.

    Args:
        arithmetic: of ``settings.ARITHMETIC``.
    """
    return nullcontext() if arithmetic == "native" else Products(arithmetic == "fp16-accumulate")


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """The dispatch mode.

    Args:
        narrow: whether sums of fp16 products are kept in fp16.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # for the same reason as in ``Watcher``

    def __init__(self, narrow: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sums: dict[torch.dtype, _Sum] = {
            torch.float16: _in_blocks if narrow else torch.matmul,
            torch.bfloat16: torch.matmul,
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation as it is, unless it is a product of 16-bit operands."""
        made = _PRODUCTS.get(func.overloadpacket.__name__)
        if made is not None and func._overloadname == "default":
            add_up = self._sums.get(args[made.operand].dtype)
            out = made.compute(add_up, *args, **(kwargs or {})) if add_up is not None else None
            if out is not None:
                return out
        return func(*args, **kwargs) if kwargs else func(*args)


def _in_blocks(ours: Tensor, theirs: Tensor) -> Tensor:
    """A product whose running sum is rounded to fp16 after every block; infinite from where it leaves the range."""
    total = None
    for start in range(0, ours.shape[-1], BLOCK):
        inner = slice(start, start + BLOCK)
        part = ours[..., inner] @ (theirs[inner] if theirs.dim() == 1 else theirs[..., inner, :])
        total = (part if total is None else part.add_(total)).half().float()
    return ours @ theirs if total is None else total


# -- the operations -------------------------------------------------------------------------------------------------


def _linear(add_up: _Sum, states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """A part of the weight after the other, each cast only while it is used."""
    if weight.dim() != 2:
        return None
    wide, count = states.float(), weight.shape[0]
    rows = max(_LEAST_ROWS, _CACHED // (4 * max(1, weight.shape[1])))
    out = states.new_empty((*states.shape[:-1], count))
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        total = add_up(wide, weight[part].float().t())
        out[..., part] = total if bias is None else total + bias[part].float()
    return out


def _matmul(add_up: _Sum, ours: Tensor, theirs: Tensor) -> Tensor:
    return add_up(ours.float(), theirs.float()).to(ours.dtype)


def _addmm(add_up: _Sum, added: Tensor, ours: Tensor, theirs: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    total = add_up(ours.float(), theirs.float())
    total = total if alpha == 1 else total * alpha
    return (total + beta * added.float() if beta else total).to(ours.dtype)


def _grouped(
    add_up: _Sum,
    states: Tensor,
    weights: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | None:
    """Rows sorted by expert against each expert's weight; those behind the last belong to none and come to zero."""
    if states.dim() != 2 or weights.dim() != 3 or offs is None or bias is not None or out_dtype is not None:
        return None
    out, start = states.new_zeros((states.shape[0], weights.shape[2])), 0
    for weight, stop in zip(weights, offs.tolist(), strict=True):
        if start < stop:
            made = _linear(add_up, states[start:stop], weight.t())
            assert made is not None
            out[start:stop] = made
        start = stop
    return out


class _Product(NamedTuple):
    """How one operation is computed."""

    compute: Callable[..., Tensor | None]
    """None from it leaves the operation to its own kernel."""
    operand: int = 0
    """The argument whose dtype decides."""


_PRODUCTS: dict[str, _Product] = {
    "linear": _Product(_linear),
    "mm": _Product(_matmul),
    "bmm": _Product(_matmul),
    "matmul": _Product(_matmul),
    "addmm": _Product(_addmm, operand=1),
    "baddbmm": _Product(_addmm, operand=1),
    "_grouped_mm": _Product(_grouped),
    "grouped_mm_fallback": _Product(_grouped),
}
"""By the operator's name."""
