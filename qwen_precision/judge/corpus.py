"""A report over more prompts than a record holds: who fails, where first, and how near the others are. Pure; no torch.

The prompts of a record are told one by one here (``outcomes``), and which of them stand for all the others
(``standing_for``): whatever is worst anywhere. Both can be taken over many records, in any order.
"""

import math
from typing import NamedTuple

import numpy as np

from qwen_precision.dtypes import DTYPES, REFERENCE
from qwen_precision.judge.columns import Columns
from qwen_precision.judge.findings import Report, limits_of
from qwen_precision.qwen3 import name_of, placed


class Outcome(NamedTuple):
    """What came of a prompt in a dtype."""

    headroom: float | None
    """The least of all operations that compute in the dtype itself; None where none was measured."""
    fails: bool
    where: str
    """The operation that fails first, else the one with the least headroom; a stranger's words are still in it."""


SHARES = (0.0, 0.01, 0.1, 0.5, 0.9)
"""Of the prompts: whose headroom is told."""


def outcomes(report: Report) -> dict[str, list[Outcome]]:
    """By dtype, what came of each prompt of a report, in the order of its run."""
    run, columns = report.run, Columns(report.run, limits_of(report.run.settings))
    first: dict[tuple[str, str], str] = {}
    for finding in report.findings:
        if finding.severity == "error":
            for name in finding.spread.prompts:
                first.setdefault((finding.dtype, name), placed(finding.place.layer, finding.place.name))
    found = {}
    for dtype in run.dtypes:
        rooms = _least(columns, dtype)
        rows = []
        for number, prompt in enumerate(run.prompts):
            room, where = rooms.get(number, (None, ""))
            fails = (dtype, prompt.name) in first
            rows.append(Outcome(room, fails, first.get((dtype, prompt.name), where)))
        found[dtype] = rows
    return found


def _least(columns: Columns, dtype: str) -> dict[int, tuple[float | None, str]]:
    """By prompt: the least headroom of a pass, and of what."""
    passes, _, room = columns.rooms(dtype)
    found: dict[int, tuple[float | None, str]] = {}
    for each, row in zip(passes, room, strict=True):
        if not np.isnan(row).all():
            number = int(np.nanargmin(row))
            site = columns.run.sites[number]
            found[each.prompt] = float(row[number]), placed(site.layer, name_of(site.module, site.op, site.call))
    return found


class Standing(NamedTuple):
    """A prompt that is the worst of its record in something."""

    key: str
    """In what: the same words for the same thing in every record of a checkpoint."""
    score: float
    """How bad it is there; the least of all records stands for them."""
    prompt: int


def standing_for(report: Report) -> list[Standing]:
    """The prompts that stand for all of a report: of each finding, of each layer, of each operation the worst.

    What is judged of these prompts alone is what would be judged of all: the same findings, each at its worst prompt,
    and the same headroom of each layer.
    """
    run, columns = report.run, Columns(report.run, limits_of(report.run.settings))
    numbers = {prompt.name: number for number, prompt in enumerate(run.prompts)}
    found: dict[str, Standing] = {}

    def offer(key: str, score: float, prompt: int) -> None:
        if key not in found or score < found[key].score:
            found[key] = Standing(key, score, prompt)

    for each in report.findings:
        place = each.place
        if each.severity != "info" and place.prompt is not None and place.prompt in numbers:
            # Where one prompt begins and another is only foreseen to fail, the one that begins is told: both stand.
            how = f"{each.kind} {each.predicted:d}{each.cause.kind == 'masked-rows':d}"
            key = f"{each.severity} {how} {each.dtype} {place.module} {place.op} {place.name} {place.expert}"
            size = each.magnitude.reference or 0.0
            offer(key, -size if math.isfinite(size) else -1e300, numbers[place.prompt])
    names = [name_of(site.module, site.op, site.call) for site in run.sites]
    for dtype in (*run.dtypes, *([REFERENCE] if REFERENCE not in run.dtypes else ())):
        passes, _, room = columns.rooms(dtype)
        keys = names if dtype == REFERENCE else [str(site.layer) for site in run.sites]
        if dtype != REFERENCE and DTYPES[dtype].max > 1e30:
            continue
        for site in np.flatnonzero(~np.isnan(room).all(axis=0)) if len(passes) else ():
            least = int(np.nanargmin(room[:, site]))
            offer(f"{dtype} {keys[site]}", float(room[least, site]), passes[least].prompt)
    if not found and run.prompts:
        offer("any", 0.0, 0)
    return list(found.values())
