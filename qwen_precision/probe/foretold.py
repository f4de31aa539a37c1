"""How long many prompts take, told before they begin: a few of them are timed."""

import time
from collections.abc import Callable, Sequence

from qwen_precision.model import Encoded
from qwen_precision.progress import Announce, lasting

MANY = 100
"""Prompts from which on it is told."""
_TIMED = 8  # evenly spread, so that short and long ones are among them


def foretell(
    prompts: Sequence[Encoded], dtypes: Sequence[str], parts: int, once: Callable[[int], object], announce: Announce
) -> None:
    """Say how many prompts there are and about how long they take; of a few nothing is said.

    Args:
        prompts: all of them.
        dtypes: in which each runs.
        parts: in how many parts (layers) of about the same size.
        once: runs one part on a prompt, watched, and waits for what it gave.
        announce: called with the sentence.
    """
    if len(prompts) < MANY:
        return
    places = [number * len(prompts) // _TIMED for number in range(_TIMED)]
    once(places[0])  # the first run of anything takes longer
    started = time.perf_counter()
    for place in places:
        once(place)
    seconds = (time.perf_counter() - started) / _TIMED * len(prompts) * parts * len(dtypes)
    tokens = sum(int(prompt.mask.sum()) for prompt in prompts)
    announce(
        f"{len(prompts):,} prompts, {tokens:,} tokens, in {', '.join(dtypes)}: about {lasting(seconds)}, two or three "
        "times that if most of them fail; --max-tokens and fewer prompts shorten it"
    )
