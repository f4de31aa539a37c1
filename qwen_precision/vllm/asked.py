"""What a request asks for, and what was met in its logits. Nothing heavy: every vLLM beside this package loads it."""

from dataclasses import dataclass, field
from typing import Any

ASK = "qprec"
"""What a request names in ``extra_args`` (served: ``vllm_xargs``) …"""
WATCH, GUARD = "watch", "guard"
"""… and what it asks for: to be looked at alone, or to be mended too where a row is partly bad."""


@dataclass
class Met:
    """A row of logits that was not finite."""

    step: int
    before: dict[str, float]
    """How many of its elements are NaN, +inf (``inf``) and -inf, and how many there are (``elements``)."""
    after: dict[str, float] = field(default_factory=dict)
    """The same, and the ``bound``, once it was mended; empty where it was left as it is."""


@dataclass
class Asked:
    """A request that asked to be watched."""

    prompt: list[int]
    made: list[int]
    """The engine's own list of what it generated: it grows."""
    guard: bool = False
    temperature: float = 1.0
    """1 where the likeliest token is taken."""
    penalty: float = 1.0
    trips: list[Met] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The token that is about to be drawn, from 0."""
        return len(self.made)

    @property
    def known(self) -> bool:
        """Whether every token so far is; scheduled ahead, vLLM may hold placeholders (-1)."""
        return min(self.made, default=0) >= 0

    @property
    def repairs(self) -> int:
        """At how many steps it was mended."""
        return sum(bool(each.after) for each in self.trips)


def wish_of(params: Any) -> Any:
    """What is asked for in vLLM's sampling parameters; None where nothing is."""
    extra = getattr(params, "extra_args", None)
    return extra.get(ASK) if isinstance(extra, dict) else None


def asked(params: Any, prompt: list[int] | None, made: list[int]) -> Asked | None:
    """The request behind vLLM's sampling parameters, if it asks for anything; embeddings have no ids to run again."""
    wish = wish_of(params)
    if wish is None or prompt is None:
        return None
    temperature, penalty = float(params.temperature or 1.0), float(params.repetition_penalty or 1.0)
    return Asked(list(prompt), made, wish == GUARD, temperature, penalty)
