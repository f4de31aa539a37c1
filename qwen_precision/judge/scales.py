"""Findings about the scales of quantised weights: which tensor, which block of it, how many, and what that does."""

from collections.abc import Iterator

from qwen_precision.dtypes import DTYPES
from qwen_precision.judge.columns import Columns
from qwen_precision.judge.findings import Cause, Finding, Magnitude, Place
from qwen_precision.qwen3 import layer_of
from qwen_precision.record import ScaleFault

_SAYS = {
    "nan": ("error", "are NaN", "their blocks of weights are NaN"),
    "infinite": ("error", "are infinite", "their blocks of weights are not finite"),
    "unwritten": (
        "error",
        "are the lowest number of a format, which loaders fill scales with before they read them",
        "they were never written",
    ),
    "zero": ("warning", "are zero", "their blocks of weights are zero, whatever was quantised"),
    # What leaves the range is an error of its own, about the weight; this says where in it.
    "overflow": ("info", "take a weight beyond {dtype}'s {limit:.6g}", "the weights of other blocks are inside"),
}
"""By kind: severity, what the scales are, what follows."""

_ADVICE = {
    "overflow": "Run the checkpoint in a wider dtype, or quantise these blocks anew.",
    "zero": "Compare these blocks with the checkpoint they were made from.",
}
_DAMAGED = "Quantise the checkpoint anew, or take another one; a download that was cut short has no such scales."


def scales(columns: Columns) -> Iterator[Finding]:
    """A scale of a quantised weight is NaN, infinite, zero or was never written, or takes its block out of range."""
    for fault in columns.run.scale_faults:
        for dtype in columns.run.dtypes:
            if fault.dtype in (None, dtype):
                yield _finding(fault, dtype)


def _finding(fault: ScaleFault, dtype: str) -> Finding:
    severity, what, follows = _SAYS[fault.kind]
    module, _, leaf = fault.parameter.rpartition(".")
    said = what.format(dtype=dtype, limit=DTYPES[dtype].max)
    expert = "" if fault.expert is None else f"expert {fault.expert}, "
    first = (
        f"first: {expert}block row {fault.row}, column {fault.column} (outputs {_span(fault.row, fault.height)}, "
        f"inputs {_span(fault.column, fault.width)}), scale {float(fault.value):.6g}"
    )
    cause = Cause(
        kind="damaged-scale" if severity == "error" else None,
        sentence=f"{fault.count} of {fault.scales} scales of {fault.name} in {fault.file} {said}; {follows}.",
        facts=(f"static check: {first}",),
        advice=_ADVICE.get(fault.kind, _DAMAGED),
    )
    name = f"{module.rpartition('.')[2] or fault.parameter} {leaf} scale"
    place = Place(layer=layer_of(module), module=module, op="weight", name=name)
    return Finding("bad-scale", severity, dtype, place, Magnitude(), cause)


def _span(block: int, extent: int) -> str:
    return f"{block * extent} to {(block + 1) * extent - 1}" if extent > 1 else str(block)
