"""What float32 logits buy and cost, in words and in cells, for every format that has room."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from qwen_precision.dtypes import REFERENCE
from qwen_precision.judge import Bought, Cost, Finding, Report, a_step, cost, lost_by_hand, sized
from qwen_precision.record import LOOKED_AT
from qwen_precision.render.text import count, number, quoted
from qwen_precision.render.words import logitsteps

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
    "loss and its error are of the row that loses most; mass, ranks and next tokens are of at most "
    f"{LOOKED_AT} positions a row."
)
_IN_A_TEXT = "mass, ranks and next tokens are of every step."
_RANKS = (
    "Ranks tied: of the ten likeliest tokens of each, those whose probability is rounded to the same number as that of "
    "a likelier one, though their logits differ. The next token can change only where that is the likeliest of all."
)


def saved(report: Report) -> Iterator[str]:
    """A line a dtype, that with the largest error of the loss first: what is lost where logits are not upcast."""
    for dtype, each in sorted(report.bought.items(), key=lambda item: -(item[1].loss_error or 0.0)):
        saves, rest = f"{_saves(each)} here{_at(each)}", f"{_lost(each)}{_left_out(report, each)}"
        yield f"{dtype}: upcasting saves {saves}; without it {_next(report, each)}{rest}"


def _saves(each: Bought) -> str:
    if each.loss_error is not None:
        least = f"at least {number(each.loss_error)} of loss error (nats)"
        return "an infinite loss" if math.isinf(each.loss_error) else least
    if each.logprob_max is not None:
        return f"{number(each.logprob_max)} nats at most of a token's log-probability"
    return "no loss, as one token has none," if each.rows else "nothing that could be compared"


def _at(each: Bought) -> str:
    """The step at which a text is farthest off."""
    return f" (row {each.row}, step {each.step})" if each.step is not None else ""


def at_a_glance(dtype: str, each: Bought) -> str:
    """What a softmax in the dtype loses, in a line of a screen."""
    lost = each.mass_lost or 0.0
    then = _changed(each) if each.changed else f"probabilities sum to {1 - lost:.4g}"
    if lost_by_hand(each):
        then = f"by hand {_made_by_hand(each)}"
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
    if report.run.generation is not None and taken.held is not None:
        return f"the largest tensor of them here took {sized(taken.held)}, the last position takes {last} in float32"
    rows = f"{taken.whole.rows} rows of " if taken.whole.rows > 1 else ""
    return f"{rows}{count(taken.whole.tokens, 'token')} take {whole} in float32, the last position {last}"


_REMEDIES = {
    "loss": "train with the loss's logits in float32",
    "next token": "sample from float32",
    "long prompt": "long prompts: logits_to_keep=1, chunked prefill, vLLM",
    "by hand": "upcast before a softmax that is written out",
    "prefill": "prefill in smaller chunks (guard float32_logits), vLLM",
}
"""By the name of an advice, in a few words; the finding says it in full."""


def remedies(advised: Iterable[Finding]) -> str:
    """What to do, each once."""
    names = {each.place.name.removeprefix("logits, ") for each in advised}
    return "; ".join(words for name, words in _REMEDIES.items() if name in names)


def _next(report: Report, each: Bought) -> str:
    """How many next tokens change: in a text of all, in a prompt of those that were looked at."""
    some = f" (at most {LOOKED_AT} a row looked at)" if report.run.generation is None else ""
    return f"{_changed(each)}{some}"


def _changed(each: Bought) -> str:
    return f"{each.changed:,} of {count(each.rows, 'next token')} change{'s' if 1 in (each.changed, each.rows) else ''}"


def _left_out(report: Report, each: Bought) -> str:
    """Why one dtype may have fewer than another."""
    if not each.left_out:
        return ""
    if report.run.generation is not None:
        return f"; {count(each.left_out, 'step')} left out: no finite logits"
    return (
        f"; {count(each.left_out, 'row')} left out: no finite logits of {'its' if each.left_out == 1 else 'their'} own"
    )


def _lost(each: Bought) -> str:
    parts = []
    if each.bad:
        parts.append(f"{count(each.bad, 'log-probability').replace('ys', 'ies')} of {each.tokens:,} infinite")
    if each.zero:
        parts.append(f"{each.zero:,} of {count(each.tokens, 'token')} with probability zero (log -inf)")
    if lost_by_hand(each):
        parts.append(f"a softmax by hand {_made_by_hand(each)}")
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


def in_short(report: Report, dtype: str) -> str:
    """Both for a dtype, in a line for where there is room for no more; empty where neither is known."""
    each, taken = report.bought.get(dtype), cost(report.run)
    parts = [f"upcasting {dtype} saves {_saves(each)}"] if each is not None else []
    if taken is not None:
        longest = taken.longer[-1]
        parts.append(f"float32: {sized(longest.float32)} at {longest.tokens:,} tokens")
    return "; ".join(parts)


class Part(NamedTuple):
    """A table of what they buy or cost."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


