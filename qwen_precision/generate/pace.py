"""How long a generation takes, told once its first tokens have shown how fast it goes."""

import time

from qwen_precision.progress import Announce, Progress, lasting

_LONG = 60.0  # seconds from which on it is told
_TOKENS, _SECONDS = 8, 5.0  # what is timed: so many tokens behind the first, or what this time gives


def paced(progress: Progress, announce: Announce, rows: int) -> Progress:
    """The same progress, that also says once how long the rest will take at most, where that is long.

    Args:
        progress: called with the tokens made, at most to be made, and what is being done.
        announce: called with the sentence.
        rows: how many are decoded together.
    """
    began: float | None = None  # behind the first step: it took the whole prompt
    told = False

    def step(done: int, total: int, what: str) -> None:
        nonlocal began, told
        progress(done, total, what)
        if told or not total or not done:
            return
        now = time.perf_counter()
        began = now if began is None else began
        if done > _TOKENS or (done > 1 and now - began > _SECONDS):
            told = True
            left = (now - began) / (done - 1) * (total - done)
            if left >= _LONG:
                announce(
                    f"up to {total:,} tokens{f' in {rows:,} rows' if rows > 1 else ''}, about {lasting(left)} at most; "
                    "Ctrl-C ends it and keeps what there is"
                )

    return step
