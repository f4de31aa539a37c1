"""What `qprec report` does between its arguments and its text: open, judge, compare, choose a format, redact."""

import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from qwen_precision.blocks import Folder
from qwen_precision.blocks import reports as folder_reports
from qwen_precision.errors import UsageError
from qwen_precision.judge import Corpus, Report, changes, judge, with_engines, with_fresh_engines
from qwen_precision.record import Run, is_record, parse, read
from qwen_precision.render import FORMATS, View
from qwen_precision.report.bundle import pack, unpack
from qwen_precision.report.redact import redacted, without_paths
from qwen_precision.settings import load_engines

BUNDLE = "bundle"
"""The format that is not one text but a zip of several."""

_SUFFIXES = {suffix: name for name, row in FORMATS.items() for suffix in row.suffixes} | {".zip": BUNDLE}

NAMES = [*FORMATS, BUNDLE]
"""Every word that ``--format`` takes."""


def format_for(asked: str | None, output: Path | None) -> str:
    """The format asked for, or the one the output's suffix stands for, or the table.

    Raises:
        UsageError: a suffix that stands for none, or a file that needs a name.
    """
    name = asked
    if name is None:
        suffix = output.suffix.lower() if output is not None else ""
        if suffix and suffix not in _SUFFIXES:
            raise UsageError(f"-o {output}: no format has the suffix {suffix!r}; give --format {'|'.join(NAMES)}.")
        name = _SUFFIXES.get(suffix, "table")
    if output is None and (name == BUNDLE or FORMATS[name].binary):
        raise UsageError(f"--format {name}: is not text for a terminal; give a file with -o.")
    return name


def open_runs(path: Path, redact: bool = False) -> list[tuple[str, Run]]:
    """Name and run of a record, or of every record in a bundle."""
    data = read(path)
    if data.startswith(b"PK") or path.suffix.lower() == ".zip":
        runs = unpack(data, path)
        named = [(f"{path.name} {number}" if len(runs) > 1 else path.name, run) for number, run in enumerate(runs, 1)]
    else:
        named = [(path.name, parse(data, str(path)))]
    return [(name, redacted(run) if redact else run) for name, run in named]


def view(paths: list[Path], fail_on: str, baseline: Path | None, redact: bool, engines: list[str]) -> View:
    """Open and judge everything; with a verdict for each engine that is named, as ``judge.with_engines`` does.

    Args:
        paths: records and bundles; a folder stands for all the records in it, merged.
        fail_on: of ``settings.FAIL_ON``.
        baseline: what they are compared with: a record for one, a folder for a folder.
        redact: whether texts are taken out.
        engines: names, or files.

    Raises:
        QprecError: an unreadable record.
        UsageError: a baseline for several runs, or one of another verb; no such engine.
    """
    asked = load_engines(engines)
    opened = _judged(paths, redact)
    names = [each.name for _, each in opened]
    if len(set(names)) < len(names):  # a/run.json b/run.json
        opened = [(path, _named(each, str(path) + each.name.removeprefix(path.name))) for path, each in opened]
    if len(opened) == 1 and baseline is None:
        opened = [(path, _named(each, each.name if each.corpus is not None else "")) for path, each in opened]
    reports = [with_engines(each, asked) for _, each in opened]
    if baseline is None:
        return View(tuple(reports), fail_on)
    older = [each for _, each in _judged([baseline], redact)]
    if all(each.corpus is not None for each in (*reports, *older)):
        return _compared(reports, older, fail_on)
    if len(reports) != 1 or len(older) != 1:
        raise UsageError(f"--baseline {baseline}: compares one RUN with one, or a folder with one; give one of each.")
    if older[0].run.verb != reports[0].run.verb:
        verbs = f"a {older[0].run.verb} with a {reports[0].run.verb}"
        raise UsageError(f"--baseline {baseline}: would compare {verbs}; give two runs of the same command.")
    if _shape(older[0]) != _shape(reports[0]):
        sources = f"of {older[0].run.model.source}, another model than {reports[0].run.model.source}"
        raise UsageError(f"--baseline {baseline}: is {sources}; nothing to compare.")
    return View(tuple(reports), fail_on, (changes(older[0], reports[0]),))


def _judged(paths: Sequence[Path], redact: bool) -> list[tuple[Path, Report]]:
    """What each path holds: records beside what the others tell of them; of a folder a report a checkpoint."""
    opened = [(path, None if path.is_dir() else open_runs(path)) for path in paths]
    # By token ids, which redacted are no more the same.
    told = iter(with_fresh_engines([run for _, named in opened if named is not None for _, run in named]))
    found: list[tuple[Path, Report]] = []
    for path, named in opened:
        if named is None:
            found += [(path, _without_texts(each) if redact else each) for each in folder_reports(Folder(path))]
            continue
        runs = [(name, next(told)) for name, _ in named]
        record = shlex.quote(str(path)) if is_record(path) else ""  # prompts are not read out of a bundle
        found += [(path, judge(redacted(run) if redact else run, name=name, record=record)) for name, run in runs]
    return found


def _named(report: Report, name: str) -> Report:
    return replace(report, name=name)


def _without_texts(report: Report) -> Report:
    """A merged report, redacted: names of prompts may be texts as well."""
    assert report.corpus is not None
    across = tuple(each._replace(worst=()) for each in report.corpus.across)
    bought = {dtype: replace(each, prompt=None, row=None) for dtype, each in report.corpus.bought.items()}
    return judge(redacted(report.run), name=report.name, corpus=replace(report.corpus, across=across, bought=bought))


def _shape(report: Report) -> tuple[str, int, int]:
    model = report.run.model
    return model.architecture, model.parameters, model.vocabulary


def _compared(reports: list[Report], older: list[Report], fail_on: str) -> View:
    """Folder against folder, checkpoint by checkpoint; what the older one has not is all new."""
    before = {each.name: each for each in older}
    found = []
    for report in reports:
        nothing = Report({}, [], {}, None, report.run, name="a baseline without it")
        found.append(changes(before.pop(report.name, nothing), report))
    return View(tuple(reports), fail_on, tuple(found), gone=tuple(before))


def _bare(report: Report) -> str:
    """Its name without a path: that of a merged report is the checkpoint's."""
    return report.name if report.corpus is None else re.split(r"[\\/]", report.name.rstrip("\\/"))[-1]


def _placeless(report: Report) -> Corpus | None:
    """What is said of all prompts, without the folder they lie in."""
    corpus = report.corpus
    return replace(corpus, record=Path(corpus.record).name) if corpus is not None else None


def bundled(shown: View) -> bytes:
    """The zip of what is shown; paths are taken out of the runs, and the reports are of what is left."""
    runs = [without_paths(report.run) for report in shown.reports]
    clean: list[Report] = [
        with_engines(
            judge(run, name=_bare(report), corpus=_placeless(report)), [each.engine for each in report.engines]
        )
        for run, report in zip(runs, shown.reports, strict=True)
    ]
    again = View(tuple(clean), shown.fail_on, shown.changes)
    reports = {f"report{FORMATS[name].suffixes[0]}": str(FORMATS[name].render(again)) for name in ("markdown", "html")}
    with suppress(UsageError):  # there is none of a run without its token ids
        reports["repro.py"] = str(FORMATS["repro"].render(again))
    return pack(runs, reports)
