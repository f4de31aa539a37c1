"""What every part of a record is made of: a frozen model, numbers that JSON has no word for, plain values.

JSON has no NaN or infinity: they are written as the words "nan", "inf" and "-inf".
"""

import math
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field

_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _number(value: object) -> object:
    return _WORDS.get(value, value) if isinstance(value, str) else value


Number = Annotated[float, Field(allow_inf_nan=True), BeforeValidator(_number)]
"""A float that may be NaN or infinite; in JSON those are words."""


def _numbers(values: object) -> object:
    return [_WORDS.get(v, v) if isinstance(v, str) else v for v in values] if isinstance(values, list) else values


Count = Annotated[int, Field(ge=0, le=2**53)]
"""How many; no more than a float holds exactly."""

T = TypeVar("T")
Many = Annotated[list[T], FailFast()]
"""A list of parts. The first that is wrong is the last looked at: a list of millions would make millions of errors."""

Column = Annotated[list[float | None], FailFast(), BeforeValidator(_numbers)]
"""Many such numbers, or null: looked through at once, for there can be millions."""


class Part(BaseModel):
    """Base of every part of a record: frozen, and an unknown or missing key is an error that names it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True, protected_namespaces=())


class Site(Part):
    """One operation of the model: a place where a number can leave the range."""

    layer: int | None
    """Decoder layer, or null outside the layers."""
    module: str
    """Path of the module whose forward ran it."""
    op: str
    """The operation's own name: linear, add, mul, scaled_dot_product_attention, …"""
    call: int
    """The how-manieth such operation of that module in one forward, from 0."""


def rounded(value: float) -> float:
    """Six significant digits: more than fp16 and bf16 have, and half the bytes in the file."""
    return float(f"{value:.6g}") if math.isfinite(value) else value


def in_words(value: Any) -> Any:
    """Plain JSON values: NaN and infinity as words, every key a string."""
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "nan" if value != value else ("inf" if value > 0 else "-inf")
    if isinstance(value, dict):
        return {str(key): in_words(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [in_words(item) for item in value]
    return value
