"""How a row of generated text went, in words: how long it is, how it ended, in which dtypes it was computed."""

from qwen_precision.record import Continuation
from qwen_precision.render.text import count

_FINISH = {
    "eos": "ended by its end token",
    "length": "ended at the limit",
    "criterion": "ended by a stopping criterion",
    "failed": "ENDED after its last good token",
    "error": "ENDED by the sampling error",
    "degenerate": "ENDED as degenerate",
    "interrupted": "interrupted",
}
_STRETCHES = 6


def ended_by_itself(row: Continuation) -> bool:
    """Whether its text ends where the model or a setting ends it, and not for a failure or an interrupt."""
    return row.finish in ("eos", "length", "criterion")


def went(row: Continuation) -> str:
    """``16 tokens, ended at the limit; in fp16``; of several dtypes from which step each."""
    ways = [f"{each.way} from step {each.start}" for each in row.stretches]
    if len(ways) == 1:
        ways = [f"in {row.stretches[0].way}"]
    rest = " …" if len(ways) > _STRETCHES else ""
    return "; ".join([f"{count(len(row.ids), 'token')}, {_FINISH[row.finish]}", ", ".join(ways[:_STRETCHES]) + rest])
