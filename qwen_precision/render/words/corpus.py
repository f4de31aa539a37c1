"""What a report over a folder of records says of all its prompts: who fails and where, how near the others are."""

import math
from collections.abc import Iterator, Sequence

from qwen_precision.dtypes import DTYPES, narrowest
from qwen_precision.judge import Across, Report
from qwen_precision.render.text import count, quoted, room

_PLACES = 4
_WORST = 3


def in_all(report: Report) -> int:
    """How many prompts a report is about."""
    return report.corpus.prompts if report.corpus is not None else len(report.run.prompts)


def failing(report: Report, dtype: str) -> int | None:
    """How many prompts of a folder fail in a dtype; None of a report over one record, whose findings name them."""
    corpus = report.corpus
    return next((each.failing for each in corpus.across if each.dtype == dtype), 0) if corpus is not None else None


def across(report: Report) -> Iterator[tuple[str, str]]:
    """A label and a sentence: for each dtype who fails where, the spread of headroom, the worst prompts by name."""
    corpus = report.corpus
    if corpus is None:
        return
    there, prompts = corpus.blocks - corpus.missing_blocks, count(corpus.prompts, "prompt")
    yield "seen", f"{prompts} in {there:,} of {count(corpus.blocks, 'block')}"
    if len(corpus.sources) > 1:
        more = f" and {len(corpus.sources) - 4} more" if len(corpus.sources) > 4 else ""
        yield "also", f"the same weights as {', '.join(corpus.sources[1:4])}{more}"
    if corpus.replaced:
        said = count(corpus.replaced, "prompt")
        yield "left out", f"{said} measured on the weights that were there before under this name"
    for each in corpus.across:
        if each.failing:
            yield f"{each.dtype} fails", f"on {each.failing:,} of {prompts}: {_places(each)}"
        if DTYPES[each.dtype].max < 1e30 and each.quantiles:
            yield f"{each.dtype} room", _quantiles(each)
            worst = (f"{quoted(name, 24)} {room(left)}" for name, left in each.worst[:_WORST])
            yield f"{each.dtype} worst", ", ".join(worst)
    if corpus.left_out:
        said = count(corpus.left_out, "more prompt")
        yield "shown", f"findings and rooms of layers leave {said} out that are worst in something"


def beside(reports: Sequence[Report]) -> list[list[str]]:
    """Several checkpoints of a folder, a row each below a row of headings; nothing where nothing is merged."""
    if len(reports) < 2 or all(report.corpus is None for report in reports):
        return []
    dtypes = [name for name in DTYPES if any(name in report.verdict for report in reports)]
    rows = [["checkpoint", *dtypes, "least headroom", "prompts that fail"]]
    for report in reports:
        narrow = narrowest(report.verdict) or ""
        rooms, fails = report.headroom.get(narrow) or [], failing(report, narrow)
        least = room(rooms[0].headroom) if rooms else "-"
        counted = f"{fails:,} of {in_all(report):,}" if fails is not None else "-"
        rows.append([report.name, *((report.verdict.get(name) or "-").upper() for name in dtypes), least, counted])
    return rows


def counted(report: Report) -> str:
    """How many prompts fail in each dtype, of how many that were seen; nothing of a report over one record."""
    if report.corpus is None:
        return ""
    if not report.corpus.prompts:
        return "no prompt was seen"
    seen = count(report.corpus.prompts, "prompt")
    return "; ".join(f"{dtype}: {failing(report, dtype):,} of {seen} fail" for dtype in report.verdict)


def checkpoints(reports: Sequence[Report]) -> str:
    """How many checkpoints of a folder fail in each dtype; nothing where there is one, or nothing is merged."""
    if len(reports) < 2 or any(report.corpus is None for report in reports):
        return ""
    said = []
    for dtype in DTYPES:
        verdicts = [report.verdict[dtype] for report in reports if dtype in report.verdict]
        words = [
            f"{verdicts.count(word):,} {word.upper()}" for word in ("fail", "risk", "incomplete") if word in verdicts
        ]
        said += [f"{dtype}: {', '.join(words) or 'none fails'}"] if verdicts else []
    return f"{len(reports):,} checkpoints; {'; '.join(said)}"


def spread(report: Report, dtype: str | None) -> str:
    """The spread of headroom in a dtype, in a sentence; empty where there is none to tell."""
    found = report.corpus.across if report.corpus is not None and report.corpus.prompts > 1 else ()
    return next((_quantiles(each) for each in found if each.dtype == dtype and each.quantiles), "")


def fails_at(report: Report, dtype: str) -> str:
    """Where the prompts of a folder fail first in a dtype; empty where none does."""
    found = report.corpus.across if report.corpus is not None else ()
    return next((_places(each) for each in found if each.dtype == dtype and each.failing), "")


def _places(each: Across) -> str:
    said = [f"{number:,} first in {name}" for name, number in each.places[:_PLACES]]
    rest = sum(number for _, number in each.places[_PLACES:])
    return "; ".join(said + ([f"{rest:,} elsewhere"] if rest else []))


def _quantiles(each: Across) -> str:
    """The least, and what so many in a hundred do not exceed."""
    words = {0.0: "least", 0.5: "half at most"}
    said = [f"{words.get(share, f'{share:.0%} at most')} {room(left)}" for share, left in each.quantiles]
    known = [left for _, left in each.quantiles if math.isfinite(left)]
    return ", ".join(said) if known else "all"
