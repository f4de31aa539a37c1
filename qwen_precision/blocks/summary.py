"""What is kept of a record beside it, so that ten thousand of them are merged in seconds: each prompt in a line.

It is made from the judged record and nothing else, and names it by its size and a hash of its ends: where these do not
fit, or another version judged, it is made again.
"""

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from qwen_precision.blocks.plan import Block, Plan
from qwen_precision.dtypes import DTYPES
from qwen_precision.errors import QprecError
from qwen_precision.files import Unreadable, read_small, write_atomically
from qwen_precision.judge import Bought, Report, Sums, bought, outcomes, standing_for, sums
from qwen_precision.record import LogitsCost, Many, Run, check_count
from qwen_precision.settings import DIGITS
from qwen_precision.version import __version__

SUFFIX = ".summary"
"""Of a summary, in place of the record's ``.json``."""
_MOST = 16 << 20
_MOST_VALUES = 1_000_000  # four a prompt and dtype: a record has 64 prompts, or as many as --block says
_END = 16 << 10
_MOST_RANKS = 1 << 20
_NUMBER = Annotated[int, Field(ge=0, le=2**63 - 1)]


class Row(BaseModel):
    """What came of a prompt in a dtype."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    room: float | None
    """Least headroom; null where none was measured, -1 where there is no end to it."""
    fails: bool
    where: str


class Summary(BaseModel):
    """Of one record."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")  # a loss may be infinite

    summary: Literal[1] = 1
    """Version of this form."""
    version: str = __version__
    """Of who judged."""
    size: _NUMBER
    ends: str
    """SHA-256 of its first and last 16 KiB: who wrote it, when, and how long it took. All of ten thousand records
    would be gigabytes to read."""
    source: str
    revision: str | None
    weights: str
    settings: str
    """Digest of settings and version."""
    block: Block
    share: tuple[_NUMBER, _NUMBER]
    """Number, from 0, and count of the ranks that it was measured under."""
    names: Many[str]
    prompts: Many[_NUMBER]
    """Hash of each, as the corpus has it."""
    counted: Many[_NUMBER]
    """Numbers of those whose name only counts."""
    unfit: dict[str, str]
    """By hash: prompts of the block that the checkpoint does not take, and why."""
    rows: dict[str, Many[Row]]
    """By dtype, one a prompt."""
    sums: dict[str, Sums]
    """By dtype: what precision is made of."""
    bought: dict[str, Bought]
    """By dtype: what a softmax in float32 is worth."""
    logits: LogitsCost | None
    """What logits took."""
    standing: Many[tuple[str, float, _NUMBER]]
    """See ``judge.standing_for``."""


def summary_of(report: Report, data: bytes, share: tuple[int, int]) -> Summary:
    """The summary of a judged record.

    Args:
        report: of a run that was measured for a folder: its settings hold the block.
        data: the record as it is written.
        share: as above.

    Raises:
        ValueError: it was not measured for a folder.
    """
    run = report.run
    about = block_of(run)
    block = Block.model_validate(about["block"])
    return Summary(
        size=len(data),
        ends=_ends(data[:_END], data[-_END:]),
        source=run.model.source,
        revision=run.model.revision,
        weights=about["weights"],
        settings=about["settings"],
        block=block,
        share=share,
        names=[prompt.name for prompt in run.prompts],
        prompts=[int(key, 16) for key in about["prompts"]],
        counted=about["counted"],
        unfit=about["unfit"],
        rows={
            dtype: [Row(room=_finite(each.headroom), fails=each.fails, where=each.where) for each in rows]
            for dtype, rows in outcomes(report).items()
        },
        # A part of a sweep runs a prompt of the corpus once more.
        sums=sums(run) if block.kind == "prompts" else {},
        bought=_told(report, about["counted"]) if block.kind == "prompts" else {},
        logits=run.logits,
        standing=[(each.key, max(-1e300, min(each.score, 1e300)), each.prompt) for each in standing_for(report)],
    )


