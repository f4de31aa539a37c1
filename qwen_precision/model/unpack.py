"""One quantised weight, from what the files keep to float32: the arithmetic of each scheme, and nothing of names.

A stored number (8 bits at most) times a scale of 16 bits or fewer is exact in float32; with a float32 scale the product
is rounded once, to 24 bits.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""In which nibble of its word AWQ keeps each of eight neighbouring columns (AutoAWQ, awq/utils/packing_utils.py)."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of a 4-bit float with two exponent bits and one of mantissa; the fourth bit is the sign."""

_E8M0 = (*(2.0 ** (byte - 127) for byte in range(255)), math.nan)
"""The numbers of an 8-bit exponent without sign or mantissa (OCP Microscaling Formats, E8M0): no zero among them."""

_SIXTEEN = 16
"""Columns that share a scale in NVFP4."""
MX_GROUP = 32
"""Columns that share a scale in MXFP4 and MXFP8 (OCP Microscaling Formats)."""

Pieces = Mapping[str, Tensor]


def grid(scale: Tensor, rows: int) -> Tensor:
    """Scales as ``[blocks down, blocks across]`` of a weight with so many rows.

    A scalar is one block, a vector one a row; a vector of one is a scalar that somebody reshaped.
    """
    if scale.dim() == 2:
        return scale
    return scale.reshape(-1, 1) if scale.numel() == rows else scale.reshape(1, 1)


