"""What the record keeps of why something failed: control runs, greedy matches, a sweep. Facts only."""

from typing import Literal, get_args

from qwen_precision.record.parts import Count, Many, Number, Part, Site

Replay = Literal["as generated", "generated alone", "prefilled whole", "without cache"]
"""A failing step of a generation, made again as it was, or changed in one way."""

REPLAYS = get_args(Replay)

ControlKind = Literal[
    "same again",
    "same again, otherwise",
    "sdpa",
    "row alone",
    "full reduction",
    "token alone",
    "without the token",
    "without the template",
    "with the template",
    "before the token",
    "token after the first",
    "as many first tokens",
    "as many other tokens",
    "up to the token",
    "fresh engine",
    Replay,
]


class Control(Part):
    """A prompt of a failing pass, changed in one way (or in none) and run again in the same dtype."""

    what: ControlKind
    dtype: str
    prompt: str
    """Name of the prompt that failed."""
    row: Count
    tokens: Count
    """How many the control had."""
    position: int | None
    """Token position in the padded row that it is about; null where it is about the whole row."""
    clean: bool
    """Whether every operation was finite; of a step made again, the row's logits."""
    detail: str
    """What was changed, in words."""
    began: Site | None
    """Where this row is first not finite; null where it was clean, and where that was not looked at."""


class GreedyMatch(Part):
    """A short greedy continuation of a prompt in a dtype, against that in fp32."""

    dtype: str
    prompt: str
    tokens: Count
    first_difference: int | None
    """The first generated token that differs, from 0; null where none does."""


class Explanation(Part):
    """Controls and measurements that were made after a failure, or asked for."""

    budget: Count
    """Forwards that the controls might take."""
    controls: Many[Control]
    left_out: Many[str]
    """Controls that did not fit the budget, and measurements that could not be made, each with the reason."""
    hashes: dict[str, str]
    """SHA-256 of the files that hold damaged weights."""
    continuations: Many[GreedyMatch]


class Swept(Part):
    """One token or text of a sweep."""

    ids: Many[int]
    """One, or those of the text."""
    text: str
    magnitude: Number
    """The largest of the reference."""
    layer: Count | None
    """None outside the layers."""
    name: str
    """Of the operation."""
    channel: Count
    fails: bool | None
    """Whether it overflows in the dtype itself; null where that was not tried."""


class Sweep(Part):
    """A search for what triggers an overflow: many first tokens, or the lengths of a prompt."""

    kind: Literal["first-token", "length"]
    dtype: str
    tried: Count
    total: Count
    layers: Count
    """How many were run: all of them; once only those up to the step-up, after which magnitudes grow no more."""
    over: Count
    """How many overflow in the dtype; of a sweep up to the step-up, whose magnitude is beyond its largest number."""
    worst: Many[Swept]
    prompt: str | None
    """Of a length sweep: its name."""
    shortest_failing: int | None
    longest_clean: int | None
    """Tokens of its prefix."""
    seconds: Number