def _told(report: Report, counted: Sequence[int]) -> dict[str, Bought]:
    """What float32 logits are worth; a name that only counts may be another's in the next plan."""
    names = {report.run.prompts[number].name for number in counted}
    found = bought(report.run)
    return {dtype: replace(each, prompt=None) if each.prompt in names else each for dtype, each in found.items()}


KEY = "block"
"""Among a run's settings: for which block of which plan it was measured."""


class Told(NamedTuple):
    """What the corpus says of a prompt."""

    key: str
    """Its hash."""
    counted: bool
    """Whether its name only counts."""


def for_block(
    run: Run, weights: str, plan: Plan, block: Block, told: Mapping[str, Told], unfit: Mapping[str, str] | None = None
) -> Run:
    """A run that says for which block it was measured.

    Args:
        run: of its prompts.
        weights: of which checkpoint, see ``weights_id``.
        plan: that the block is of.
        block: the block.
        told: of each prompt, by name.
        unfit: prompts that the checkpoint does not take, by hash, and why.
    """
    said = {
        "weights": weights,
        "settings": plan.settings_digest,
        "block": block.model_dump(),
        "prompts": [told[prompt.name].key for prompt in run.prompts],
        "counted": [number for number, prompt in enumerate(run.prompts) if told[prompt.name].counted],
        "unfit": dict(unfit or {}),
    }
    return run.model_copy(update={"settings": {**run.settings, KEY: said}})


def block_of(run: Run) -> dict[str, Any]:
    """What ``for_block`` wrote.

    Raises:
        ValueError: it is not there.
    """
    said = run.settings.get(KEY)
    if not isinstance(said, dict) or not said.keys() >= {"weights", "settings", "block", "prompts", "counted", "unfit"}:
        raise ValueError("was not measured for a folder")
    keys = said["prompts"]
    if not isinstance(keys, list) or not all(isinstance(key, str) and _KEY.fullmatch(key) for key in keys):
        raise ValueError("names its prompts in another way than this version does")
    return said


_KEY = re.compile(f"[0-9a-f]{{{DIGITS}}}")


def without_block(run: Run) -> Run:
    """A run without that: merged, it is of no block."""
    return run.model_copy(update={"settings": {name: item for name, item in run.settings.items() if name != KEY}})


def _finite(value: float | None) -> float | None:
    if value is None or value != value:
        return None
    return -1.0 if value == float("inf") else value


def save_summary(summary: Summary, record: Path) -> None:
    """Write it beside its record.

    Raises:
        QprecError: it cannot be written.
    """
    write_atomically(record.with_suffix(SUFFIX), summary.model_dump_json() + "\n")


def read_summary(record: Path) -> Summary | None:
    """The summary beside a record; None where there is none that fits."""
    try:
        data = read_small(record.with_suffix(SUFFIX), _MOST)
        check_count(data, _MOST_VALUES)
        found = Summary.model_validate_json(data)
        if found.version != __version__ or not _is_sound(found):
            return None
        with record.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(_END)
            file.seek(max(0, size - _END))
            last = file.read(_END)
        return found if size == found.size and _ends(first, last) == found.ends else None
    except (OSError, Unreadable, ValueError, QprecError):
        return None


def _ends(first: bytes, last: bytes) -> str:
    return hashlib.sha256(first + last).hexdigest()


def _is_sound(summary: Summary) -> bool:
    count = len(summary.names)
    lengths = {len(summary.prompts), *map(len, summary.rows.values())}
    rank, of = summary.share
    known = {*summary.rows, *summary.sums, *summary.bought} <= set(DTYPES) and rank < of <= _MOST_RANKS
    numbers = (*summary.counted, *(number for _, _, number in summary.standing))
    finite = all(math.isfinite(score) for _, score, _ in summary.standing)
    return known and finite and lengths == {count} and all(number < count for number in numbers)
