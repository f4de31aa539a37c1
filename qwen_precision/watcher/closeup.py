"""One operation under the microscope: operands, their ranges, its line of code, what its extreme is made of."""

import linecache
import os
import sys
from typing import Any

import torch
from torch import Tensor

from qwen_precision.record import Closeup, Contribution, Operand, Source, rounded
from qwen_precision.torch_dtypes import short_name

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_MOST = 4
_LONGEST = 200  # characters of a source line


def closeup(inputs: list[tuple[Tensor, bool]], out: Tensor, op: str, index: list[int], expert: int | None) -> Closeup:
    """What is to be seen of an operation at the moment it ran; call while the model's frame is on the stack.

    Args:
        inputs: every tensor that went in, and whether it is a weight.
        out: what came out.
        op: its name.
        index: of the extreme element of ``out``.
        expert: that the element belongs to, where a weight holds those of all experts.
    """
    operands = [_operand(tensor, "weight" if weight else "input") for tensor, weight in inputs]
    return Closeup(
        operands=[*operands, _operand(out, "output")],
        source=_source(),
        contributions=_contributions(inputs, op, index, expert),
    )


def _operand(tensor: Tensor, role: Any) -> Operand:
    fine = torch.isfinite(tensor)
    low, high = float("nan"), float("nan")
    if bool(fine.any()):
        low, high = (float(bound) for bound in torch.aminmax(tensor[fine]))
    return Operand(
        role=role,
        shape=list(tensor.shape),
        dtype=short_name(tensor.dtype),
        low=rounded(low),
        high=rounded(high),
        bad=int((~fine).sum()),
    )


def _source() -> Source | None:
    """The innermost frame that is neither ours nor torch's."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_OURS, _TORCH)) and not name.startswith("<"):
            text = linecache.getline(name, frame.f_lineno).strip()
            shown = name.rpartition("site-packages" + os.sep)[2] if "site-packages" in name else os.path.basename(name)
            return Source(file=shown.replace(os.sep, "/"), line=frame.f_lineno, text=text[:_LONGEST])
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _contributions(
    inputs: list[tuple[Tensor, bool]], op: str, index: list[int], expert: int | None
) -> list[Contribution]:
    """Input channels of a product with a weight, by how much of the extreme element each makes up."""
    weights = [tensor for tensor, weight in inputs if weight and tensor.dim() >= 2]
    states = [tensor for tensor, weight in inputs if not weight and tensor.is_floating_point()]
    if op not in ("linear", "grouped_mm") or len(weights) != 1 or len(states) != 1:
        return []
    weight, values = weights[0], states[0][tuple(index[:-1])]
    if weight.dim() == 3:
        if expert is None:
            return []
        weight = weight[expert]
        weight = weight if weight.shape[-1] == values.shape[-1] and weight.shape[0] > index[-1] else weight.mT
    if values.dim() != 1 or weight.shape[-1] != values.shape[0]:
        return []
    row = weight[index[-1]].double()
    parts = values.double() * row
    total = float(parts.sum())
    order = parts.abs().topk(min(_MOST, len(parts))).indices.tolist()
    return [
        Contribution(
            channel=k,
            value=rounded(float(values[k])),
            weight=rounded(float(row[k])),
            share=rounded(float(parts[k]) / total) if total else 0.0,
        )
        for k in order
    ]
