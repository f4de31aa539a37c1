"""What a script has to show: the finding, the ids and rows that show it, and how the forward is made. Pure."""

import re
from dataclasses import dataclass
from typing import Literal

from qwen_precision.dtypes import narrowest
from qwen_precision.errors import UsageError
from qwen_precision.judge import Finding, Report
from qwen_precision.record import FILTERED, Model, Prompt, ScaleFault, Weight, bad_trips, failing_step
from qwen_precision.render.view import View
from qwen_precision.settings import at_step

Asserts = Literal["answer", "modules", "spread", "scores"]
"""That the answer is finite; where its last token's was, that what every module gives is; that the logits are not all
equal; that sampling leaves something to draw from."""


@dataclass(frozen=True)
class Case:
    """One script."""

    report: Report
    finding: Finding | None
    """None where nothing was found."""
    dtype: str
    prompt: Prompt
    rows: tuple[int, ...] = ()
    """Whose numbers count; none for all."""
    step: int = 0
    """So many of the last ids are given one by one, from the cache …"""
    chunk: int = 0
    """… and the others so many at once; 0 for all."""
    replay: bool = False
    """Whether the forward is made as generation makes it, with a cache."""
    asserts: Asserts = "answer"

    @property
    def verdict(self) -> str:
        """Of the dtype."""
        return self.report.verdict[self.dtype]

    @property
    def padded(self) -> bool:
        """Whether a row has pad positions."""
        return any(row.padding for row in self.prompt.rows)

    @property
    def sifted(self) -> bool:
        """Whether what modules give has to be looked at by row and position: not where it is padding that fails."""
        token = self.finding.place.token if self.finding is not None else None
        return (self.padded or bool(self.rows)) and not (token is not None and token.padding)

    @property
    def told(self) -> dict[str, str]:
        """What was chosen, by what it was about."""
        return {choice.what: choice.value for choice in self.report.run.choices}

    @property
    def causal(self) -> bool:
        """Whether it is a language model of a known family: with logits, and with the arguments that those take."""
        return self.told.get("memory") != "whole" and self.told.get("lm_head") != "not run"

    @property
    def damaged(self) -> Weight | ScaleFault | None:
        """The tensor of the files that is at fault by itself, where it can be read as it is."""
        if self.finding is None or self.finding.kind not in ("weight-nonfinite", "weight-overflow", "bad-scale"):
            return None
        run = self.report.run
        if gguf_of(run.model) is not None:
            return None  # no tensor of it can be read as it is
        if self.finding.kind == "bad-scale":
            return next((each for each in run.scale_faults if self._about(each)), None)
        weight = next((each for each in run.weights if self._about(each)), None)
        if weight is None or "weights" not in self.told:
            return weight
        # Quantised, the files hold no tensor of that name; scales of it they may.
        mine = [each for each in run.scale_faults if each.parameter == weight.parameter]
        return next((each for each in mine if each.kind in ("nan", "infinite", "unwritten")), None)

    def _about(self, each: Weight | ScaleFault) -> bool:
        said = self.finding.cause.sentence if self.finding is not None else ""
        return f"{each.name} in {each.file} " in said


def gguf_of(model: Model) -> tuple[str, str] | None:
    """Where a model in a GGUF file lies, as transformers asks for it: a folder or a hub id, and the file there."""
    name = model.files[0].name if model.files else ""
    if not name.lower().endswith(".gguf"):
        return None
    if not model.source.lower().endswith(".gguf"):
        return model.source, name
    if model.revision is None:
        return re.sub(r"[^\\/]*$", "", model.source) or ".", name
    owner, repository, *inside = model.source.split("/")
    return f"{owner}/{repository}", "/".join([*inside[:-1], name])


def case_of(view: View) -> Case:
    """What the script of a view shows.

    Raises:
        UsageError: it was redacted, or holds no prompt.
    """
    report = view.shown
    run = report.run
    where = f"--format repro: {report.name or 'the run'}"
    if run.redacted:
        raise UsageError(f"{where} is redacted, its token ids are made up; give the record as it was saved.")
    if not run.dtypes or not any(row.ids for prompt in run.prompts for row in prompt.rows):
        raise UsageError(f"{where} holds no token ids to run; give one of a probe or a generation that began.")
    finding = _first(report)
    dtype = finding.dtype if finding is not None else narrowest(run.dtypes) or run.dtypes[0]
    if run.generation is not None:
        return _generated(report, finding, dtype)
    return _probed(report, finding, dtype)


def _first(report: Report) -> Finding | None:
    """The first error, else the first warning, of a dtype that was asked for."""
    told = [each for each in report.findings if each.dtype in report.verdict and each.severity != "info"]
    return next((each for each in told if each.severity == "error"), told[0] if told else None)


def _probed(report: Report, finding: Finding | None, dtype: str) -> Case:
    prompts = report.run.prompts
    tightest = report.headroom[dtype][0].prompt if report.headroom[dtype] else 0
    name = finding.place.prompt if finding is not None else None
    number = next((n for n, each in enumerate(prompts) if each.name == name), tightest)
    prompt = prompts[number]
    if finding is not None and finding.kind == "unseen-failure" and prompt.failed is not None:
        rows = () if finding.place.row is None else (finding.place.row,)
        return Case(report, finding, dtype, prompt, rows, prompt.failed.step, prompt.failed.chunk, replay=True)
    finite = finding is not None and finding.kind in ("overflow", "nan") and _came_out_finite(report, dtype, number)
    return Case(report, finding, dtype, prompt, asserts="modules" if finite else "answer")


def _came_out_finite(report: Report, dtype: str, prompt: int) -> bool:
    """Whether every row of a pass ended in finite logits, from a stream of its own: then they may not tell."""
    passes = [each for each in report.run.passes if (each.dtype, each.prompt) == (dtype, prompt)]
    return any(each.top1 and None not in each.top1 and not each.reseeded for each in passes)


def _generated(report: Report, finding: Finding | None, dtype: str) -> Case:
    run = report.run
    made, prompt = run.generation, run.prompts[0]
    row = finding.place.row if finding is not None else None
    if made is None or finding is None or row is None:
        return Case(report, finding, dtype, prompt)
    found = failing_step(made, row)
    step = found if found is not None else finding.place.step or 0
    failing = [each.row for each in made.rows if failing_step(made, each.row) == step]
    prompt = at_step(made, prompt.rows, step, failing)
    failed = prompt.failed
    rows = tuple(failed.rows) if failed is not None and row in failed.rows else (row,)
    rows = rows if set(rows) < set(range(len(prompt.rows))) else ()
    chunk = failed.chunk if failed is not None else 0
    return Case(
        report, finding, dtype, prompt, rows, step, chunk, bool(step or chunk), _sampled(report, finding, step, row)
    )


def _sampled(report: Report, finding: Finding, step: int, row: int) -> Asserts:
    """What can be asserted of the step of a generation at which a row failed."""
    made = report.run.generation
    kinds = {trip.kind for trip in bad_trips(made.trips if made else (), row) if trip.step == step}
    if kinds and kinds <= {"flat"}:
        return "spread"
    filtered = bool(kinds) and kinds <= set(FILTERED)
    drawn = filtered or (not kinds and finding.kind == "sampling-error")
    return "scores" if drawn and report.verdict[finding.dtype] == "fail" else "answer"
