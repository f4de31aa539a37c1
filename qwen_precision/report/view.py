"""What `qprec report` does between its arguments and its text: open, judge, compare, choose a format, redact."""

from contextlib import suppress
from pathlib import Path

from qwen_precision.errors import UsageError
from qwen_precision.judge import Report, changes, judge, with_engines, with_fresh_engines
from qwen_precision.record import Run, parse, read
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

    Raises:
        QprecError: an unreadable record.
        UsageError: a baseline for several runs, or one of another verb; no such engine.
    """
    asked = load_engines(engines)
    opened = [(path, name, run) for path in paths for name, run in open_runs(path)]
    told = with_fresh_engines([run for _, _, run in opened])  # by token ids, which redacted are no more the same
    told = [redacted(run) for run in told] if redact else told
    named = [(name, run) for (_, name, _), run in zip(opened, told, strict=True)]
    if len({name for name, _ in named}) < len(named):  # a/run.json b/run.json
        longer = [str(path) + name.removeprefix(path.name) for path, name, _ in opened]
        named = list(zip(longer, told, strict=True))
    alone = len(named) == 1 and baseline is None
    reports = [with_engines(judge(run, name="" if alone else name), asked) for name, run in named]
    if baseline is None:
        return View(tuple(reports), fail_on)
    older = [judge(run, name=name) for name, run in open_runs(baseline, redact)]
    if len(reports) != 1 or len(older) != 1:
        raise UsageError(f"--baseline {baseline}: compares one RUN with one; give one of each.")
    if older[0].run.verb != reports[0].run.verb:
        verbs = f"a {older[0].run.verb} with a {reports[0].run.verb}"
        raise UsageError(f"--baseline {baseline}: would compare {verbs}; give two runs of the same command.")
    old, new = older[0].run.model, reports[0].run.model
    if (old.architecture, old.parameters, old.vocabulary) != (new.architecture, new.parameters, new.vocabulary):
        raise UsageError(
            f"--baseline {baseline}: is of {old.source}, another model than {new.source}; nothing to compare."
        )
    return View(tuple(reports), fail_on, changes(older[0], reports[0]))


def bundled(shown: View) -> bytes:
    """The zip of what is shown; paths are taken out of the runs, and the reports are of what is left."""
    runs = [without_paths(report.run) for report in shown.reports]
    clean: list[Report] = [
        with_engines(judge(run, name=report.name), [each.engine for each in report.engines])
        for run, report in zip(runs, shown.reports, strict=True)
    ]
    again = View(tuple(clean), shown.fail_on, shown.changes)
    reports = {f"report{FORMATS[name].suffixes[0]}": str(FORMATS[name].render(again)) for name in ("markdown", "html")}
    with suppress(UsageError):  # there is none of a run without its token ids
        reports["repro.py"] = str(FORMATS["repro"].render(again))
    return pack(runs, reports)