def tables(report: Report) -> list[Part]:
    """What they buy by dtype, what at which step, and what they cost by length; those that have rows."""
    parts = [
        Part(
            "What float32 logits buy (a softmax in the dtype, against one in float32)", _columns(report), _rows(report)
        ),
        Part(logitsteps.title(report), logitsteps.COLUMNS, logitsteps.rows(report)),
    ]
    taken = cost(report.run)
    if taken is not None:
        narrow = (taken.dtype,) if taken.dtype != REFERENCE else ()
        parts.append(Part("What they cost", ("logits of", "float32", *narrow, "(log scale)"), _lengths(taken)))
    return [part for part in parts if part.rows]


def _columns(report: Report) -> tuple[str, ...]:
    """A text has no loss; with several prompts, one is of whom it says."""
    lost = () if report.run.generation is not None else ("loss", "loss error")
    return ("dtype", *lost, "log-prob. error", "at most", "mass lost", "ranks tied", *_several(report))


def _several(report: Report) -> tuple[str, ...]:
    """A column more where a row has to say which prompt it is about."""
    found = report.bought.values()
    many = len(report.run.prompts) > 1 or report.corpus is not None
    told = any(each.prompt is not None and (many or each.row is not None) for each in found)
    return ("loss of",) if told else ()


def _whose(each: Bought) -> str:
    if each.prompt is None:
        return "-"
    return quoted(each.prompt, _NAME) + (f" row {each.row}" if each.row is not None else "")


def _rows(report: Report) -> list[tuple[str, ...]]:
    """A row a dtype."""
    several = _several(report)
    return [
        (
            dtype,
            *(() if report.run.generation is not None else (number(each.loss), number(each.loss_error))),
            number(each.logprob_rms),
            number(each.logprob_max),
            number(each.mass_lost),
            f"{each.ranks:,} of {10 * each.rows:,}",
            *((_whose(each),) if several else ()),
        )
        for dtype, each in report.bought.items()
    ]


def _lengths(taken: Cost) -> list[tuple[str, ...]]:
    """What of, in float32, in the narrowest dtype where that is another, and a bar on a logarithmic scale."""
    sizes = [each.float32 for each in taken.lengths]
    low, high = math.log(min(sizes)), math.log(max(sizes))
    found = []
    for each in taken.lengths:
        rows = f"{each.rows:,} x " if each.rows > 1 else ""
        own = f" ({rows}{count(each.tokens, 'token')})" if each is taken.whole or rows else ""
        name = quoted(taken.prompt, _NAME) if each is taken.whole and taken.prompt is not None else each.name
        share = (math.log(each.float32) - low) / (high - low) if high > low else 1.0
        narrow = (sized(each.narrow),) if taken.dtype != REFERENCE else ()
        found.append((name + own, sized(each.float32), *narrow, "█" * max(1, round(share * _BAR))))
    return found


def notes(report: Report) -> Iterator[str]:
    """How it was measured, what was really held, and what the upcast takes."""
    if report.bought:
        yield _HOW + (_IN_A_PROMPT if report.run.generation is None else _IN_A_TEXT)
    if any(each.ranks for each in report.bought.values()):
        yield _RANKS
    by_hand = list(_by_hand(report))
    if by_hand:
        yield f"{_BY_HAND}: {'; '.join(by_hand)}."
    taken = cost(report.run)
    if taken is None:
        return
    missing = [dtype for dtype in report.run.dtypes if dtype != REFERENCE and dtype not in report.bought]
    if missing and taken.held is not None:
        yield f"Not compared in {' and '.join(missing)}: {_why_not(report)}."
    if taken.held is not None:
        pieces = f", in {count(taken.pieces, 'piece')}" if taken.pieces > 1 else ""
        yield f"The largest tensor of logits here: {sized(taken.held)}{pieces}."
    if taken.dtype != REFERENCE:
        yield a_step(taken)


def _why_not(report: Report) -> str:
    made = report.run.generation
    if made is None:
        return "no row kept finite logits of its own"
    return "the guard watch is off" if made.unwatched else "no step has logits in it that could be used"


def _by_hand(report: Report) -> Iterator[str]:
    """A softmax of which every step is rounded, as an export or code by hand has it."""
    for dtype, each in report.bought.items():
        said = _made_by_hand(each)
        if not said:
            continue
        where = count(each.unshifted_bad, "position")
        exp = f", and exp of the largest logit overflows on {where} unless it is taken off first"
        yield f"in {dtype} it {said}{exp if each.unshifted_bad else ''}"


def _made_by_hand(each: Bought) -> str:
    said = [f"sums to {1 - each.by_hand:.6g} at worst"] if each.by_hand is not None else []
    if each.by_hand_bad:
        said.append(f"is not finite on {each.by_hand_bad:,} of {count(each.rows, 'position')}")
    return " and ".join(said)
