"""What the static check of the weights leaves in the record."""

from qwen_precision.record.parts import Number, Part


class Weight(Part):
    """A tensor of the checkpoint that is damaged, or that some dtype does not hold exactly."""

    name: str
    """In the files."""
    parameter: str
    """The model's parameter it is, or is a part of."""
    file: str
    elements: int
    nan: int
    inf: int
    abs_max: Number
    """Largest finite magnitude."""
    overflow: dict[str, int]
    """Elements beyond the largest finite number, by dtype."""
    underflow: dict[str, int]
    """Non-zero elements that become zero, by dtype."""
    inexact: dict[str, int]
    """Elements whose value changes in any way, by dtype."""


class WeightTotals(Part):
    """What casting the checkpoint to one dtype costs, over all tensors."""

    dtype: str
    elements: int
    overflow: int
    underflow: int
    inexact: int
    """Elements whose value changes in any way."""
