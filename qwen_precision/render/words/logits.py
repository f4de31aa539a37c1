"""What float32 logits buy and cost, in words and in cells, for every format that has room."""

import math
from collections.abc import Iterable, Iterator

from qwen_precision.dtypes import REFERENCE
from qwen_precision.judge import Bought, Finding, Report, a_step, cost, sized
from qwen_precision.render.text import count, number, quoted

_COLUMNS = ("dtype", "loss", "loss error", "log-prob. error", "at most", "mass lost", "ranks")

_BAR = 14
_NAME = 14
"""Signs of a prompt's name."""
_HOW = (
    "Of the very same logits: in the dtype, sums are kept in float32 and every result is rounded once, as on a "
    "graphics card; "
)
_BY_HAND = (
    "A softmax by hand, exp(x - max) over its sum with every step rounded to the dtype, is what an exported graph or a "
    "kernel without wider sums computes"
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


def at_a_glance(dtype: str, each: Bought) -> str:
    """What a softmax in the dtype loses, in a line of a screen."""
    lost = each.mass_lost or 0.0
    then = _next(each) if each.changed else f"probabilities sum to {1 - lost:.4g}"
    return f"softmax in {dtype}: {_loses(each)}; {then}"


def _loses(each: Bought) -> str:
    if each.loss_error is None:
        return f"log-prob. off by {number(each.logprob_max)}"
    return "loss infinite" if math.isinf(each.loss_error) else f"loss off by {number(each.loss_error)}"


def memory(report: Report) -> str:
    """What all logits of the run's prompt take, in a line of a screen; empty where that is not known."""
    taken = cost(report.run)
    if taken is None:
        return ""
    whole, last = sized(taken.whole.float32), sized(taken.last.float32)
    rows = f"{taken.whole.rows} rows of " if taken.whole.rows > 1 else ""
    return f"{rows}{count(taken.whole.tokens, 'token')} take {whole} in float32, the last position {last}"


_REMEDIES = {
    "loss": "train with the loss's logits in float32",
    "next token": "sample from float32",
    "long prompt": "long prompts: logits_to_keep=1, chunked prefill, vLLM",
}
"""By the name of an advice, in a few words; the finding says it in full."""


def remedies(advised: Iterable[Finding]) -> str:
    """What to do, each once."""
    names = {each.place.name.removeprefix("logits, ") for each in advised}
    return "; ".join(words for name, words in _REMEDIES.items() if name in names)


def _next(each: Bought) -> str:
    return f"{each.changed:,} of {count(each.rows, 'next token')} change{'s' if each.changed == 1 else ''}"


def _lost(each: Bought) -> str:
    parts = []
    if each.bad:
        parts.append(f"{count(each.bad, 'log-probability').replace('ys', 'ies')} of {each.tokens:,} infinite")
    if each.zero:
        parts.append(f"{each.zero:,} of {count(each.tokens, 'token')} with probability zero (log -inf)")
    return f"; {', '.join(parts)}" if parts else ""


def costs(report: Report) -> str:
    """What they take, in a line; empty where no logits were seen."""
    taken = cost(report.run)
    if taken is None:
        return ""
    longer = ", ".join(f"{sized(each.float32)} at {each.tokens:,}" for each in taken.longer)
    last = f"{sized(taken.longer[0].float32 // taken.longer[0].tokens)} for the last position alone"
    return f"float32 logits of a prompt take {longer} tokens; {last}"


def in_brief(report: Report) -> list[tuple[str, str]]:
    """By dtype what they buy, and last, under "cost", what they take: for formats that have no room for a table."""
    lines = [(line.partition(":")[0], line) for line in saved(report)]
    taken = costs(report)
    return [*lines, *([("cost", taken)] if taken else [])]


def columns(report: Report) -> tuple[str, ...]:
    """Of ``rows``: with several prompts, whose loss it is."""
    return (*_COLUMNS, *(("loss of",) if _several(report) else ()))


def _several(report: Report) -> bool:
    """Whether a row has to say which prompt it is about."""
    found = report.bought.values()
    many = len(report.run.prompts) > 1 or report.corpus is not None
    return any(each.prompt is not None and (many or each.row is not None) for each in found)


def _whose(each: Bought) -> str:
    if each.prompt is None:
        return "-"
    return quoted(each.prompt, _NAME) + (f" row {each.row}" if each.row is not None else "")


def rows(report: Report) -> list[tuple[str, ...]]:
    """A row a dtype, of ``columns``."""
    several = _several(report)
    return [
        (
            dtype,
            number(each.loss),
            number(each.loss_error),
            number(each.logprob_rms),
            number(each.logprob_max),
            number(each.mass_lost),
            f"{each.ranks:,} of {10 * each.rows:,}",
            *((_whose(each),) if several else ()),
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
        name = quoted(taken.prompt, _NAME) if each is taken.whole and taken.prompt is not None else each.name
        share = (math.log(each.float32) - low) / (high - low) if high > low else 1.0
        found.append((name + own, sized(each.float32), sized(each.narrow), "█" * max(1, round(share * _BAR))))
    return found


def notes(report: Report) -> Iterator[str]:
    """How it was measured, what was really held, and what the upcast takes."""
    if report.bought:
        yield _HOW + (_IN_A_PROMPT if report.run.generation is None else _IN_A_TEXT)
    by_hand = list(_by_hand(report))
    if by_hand:
        yield f"{_BY_HAND}: {'; '.join(by_hand)}."
    taken = cost(report.run)
    if taken is None:
        return
    missing = [dtype for dtype in report.run.dtypes if dtype != REFERENCE and dtype not in report.bought]
    if missing and taken.held is not None and report.run.generation is None:
        yield f"Not compared in {' and '.join(missing)}: no row kept finite logits of its own."
    if taken.held is not None:
        pieces = f", in {count(taken.pieces, 'piece')}" if taken.pieces > 1 else ""
        yield f"Held at once here: {sized(taken.held)} at most{pieces}."
    yield a_step(taken)


def _by_hand(report: Report) -> Iterator[str]:
    """A softmax of which every step is rounded, as an export or code by hand has it."""
    for dtype, each in report.bought.items():
        if each.by_hand is None and not each.by_hand_bad:
            continue
        said = [f"it sums to {1 - each.by_hand:.6g} where it is worst"] if each.by_hand is not None else []
        if each.by_hand_bad:
            said.append(f"it is not finite on {each.by_hand_bad:,} of {count(each.rows, 'position')}")
        exp = f", and exp of the largest logit overflows on {each.unshifted_bad:,} unless it is taken off first"
        yield f"in {dtype} {' and '.join(said)}{exp if each.unshifted_bad else ''}"
