"""The static check: what a dtype cannot hold, found by looking at the weights alone, with no forward.

A bf16 weight has 8 significant bits, so it is exact in fp16 from 2^-17 of magnitude upwards (fp16's smallest
subnormal is 2^-24) up to 65280; only the few smaller ones have to be cast and compared. All other pairs of
formats are cast and compared as a whole. Everything goes in pieces that stay in the cache.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from qwen_precision.model.index import Packed
from qwen_precision.model.scalecheck import scale_faults
from qwen_precision.record import ScaleFault, Weight, WeightTotals
from qwen_precision.torch_dtypes import short_name, torch_dtype

_PIECE = 1 << 18
_CARDS_PIECE = 1 << 23
"""On a card: large enough to keep it busy, small beside a layer."""
# A bf16 of magnitude 2^-17 ends exactly at fp16's last bit: 2^-17 * 2^-7 = 2^-24.
_EXACT_FROM = np.uint16(2 * torch.tensor(2.0**-17, dtype=torch.bfloat16).view(torch.int16).item() - 1)
_LARGEST = np.uint16(2 * torch.tensor(65280.0, dtype=torch.bfloat16).view(torch.int16).item())
_OCTET = np.arange(8)


class WeightCheck:
    """Collects what each tensor has to say; feed every piece of every tensor once.

    Args:
        dtypes: short names of the dtypes the checkpoint will be cast to.
    """

    def __init__(self, dtypes: Iterable[str]) -> None:
        self.dtypes = list(dtypes)
        self._totals = {name: [0, 0, 0, 0] for name in self.dtypes}  # elements, overflow, underflow, inexact
        self._tensors: dict[str, dict[str, float]] = {}
        self._files: dict[str, str] = {}
        self._parameters: dict[str, str] = {}
        self._rows_done: dict[str, int] = {}
        self._scale_faults: dict[str, list[ScaleFault]] = {}
        self._on_cards: list[tuple[str, Tensor]] = []  # what a card has counted, or will have

    def feed(self, name: str, file: str, tensor: Tensor, start: int = 0, parameter: str | None = None) -> None:
        """Check one tensor, or the rows of it from ``start`` on; rows that were checked before are passed over.

        Args:
            name: in the files.
            file: which one.
            tensor: all of it, or rows that begin where those fed before ended (or earlier). One on a CUDA card is
                counted there, and nothing waits for it before the sums are asked for.
            start: number of the first row.
            parameter: the model's parameter it is (a part of), where that has another name.
        """
        if not self.dtypes:
            return
        done = self._rows_done.get(name, 0)
        rows = tensor.shape[0] if tensor.dim() else 1
        if start + rows <= done:
            return
        self._rows_done[name] = start + rows
        if tensor.dim():
            tensor = tensor[max(0, done - start) :]
        self._files[name] = file
        self._parameters[name] = parameter or name
        facts = self._tensors.setdefault(name, {"elements": 0, "abs_max": 0.0})
        for piece in torch.split(tensor.reshape(-1), _CARDS_PIECE if tensor.is_cuda else _PIECE):
            if tensor.is_cuda:
                self._on_cards.append((name, _counted(piece, self.dtypes)))
            else:
                self._piece(facts, piece)

    def feed_scales(
        self, name: str, packed: Packed, pieces: Mapping[str, Tensor], weight: Tensor, parameter: str
    ) -> None:
        """Check the scales of one quantised weight; one that was checked before is passed over.

        Args:
            name: of the weight.
            packed: how it is kept.
            pieces: its parts by role, as the files have them.
            weight: what they make, in float32.
            parameter: the model's parameter it is (a part of).
        """
        if self.dtypes and name not in self._scale_faults:
            self._scale_faults[name] = scale_faults(packed, pieces, weight, parameter, self.dtypes)

    def _piece(self, facts: dict[str, float], piece: Tensor) -> None:
        facts["elements"] += piece.numel()
        largest, doubtful = _measured(piece)
        if not math.isfinite(largest):
            facts["nan"] = facts.get("nan", 0) + int(torch.isnan(piece).sum())
            facts["inf"] = facts.get("inf", 0) + int(torch.isinf(piece).sum())
            piece = piece[torch.isfinite(piece)]
            largest, doubtful = _measured(piece)
        facts["abs_max"] = max(facts["abs_max"], largest)
        for name in self.dtypes:
            self._lost(facts, name, piece.numel(), _cast_losses(doubtful if name == "fp16" else piece, name))

    def _lost(self, facts: dict[str, float], name: str, finite: int, lost: Sequence[int]) -> None:
        total = self._totals[name]
        total[0] += finite
        for index, (what, count) in enumerate(zip(("overflow", "underflow", "inexact"), lost, strict=True), 1):
            total[index] += count
            facts[f"{what} {name}"] = facts.get(f"{what} {name}", 0) + count

    def _settle(self) -> None:
        """Wait for the cards, once, and add what they counted."""
        pending, self._on_cards = self._on_cards, []
        if not pending:
            return
        torch.cuda.synchronize(pending[0][1].device)  # it was counted on a stream beside
        for (tensor, _), row in zip(pending, torch.stack([counts for _, counts in pending]).tolist(), strict=True):
            facts, (largest, nan, inf, finite) = self._tensors[tensor], row[:4]
            facts["elements"] += int(finite + nan + inf)
            facts["abs_max"] = max(facts["abs_max"], largest)
            facts["nan"], facts["inf"] = facts.get("nan", 0) + nan, facts.get("inf", 0) + inf
            for number, name in enumerate(self.dtypes):
                self._lost(facts, name, int(finite), [int(count) for count in row[4 + 3 * number : 7 + 3 * number]])

    def weights(self) -> list[Weight]:
        """The tensors that are damaged or that some dtype changes; all others are exact everywhere."""
        self._settle()
        found = []
        for name, facts in self._tensors.items():
            overflow = {d: int(facts[f"overflow {d}"]) for d in self.dtypes if facts.get(f"overflow {d}")}
            underflow = {d: int(facts[f"underflow {d}"]) for d in self.dtypes if facts.get(f"underflow {d}")}
            inexact = {d: int(facts[f"inexact {d}"]) for d in self.dtypes if facts.get(f"inexact {d}")}
            nan, inf = int(facts.get("nan", 0)), int(facts.get("inf", 0))
            if nan or inf or overflow or inexact:
                found.append(
                    Weight(
                        name=name,
                        parameter=self._parameters[name],
                        file=self._files[name],
                        elements=int(facts["elements"]),
                        nan=nan,
                        inf=inf,
                        abs_max=facts["abs_max"],
                        overflow=overflow,
                        underflow=underflow,
                        inexact=inexact,
                    )
                )
        return found

    def scale_faults(self) -> list[ScaleFault]:
        """What is wrong with scales, by tensor in the order in which they were read."""
        return [fault for found in self._scale_faults.values() for fault in found]

    def totals(self) -> list[WeightTotals]:
        """What casting everything costs, by dtype."""
        self._settle()
        return [
            WeightTotals(dtype=name, elements=t[0], overflow=t[1], underflow=t[2], inexact=t[3])
            for name, t in self._totals.items()
        ]


def _measured(piece: Tensor) -> tuple[float, Tensor]:
    """The largest magnitude (not finite where any element is not), and what fp16 may not hold exactly."""
    if piece.dtype == torch.bfloat16 and piece.numel():
        return _measured_bits(piece)
    low, high = (float(value) for value in torch.aminmax(piece)) if piece.numel() else (0.0, 0.0)
    return max(-low, high), piece


def _measured_bits(piece: Tensor) -> tuple[float, Tensor]:
    """The same of bf16: the very small (not the zeros), with whatever lies in the same eight, or all if any is large.

    On the bare bits, because that is many times faster than comparing 16-bit floats: shifting the sign out
    leaves the magnitude as an integer, in order.
    """
    magnitude = np.left_shift(piece.view(torch.int16).cpu().numpy().view(np.uint16), 1)
    largest = magnitude.max()
    value = float(torch.tensor(int(largest) >> 1, dtype=torch.int16).view(torch.bfloat16))
    if largest > _LARGEST:
        return value, piece
    small = np.zeros(-(-len(magnitude) // 8) * 8, dtype=bool)
    # Minus one, zeros wrap around to the largest number and so are not small; then small means below.
    np.less(np.subtract(magnitude, np.uint16(1), out=magnitude), _EXACT_FROM, out=small[: len(magnitude)])
    eights = np.flatnonzero(small.view(np.uint64) != 0)
    places = (8 * eights[:, None] + _OCTET).ravel()
    return value, piece[torch.from_numpy(places[places < len(magnitude)]).to(piece.device)]


def _cast_losses(piece: Tensor, name: str) -> tuple[int, int, int]:
    """(overflow, underflow to zero, inexact) counts of finite elements cast to a dtype."""
    if _exact(piece.dtype, name) or not piece.numel():
        return 0, 0, 0
    cast = piece.to(torch_dtype(name))
    wide = torch.promote_types(piece.dtype, cast.dtype)
    before, after = (each.to(wide).cpu().numpy() for each in (piece, cast))  # numpy compares many times faster
    inexact = int(np.count_nonzero(before != after))
    if not inexact:
        return 0, 0, 0
    underflow = int(np.count_nonzero(after == 0) - np.count_nonzero(before == 0))
    return int(np.count_nonzero(np.isinf(after))), underflow, inexact


def _exact(dtype: torch.dtype, name: str) -> bool:
    """Whether a dtype holds all that another does."""
    source = short_name(dtype)
    return source == name or (source in {"bf16", "fp16"} and name == "fp32")


def _counted(piece: Tensor, names: Sequence[str]) -> Tensor:
    """The same counts made by a card: largest finite magnitude, NaN, infinite, finite, and three for each dtype.

    Shape ``[4 + 3 * dtypes]``, in float64, which holds every count and every magnitude exactly.
    """
    finite, zero = torch.isfinite(piece), torch.zeros((), dtype=torch.float64, device=piece.device)
    largest = torch.where(finite, piece, 0).abs().max() if piece.numel() else zero
    counts = [largest, torch.isnan(piece).sum(), torch.isinf(piece).sum(), finite.sum()]
    for name in names:
        if _exact(piece.dtype, name):
            counts += [zero] * 3
            continue
        cast = piece.to(torch_dtype(name))
        wide = torch.promote_types(piece.dtype, cast.dtype)
        before, after = piece.to(wide), cast.to(wide)
        overflow, underflow = torch.isinf(after), (after == 0) & (before != 0)
        counts += [(finite & changed).sum() for changed in (overflow, underflow, before != after)]
    return torch.stack([count.to(torch.float64) for count in counts])
