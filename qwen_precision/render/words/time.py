"""Where the time of a probe went, in one line."""

from qwen_precision.record import Run

_BESIDE = ("read", "copied")
"""Parts that ran beside the computing, and so add nothing to the whole but where it had to wait for them."""


def time_words(run: Run) -> str | None:
    """Seconds of the whole, of its parts, and of what ran beside them; None where they were not kept."""
    parts = {name: seconds for name, seconds in run.seconds.items() if name not in ("total", *_BESIDE)}
    beside = [f"{name} {run.seconds[name]:.3g}" for name in _BESIDE if name in run.seconds]
    if "total" not in run.seconds or not parts:
        return None
    said = ", ".join(f"{name} {seconds:.3g}" for name, seconds in parts.items())
    return f"{run.seconds['total']:.3g} s ({said}{'; beside that: ' + ', '.join(beside) if beside else ''})"
