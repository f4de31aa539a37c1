"""What float32 logits buy and cost, in words and in cells, for every format that has room."""

import math
from collections.abc import Iterator

from qwen_precision.judge import Bought, Report, a_step, cost, sized
from qwen_precision.render.text import count, number

COLUMNS = ("dtype", "loss", "loss error", "log-prob. error", "at most", "mass lost", "ranks", "next")
"""Of ``rows``."""

_BAR = 14
_HOW = (
    "Of the very same logits: in the dtype, sums are kept in float32 and every result is rounded once, as on a "
    "graphics card; "
)
_IN_A_PROMPT = (
    "loss and its error are of the row that loses most, mass and ranks (of the ten likeliest tokens) of a few "
    "positions a row."
)
_IN_A_TEXT = "ranks are of the ten likeliest tokens at each step."


def saved(report: Report) -> Iterator[str]:
    """A line a dtype, that with the largest error of the loss first: what is lost where logits are not upcast."""
    for dtype, each in sorted(report.bought.items(), key=lambda item: -(item[1].loss_error or 0.0)):
        yield f"{dtype}: upcasting saves {_saves(each)} here; without it {_next(each)}{_lost(each)}"


def _saves(each: Bought) -> str:
    if each.loss_error is not None:
        error = "an infinite loss" if math.isinf(each.loss_error) else f"{number(each.loss_error)} of loss error"
        return error if math.isinf(each.loss_error) else f"{error} (nats)"
    if each.logprob_max is not None:
        return f"{number(each.logprob_max)} nats at most of a token's log-probability"
    return "nothing that could be compared"


def _next(each: Bought) -> str:
    return f"{each.changed:,} of {count(each.rows, 'next token')} change{'s' if each.changed == 1 else ''}"


def _lost(each: Bought) -> str:
    parts = []
    if each.bad:
        parts.append(f"{count(each.bad, 'log-probability').replace('ys', 'ies')} of {each.tokens:,} infinite")
    if each.zero:
        parts.append(f"{each.zero:,} of {count(each.tokens, 'token')} with probability zero (log -inf)")
    return f"; {', '.join(parts)}" if parts else ""


def rows(report: Report) -> list[tuple[str, ...]]:
    """A row a dtype, of ``COLUMNS``."""
    return [
        (
            dtype,
            number(each.loss),
            number(each.loss_error),
            number(each.logprob_rms),
            number(each.logprob_max),
            number(each.mass_lost),
            f"{each.ranks:,} of {10 * each.rows:,}",
            f"{each.changed:,} of {each.rows:,}",
        )
        for dtype, each in report.bought.items()
    ]


def narrow(report: Report) -> str:
    """The dtype of the second column of ``lengths``."""
    taken = cost(report.run)
    return taken.dtype if taken is not None else ""


def lengths(report: Report) -> list[tuple[str, str, str, str]]:
    """What logits take by length: what of, in float32, in the narrowest dtype, and a bar on a logarithmic scale."""
    taken = cost(report.run)
    if taken is None:
        return []
    sizes = [each.float32 for each in taken.lengths]
    low, high = math.log(min(sizes)), math.log(max(sizes))
    found = []
    for each in taken.lengths:
        rows = f"{each.rows:,} x " if each.rows > 1 else ""
        own = f" ({rows}{count(each.tokens, 'token')})" if each is taken.whole or rows else ""
        share = (math.log(each.float32) - low) / (high - low) if high > low else 1.0
        found.append((each.name + own, sized(each.float32), sized(each.narrow), "█" * max(1, round(share * _BAR))))
    return found


def notes(report: Report) -> Iterator[str]:
    """How it was measured, what was really held, and what the upcast takes."""
    if report.bought:
        yield _HOW + (_IN_A_PROMPT if report.run.generation is None else _IN_A_TEXT)
    yield from _by_hand(report)
    taken = cost(report.run)
    if taken is None:
        return
    if taken.held is not None:
        pieces = f", in {count(taken.pieces, 'piece')}" if taken.pieces > 1 else ""
        yield f"Held at once here: {sized(taken.held)} at most{pieces}."
    yield a_step(taken)


def _by_hand(report: Report) -> Iterator[str]:
    """A softmax of which every step is rounded, as an export or code by hand has it."""
    for dtype, each in report.bought.items():
        if each.by_hand is None and not each.by_hand_bad:
            continue
        said = [f"sums to {1 - each.by_hand:.6g} where it is worst"] if each.by_hand is not None else []
        said += [f"is not finite on {each.by_hand_bad:,} of {each.rows:,}"] if each.by_hand_bad else []
        exp = f"; exp of the largest logit overflows on {each.unshifted_bad:,} unless it is taken off first"
        yield f"In {dtype} with every step rounded, a softmax {' and '.join(said)}{exp if each.unshifted_bad else ''}."
