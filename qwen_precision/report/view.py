"""What `qprec report` does between its arguments and its text: open, judge, compare, choose a format, redact."""

import os
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
from qwen_precision.report.bundle import Merged, pack, unpack
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


def open_runs(path: Path) -> list[tuple[str, Run, Corpus | None]]:
    """Name and run of a record, or of every record in a bundle; of a folder's with what came of all its prompts."""
    data = read(path)
    if not data.startswith(b"PK") and path.suffix.lower() != ".zip":
        return [(path.name, parse(data, str(path)), None)]
    runs = unpack(data, path)
    if all(merged is not None for _, merged in runs):
        return [(merged.name, run, merged.corpus) for run, merged in runs if merged is not None]
    names = [f"{path.name} {number}" if len(runs) > 1 else path.name for number in range(1, len(runs) + 1)]
    return [(name, run, merged and merged.corpus) for name, (run, merged) in zip(names, runs, strict=True)]


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
        opened = [(path, _named(each, _full(path, each))) for path, each in opened]
    if len(opened) == 1 and baseline is None:
        opened = [(path, _named(each, each.name if each.corpus is not None else "")) for path, each in opened]
    reports = [with_engines(each, asked) for _, each in opened]
    if baseline is None:
        return View(tuple(reports), fail_on)
    older = [each for _, each in _judged([baseline], redact)]
    if all(each.corpus is not None for each in (*reports, *older)):
        return _compared(reports, older, fail_on, baseline)
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
    told = iter(with_fresh_engines([run for _, named in opened if named is not None for _, run, _ in named]))
    found: list[tuple[Path, Report]] = []
    for path, named in opened:
        if named is None:
            mine = folder_reports(Folder(path))
        else:
            record = shlex.quote(str(path)) if is_record(path) else ""  # prompts are not read out of a bundle
            mine = [judge(next(told), name=name, corpus=corpus, record=record) for name, _, corpus in named]
        found += [(path, _without_texts(each) if redact else each) for each in mine]
    return found


def _named(report: Report, name: str) -> Report:
    return replace(report, name=name)


def _full(path: Path, report: Report) -> str:
    """A name that says which of two files or folders of the same name it is of."""
    return f"{path}: {report.name}" if report.corpus is not None else str(path) + report.name.removeprefix(path.name)


def _without_texts(report: Report) -> Report:
    """A report of a redacted run; of a merged one the names of prompts may be texts as well."""
    corpus = report.corpus
    if corpus is not None:
        across = tuple(each._replace(worst=(), fail=()) for each in corpus.across)
        bought = {dtype: replace(each, prompt=None, row=None) for dtype, each in corpus.bought.items()}
        corpus = replace(corpus, across=across, bought=bought)
    return judge(redacted(report.run), name=report.name, corpus=corpus, record=report.record)


def _shape(report: Report) -> tuple[str, int, int]:
    model = report.run.model
    return model.architecture, model.parameters, model.vocabulary


def _compared(reports: list[Report], older: list[Report], fail_on: str, baseline: Path) -> View:
    """Folder against folder, checkpoint by checkpoint; what the older one has not is all new."""
    found = []
    for report in reports:
        nothing = Report({}, [], {}, None, report.run, name="a baseline without it")
        found.append(changes(_before(report, reports, older, baseline) or nothing, report))
    gone = [each.name for each in older if not any(_is_of(each, report) for report in reports)]
    return View(tuple(reports), fail_on, tuple(found), gone=tuple(gone))


def _before(report: Report, reports: list[Report], older: list[Report], baseline: Path) -> Report | None:
    """The same checkpoint in the older folder, with the same settings; with others if there is only one of each."""
    named = [each for each in older if _is_of(each, report)]
    alike = [each for each in named if _settings(each) == _settings(report)]
    if alike:
        return alike[-1]  # of two versions of qprec the newer one
    if len(named) > 1 or (named and sum(_is_of(named[0], each) for each in reports) > 1):
        why = f"holds {named[0].name}, and none of it with the settings of {report.name}"
        raise UsageError(f"--baseline {baseline}: {why}; compare folders in which a checkpoint has one setting.")
    return named[0] if named else None


def _settings(report: Report) -> str:
    return report.corpus.settings if report.corpus is not None else ""


def _is_of(one: Report, other: Report) -> bool:
    """Whether two merged reports are of one checkpoint: by what was typed, whatever its spelling, else by its name."""
    names = [{os.path.normpath(source) for source in each.corpus.sources} for each in (one, other) if each.corpus]
    return bool(set.intersection(*names)) or one.name == other.name


def _bare(report: Report) -> str:
    """Its name without a path: that of a merged report is the checkpoint's."""
    return report.name if report.corpus is None else re.split(r"[\\/]", report.name.rstrip("\\/"))[-1]


def _placeless(report: Report) -> Corpus | None:
    """What is said of all prompts, without the folder they lie in."""
    corpus = report.corpus
    if corpus is None:
        return None
    sources = tuple(dict.fromkeys(re.split(r"[\\/]", source.rstrip("\\/"))[-1] for source in corpus.sources))
    return replace(corpus, record=Path(corpus.record).name, sources=sources)


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
    merged = [Merged(each.name, each.corpus) if each.corpus is not None else None for each in clean]
    return pack(list(zip(runs, merged, strict=True)), reports)
