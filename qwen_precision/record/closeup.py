"""What the record keeps of single operations and hidden states that were looked at closely. Columns only."""

from typing import Literal

from qwen_precision.record.parts import Count, Many, Number, Part


class Operand(Part):
    """A tensor that went into an operation, or came out."""

    role: Literal["input", "weight", "output"]
    shape: Many[Count]
    dtype: str
    low: Number
    high: Number
    """Smallest and largest finite number."""
    bad: Count
    """Elements that are not finite."""


class Source(Part):
    """The line of modelling code that an operation came from."""

    file: str
    """Below site-packages."""
    line: Count
    text: str


class Contribution(Part):
    """One input channel's part of an extreme output of a matrix product."""

    channel: Count
    value: Number
    weight: Number
    share: Number
    """Of the whole sum, in exact arithmetic on the operands as they were."""


class Closeup(Part):
    """An operation that gave something not finite from finite inputs, under the microscope."""

    operands: Many[Operand]
    source: Source | None
    exact: Number | None
    """The extreme element in fp64, from the operands as they were; null where the operation is no product or sum."""
    contributions: Many[Contribution]
    """Largest first; empty where it is no matrix product."""


class Massive(Part):
    """A hidden state of the reference that dwarfs the others after a layer.

    The measure is that of https://arxiv.org/abs/2402.17762: above 100 and above 1,000 times the median magnitude.
    """

    layer: Count
    row: Count
    position: Count
    channel: Count
    value: Number
    median: Number
