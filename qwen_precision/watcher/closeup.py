"""One operation under the microscope: operands, their ranges, its line of code, what its extreme is made of."""

import linecache
import os
import sys
from typing import Any

import torch
from torch import Tensor

from qwen_precision.record import Closeup, Contribution, Operand, Source, rounded
from qwen_precision.torch_dtypes import short_name, widened

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
    tensors = [tensor for tensor, _ in inputs]
    product = _against_a_weight(inputs, op, index, expert) or _of_activations(tensors, op, index)
    exact = (
        float((product[0] * product[1]).sum()) + product[2]
        if product is not None
        else _of_two(tensors, op, index, out.shape)
    )
    return Closeup(
        operands=[*operands, _operand(out, "output")],
        source=_source(),
        exact=rounded(exact) if exact is not None else None,
        contributions=_contributions(*product) if product is not None and op in ("linear", "grouped_mm") else [],
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


Product = tuple[Tensor, Tensor, float]
"""Two vectors in the widest format whose products are summed up to the extreme element, and what is added to that."""


def _against_a_weight(
    inputs: list[tuple[Tensor, bool]], op: str, index: list[int], expert: int | None
) -> Product | None:
    """The operands of one element of a product with a weight, and its bias."""
    weights = [tensor for tensor, weight in inputs if weight and tensor.dim() >= 2]
    biases = [tensor for tensor, weight in inputs if weight and tensor.dim() == 1]
    states = [tensor for tensor, weight in inputs if not weight]
    if op not in ("linear", "grouped_mm") or len(weights) != 1 or len(states) != 1:
        return None
    weight, values = weights[0], states[0][tuple(index[:-1])]
    if weight.dim() == 3:
        if expert is None:
            return None
        weight = weight[expert]
        weight = weight if weight.shape[-1] == values.shape[-1] and weight.shape[0] > index[-1] else weight.mT
    if values.dim() != 1 or weight.shape[-1] != values.shape[0]:
        # addmm has its weight transposed
        if values.dim() != 1 or weight.shape[0] != values.shape[0]:
            return None
        weight = weight.mT
    bias = float(biases[0][index[-1]]) if biases else 0.0
    return widened(values), widened(weight[index[-1]]), bias


def _of_activations(tensors: list[Tensor], op: str, index: list[int]) -> Product | None:
    """The operands of one element of a product of two activations, like q and k."""
    if op != "matmul" or len(tensors) != 2 or any(tensor.dim() != len(index) for tensor in tensors):
        return None
    ours, theirs = tensors
    lead = tuple(index[:-2])
    if ours.shape[:-2] != theirs.shape[:-2]:
        return None
    return widened(ours[lead][index[-2]]), widened(theirs[lead][:, index[-1]]), 0.0


def _of_two(tensors: list[Tensor], op: str, index: list[int], shape: torch.Size) -> float | None:
    """The exact sum or product of two elements."""
    if op not in ("add", "mul") or len(tensors) != 2:
        return None
    try:
        ours, theirs = (float(each.expand(shape)[tuple(index)]) for each in tensors)
    except (RuntimeError, IndexError):
        return None
    return ours + theirs if op == "add" else ours * theirs


def _contributions(values: Tensor, row: Tensor, bias: float) -> list[Contribution]:
    """Input channels of a product with a weight, by how much of the extreme element each makes up."""
    parts = values * row
    total = float(parts.sum()) + bias
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