def times_blocks(weight: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """``float32(weight) * float32(scale of its block)``; the last block of a row or column may be cut short.

    Source: DeepSeek-V3, inference/kernel.py, ``weight_dequant``; Qwen3 FP8 is published in the same form.

    Args:
        weight: ``[rows, columns]``, FP8 or integers.
        scale: a scalar, ``[rows]``, ``[rows, 1]``, or ``[blocks down, blocks across]``; bytes are exponents.
        block: rows and columns that one scale is for; None for one a tensor or a row.
    """
    rows, columns = weight.shape
    each = grid(numbers(scale), rows)
    if block is not None:
        if each.shape[0] > 1:
            each = each.repeat_interleave(block[0], 0)[:rows]
        if each.shape[1] > 1:
            each = each.repeat_interleave(block[1], 1)[:, :columns]
    made: Tensor = weight.float() * each
    return made


def plain(pieces: Pieces, block: tuple[int, int] | None) -> Tensor:
    """FP8 or int8 with scales: ``(weight - zero point) * scale``.

    Source: compressed-tensors, quantization/lifecycle/forward.py, ``dequantize``.

    Args:
        pieces: ``weight``, ``scale`` and, where it is not symmetric, ``zero`` in the shape of the scale.
        block: as for ``times_blocks``.
    """
    weight = pieces["weight"]
    if "zero" not in pieces:
        return times_blocks(weight, pieces["scale"], block)
    zeros = pieces["zero"].float()  # a byte is a number here, and no exponent
    ones = times_blocks(torch.ones_like(weight, dtype=torch.float32), zeros, block)
    return times_blocks(weight.float() - ones, pieces["scale"], block)


def integers(packed: Tensor, bits: int, axis: int) -> Tensor:
    """Unsigned integers out of 32-bit words that hold ``32 / bits`` of them each, lowest bits first.

    Args:
        packed: int32, two-dimensional.
        axis: which of its dimensions becomes ``32 / bits`` times as long.
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    words = packed.unsqueeze(axis + 1)
    apart = words >> (shifts[:, None] if axis == 0 else shifts)
    whole: Tensor = (apart & (2**bits - 1)).flatten(axis, axis + 1)
    return whole


def gptq(pieces: Pieces, bits: int, group: int, above: int) -> Tensor:
    """``(integer - zero) * scale`` by groups of input channels: ``[outputs, inputs]``.

    The first format keeps each zero less one, and one below zero as the largest integer: ``above`` undoes that.
    Source: AutoGPTQ, nn_modules/qlinear/qlinear_cuda_old.py; GPTQModel, utils/model.py for ``gptq_v2``.

    Args:
        pieces: ``qweight`` ``[inputs * bits / 32, outputs]``, ``qzeros`` ``[groups, outputs * bits / 32]``, ``scales``
            ``[groups, outputs]`` and, where channels were sorted by activation, ``g_idx`` ``[inputs]``: their groups.
        group: channels of a group where ``g_idx`` is not there.
        above: what the stored zeros are less by: 1, or 0 in ``gptq_v2``.

    Raises:
        ValueError: ``g_idx`` names a group that is not there.
    """
    values = integers(pieces["qweight"], bits, 0).float()
    zeros: Tensor = (integers(pieces["qzeros"], bits, 1) + above) & (2**bits - 1)
    chosen = _groups(pieces.get("g_idx"), len(values), len(zeros), group)
    return ((values - zeros[chosen]) * pieces["scales"].float()[chosen]).T.contiguous()


def awq(pieces: Pieces, group: int) -> Tensor:
    """``(integer - zero) * scale`` of AWQ's gemm layout: ``[outputs, inputs]``.

    Source: AutoAWQ, awq/utils/packing_utils.py, ``dequantize_gemm``.

    Args:
        pieces: ``qweight`` ``[inputs, outputs / 8]``, ``qzeros`` ``[groups, outputs / 8]``, ``scales``
            ``[groups, outputs]``.
        group: input channels that share a scale.
    """
    values, zeros = (_in_order(integers(pieces[name], 4, 1)).float() for name in ("qweight", "qzeros"))
    chosen = _groups(None, len(values), len(zeros), group)
    return ((values - zeros[chosen]) * pieces["scales"].float()[chosen]).T.contiguous()


def packed_integers(pieces: Pieces, bits: int, group: int) -> Tensor:
    """``(integer - zero) * scale`` of compressed-tensors' packed integers: ``[outputs, inputs]``.

    What is packed is the signed integer plus half its range; a zero point is packed the same way, down the outputs.
    Source: compressed-tensors, compressors/pack_quantized/base.py and helpers.py.

    Args:
        pieces: ``packed`` ``[outputs, inputs * bits / 32]``, ``scale`` ``[outputs, groups]``, and perhaps ``zero``
            ``[outputs * bits / 32, groups]``, ``g_idx`` ``[inputs]``, ``shape`` (outputs and inputs).
        group: input channels that share a scale where ``g_idx`` is not there.

    Raises:
        ValueError: ``shape`` is not what is packed, or ``g_idx`` names a group that is not there.
    """
    values = integers(pieces["packed"], bits, 1)
    if "shape" in pieces and pieces["shape"].tolist() != list(values.shape):
        raise ValueError(f"says {pieces['shape'].tolist()}, {list(values.shape)} is packed")
    scale = pieces["scale"].float()
    zeros = torch.full_like(scale, 2.0 ** (bits - 1))
    if "zero" in pieces:
        zeros = integers(pieces["zero"], bits, 0)[: len(scale)].float()
    order = pieces.get("g_idx")  # an order that was not used is all -1
    order = None if order is not None and bool((order == -1).all()) else order
    chosen = _groups(order, values.shape[1], scale.shape[1], group)
    return (values.float() - zeros[:, chosen]) * scale[:, chosen]


def nvfp4(pieces: Pieces) -> Tensor:
    """4-bit floats times their block's FP8 scale over the tensor's own: ``[outputs, inputs]``.

    Source: compressed-tensors, compressors/nvfp4/helpers.py (low nibble first) and quantization/lifecycle/forward.py
    (the scale is divided by the global scale first).

    Args:
        pieces: ``packed`` uint8 ``[outputs, inputs / 2]``, ``scale`` ``[outputs, inputs / 16]``, ``global`` of one.
    """
    scale = pieces["scale"].float() / pieces["global"].float().reshape(1, 1)
    return times_blocks(_fp4(pieces["packed"]), scale, (1, _SIXTEEN))


def mxfp4(pieces: Pieces) -> Tensor:
    """4-bit floats times their group's power of two: ``[outputs, inputs]``.

    Source: compressed-tensors, compressors/mxfp4/base.py and mx_utils.py; a byte of 255 as for ``mxfp4_experts``.

    Args:
        pieces: ``packed`` uint8 ``[outputs, inputs / 2]``, ``scale`` ``[outputs, inputs / 32]``.
    """
    return times_blocks(_fp4(pieces["packed"]), pieces["scale"], (1, MX_GROUP))


def mxfp4_experts(pieces: Pieces) -> Tensor:
    """4-bit floats times their group's power of two, of all experts: ``[experts, inputs, outputs]``.

    A scale whose byte is 255 is NaN, as the format has it; transformers takes it for 2^128, which is infinite.
    Source: transformers, integrations/mxfp4.py, ``convert_moe_packed_tensors`` (low nibble first, turned at the end).

    Args:
        pieces: ``blocks`` uint8 ``[experts, outputs, groups, 16]``, ``scales`` ``[experts, outputs, groups]``.
    """
    experts, outputs, groups, half = pieces["blocks"].shape
    made = torch.empty(experts, groups * half * 2, outputs, device=pieces["blocks"].device)
    for one, packed, scale in zip(made, pieces["blocks"], pieces["scales"], strict=True):
        # One at a time: on the way it takes several times the room that it will have.
        one.copy_((_fp4(packed) * numbers(scale).unsqueeze(-1)).flatten(1).T)
    return made


def numbers(scale: Tensor) -> Tensor:
    """Scales in float32; bytes are exponents."""
    return torch.tensor(_E8M0, device=scale.device)[scale.int()] if scale.dtype == torch.uint8 else scale.float()


def _fp4(packed: Tensor) -> Tensor:
    """Two numbers out of every byte, the low four bits first: the last dimension becomes twice as long."""
    values = torch.tensor([*_E2M1, *(-each for each in _E2M1)], device=packed.device)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1)  # of every byte there is
    # A pair is looked up as one number of its size: four times as fast as its halves.
    found = pairs.view(torch.int64).flatten().index_select(0, packed.flatten().int())
    return found.view(torch.float32).reshape(*packed.shape[:-1], -1)


def _in_order(values: Tensor) -> Tensor:
    """Columns that AWQ packed, each in its own place."""
    eights = values.reshape(len(values), -1, len(AWQ_ORDER))
    return eights[:, :, list(AWQ_ORDER)].flatten(1)


def _groups(order: Tensor | None, inputs: int, groups: int, size: int) -> Tensor:
    """``[inputs]`` the group that each input channel belongs to."""
    if order is None:
        return torch.arange(inputs) // size
    if len(order) != inputs or int(order.min()) < 0 or int(order.max()) >= groups:
        raise ValueError(f"puts {inputs} input channels into groups that are not among its {groups}")
    return order.long()
