"""The static check of scales: those that cannot be right, and those with which a weight leaves a dtype's range.

A scale is one number for a block of weights, so one that is wrong takes the whole block along: NaN bytes (0x7F and 0xFF
in FP8), infinity, the lowest number of a format, which loaders fill scales with before they read them, and zero.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen_precision.model.index import Packed
from qwen_precision.model.unpack import grid, numbers
from qwen_precision.record import ScaleFault
from qwen_precision.torch_dtypes import torch_dtype

_FILLED = tuple(torch.finfo(dtype).min for dtype in (torch.float32, torch.bfloat16, torch.float16))


def scale_faults(
    packed: Packed, pieces: Mapping[str, Tensor], weight: Tensor, parameter: str, dtypes: Sequence[str]
) -> list[ScaleFault]:
    """What is wrong with the scales of one weight.

    Args:
        packed: how it is kept.
        pieces: its parts by role, as the files have them.
        weight: ``[rows, columns]`` what they make, in float32; of experts together ``[experts, columns, rows]``.
        parameter: the model's parameter it is (a part of).
        dtypes: short names of the dtypes it will be cast to.
    """
    found: list[ScaleFault] = []
    columns = weight.shape[1]
    rows = weight.numel() // columns  # those of one expert below those of another
    for number, role in enumerate(packed.scales):
        scale = numbers(pieces[role])
        scale = scale.flatten(0, 1) if scale.dim() == 3 else scale
        scale = grid(scale.T if packed.turned and scale.dim() == 2 else scale, rows)
        block = (math.ceil(rows / scale.shape[0]), math.ceil(columns / scale.shape[1]))
        if packed.block is not None:  # the last may be cut short, which an even division does not know
            block = (min(packed.block[0], rows), min(packed.block[1], columns))
        bad = dict(_bad(scale))
        faults: list[tuple[Any, str | None, Tensor]] = [(kind, None, mask) for kind, mask in bad.items()]
        if number == 0:
            sound = ~torch.stack(list(bad.values())).any(dim=0)
            faults += [("overflow", name, sound & mask) for name, mask in _beyond(weight, block, scale, dtypes)]
        for kind, dtype, mask in faults:
            if bool(mask.any()):
                row, column = (int(each) for each in mask.nonzero()[0])
                value = float(scale[row, column])
                expert, row = divmod(row, weight.shape[2]) if weight.dim() == 3 else (None, row)
                found.append(
                    ScaleFault(
                        name=packed.names[role],
                        parameter=parameter,
                        file=packed.infos[role].file,
                        kind=kind,
                        dtype=dtype,
                        count=int(mask.sum()),
                        scales=scale.numel(),
                        expert=expert,
                        row=row,
                        column=column,
                        height=block[0],
                        width=block[1],
                        value=value,
                    )
                )
    return found


def _bad(scale: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Which scales cannot be right, whatever they multiply."""
    yield "nan", torch.isnan(scale)
    yield "infinite", torch.isinf(scale)
    yield "unwritten", torch.isin(scale, torch.tensor(_FILLED, device=scale.device))
    yield "zero", scale == 0


def _beyond(
    weight: Tensor, block: tuple[int, int], scale: Tensor, dtypes: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    """By dtype: the blocks with a weight that it cannot hold. One number tells of a weight where there is none."""
    low, high = (float(each) for each in torch.aminmax(weight))
    for name in dtypes:
        if -torch.finfo(torch_dtype(name)).max <= low and high <= torch.finfo(torch_dtype(name)).max:
            continue  # NaN compares as neither, and is looked at
        matrix = weight.mT.flatten(0, 1) if weight.dim() == 3 else weight
        places = torch.isinf(matrix.to(torch_dtype(name))).nonzero()
        mask = torch.zeros_like(scale, dtype=torch.bool)
        mask[places[:, 0] // block[0], places[:, 1] // block[1]] = True
        yield name, mask
