"""JUnit XML, for CI servers: a suite a dtype and prompt, a case a check of ``CHECKS``, the passing ones too.

The shape is what Jenkins, GitLab and GitHub's test reporters read: ``testsuites/testsuite/testcase`` with counts on
both. What is not allowed in XML 1.0 is spelled out before it gets here (``text.safe``).
"""

from collections.abc import Iterator
from dataclasses import replace
from xml.etree import ElementTree

from qwen_precision.dtypes import REFERENCE, RESCUED
from qwen_precision.judge import CHECKS, Changes, Finding, Report, Subject, exit_code_of
from qwen_precision.qwen3 import placed
from qwen_precision.record import Exported
from qwen_precision.render.text import safe
from qwen_precision.render.view import View
from qwen_precision.render.words import corpus, engines, logits
from qwen_precision.settings import FAILING

_MOST_OTHERS = 1000
"""Failing prompts of a folder that are cases without their findings."""


def render_junit(view: View) -> str:
    """All reports as one document; what fails a case is what would give exit code 1."""
    root = ElementTree.Element("testsuites", name="qprec")
    for report in view.reports:
        exported = _exported(view, report)
        for name, subject, findings in _suites(report):
            kept = [each for each in findings if exported is None or each.dtype != RESCUED]
            _suite(root, name, subject, findings, kept, view, view.against(report))
        if exported is not None:
            _rescued(root, report, exported, view)
        _others(root, report, view)
        _finished(root, report)
    several = corpus.checkpoints(view.reports)
    if several:
        suite = ElementTree.SubElement(root, "testsuite", name="checkpoints", tests="1", failures="0", errors="0")
        case = ElementTree.SubElement(suite, "testcase", name="compared", classname="checkpoints", time="0")
        ElementTree.SubElement(case, "system-out").text = several
    for key in ("tests", "failures", "errors"):
        root.set(key, str(sum(int(suite.get(key, "0")) for suite in root)))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _suites(report: Report) -> Iterator[tuple[str, Subject, list[Finding]]]:
    """Name of each suite, what it is about, and the findings that belong there."""
    run = report.run
    head = f"{safe(report.name)} " if report.name else ""
    for dtype in report.verdict:
        mine = [finding for finding in report.findings if finding.dtype == dtype]
        if run.generation is not None:
            yield f"{head}{dtype} generation", "generation", mine
            continue
        for prompt in run.prompts:
            if any(each.dtype == dtype and run.prompts[each.prompt].name == prompt.name for each in run.passes):
                here = [f for f in mine if prompt.name in (f.spread.prompts or (f.place.prompt,))]
                yield f"{head}{dtype} {safe(prompt.name)}", "prompt", here
        whole = [finding for finding in mine if finding.place.prompt is None]
        yield f"{head}{dtype} weights", "weights", whole
        if run.reference and dtype != REFERENCE:
            yield f"{head}{dtype} precision", "precision", whole
        if dtype in report.bought or any(finding.kind == "advice" for finding in whole):
            yield f"{head}{dtype} logits", "logits", whole


def _exported(view: View, report: Report) -> Exported | None:
    """The rescaled checkpoint that stands for the one probed; not against a baseline, where what is new counts."""
    return report.run.rescue.exported if report.run.rescue is not None and not view.changes else None


def _rescued(root: ElementTree.Element, report: Report, exported: Exported, view: View) -> None:
    """The exported checkpoint, which counts in place of what was found in the one probed."""
    name = f"{safe(report.name)} {RESCUED} rescued".strip()
    alone = replace(report, verdict={})  # no other dtype's verdict is this suite's
    failed = exit_code_of(alone, view.fail_on) == 1
    suite = ElementTree.SubElement(root, "testsuite", name=name, tests="1", failures=str(int(failed)), errors="0")
    case = ElementTree.SubElement(suite, "testcase", name="rescue", classname=name, time="0")
    said = f"{safe(exported.verdict)}, {'verified' if exported.verified else 'not verified'}"
    why = f": {safe(exported.why, 500)}" if exported.why is not None else ""
    if failed:
        ElementTree.SubElement(case, "failure", type="rescue", message=f"the exported checkpoint is {said}{why}")
    else:
        ElementTree.SubElement(case, "system-out").text = f"the exported checkpoint is {said}{why}"


def _suite(
    root: ElementTree.Element,
    name: str,
    subject: Subject,
    findings: list[Finding],
    counted: list[Finding],
    view: View,
    changes: Changes | None,
) -> None:
    """A case a check, whether it found something or not; of what it found, only what is counted can fail it."""
    cases = {check: row.kinds for check, row in CHECKS.items() if subject in row.subjects}
    suite = ElementTree.SubElement(root, "testsuite", name=name, tests=str(len(cases)), errors="0")
    new = None if changes is None else [*changes.new, *changes.risen]
    failures = 0
    for check, kinds in cases.items():
        case = ElementTree.SubElement(suite, "testcase", name=check, classname=name, time="0")
        mine = [finding for finding in findings if finding.kind in kinds]
        bad = [f for f in mine if f in counted and f.severity in FAILING[view.fail_on] and (new is None or f in new)]
        if bad:
            failures += 1
            failure = ElementTree.SubElement(case, "failure", type=bad[0].kind, message=_line(bad[0]))
            failure.text = "\n".join(map(_in_full, bad))
        rest = [finding for finding in mine if finding not in bad]
        if rest:
            ElementTree.SubElement(case, "system-out").text = "\n".join(map(_in_full, rest))
    suite.set("failures", str(failures))


def _others(root: ElementTree.Element, report: Report, view: View) -> None:
    """Of a folder each prompt that fails and whose record was not opened, as a case; what is new is not known of it."""
    told = {prompt.name for prompt in report.run.prompts}
    for across in report.corpus.across if report.corpus is not None and not view.changes else ():
        names = [each for each in across.fail if each not in told]
        bad, name = "error" in FAILING[view.fail_on], f"{safe(report.name)} {across.dtype} other prompts".strip()
        shown = names[:_MOST_OTHERS]
        if not shown:
            continue
        tests, failures = str(len(shown)), str(len(shown) if bad else 0)
        suite = ElementTree.SubElement(root, "testsuite", name=name, tests=tests, failures=failures, errors="0")
        for each in shown:
            case = ElementTree.SubElement(suite, "testcase", name=safe(each), classname=name, time="0")
            said = f"fails in {across.dtype}; where is in its record: qprec report of the .json file alone"
            if bad:
                ElementTree.SubElement(case, "failure", type="overflow", message=said)
            else:
                ElementTree.SubElement(case, "system-out").text = said
        if names[_MOST_OTHERS:]:
            ElementTree.SubElement(suite, "system-out").text = f"{len(names) - _MOST_OTHERS:,} more prompts fail"


def _finished(root: ElementTree.Element, report: Report) -> None:
    """A run that stopped early is an error of its own: what was not reached is not a pass."""
    name = f"{safe(report.name)} run".strip()
    suite = ElementTree.SubElement(
        root, "testsuite", name=name, tests="1", failures="0", errors=str(int(bool(report.stopped)))
    )
    told = dict(_properties(report))
    if told:
        properties = ElementTree.SubElement(suite, "properties")
        for key, said in told.items():
            ElementTree.SubElement(properties, "property", name=key, value=safe(said, 500))
    case = ElementTree.SubElement(suite, "testcase", name="finished", classname=name, time="0")
    if report.stopped:
        ElementTree.SubElement(case, "error", type="stopped", message=safe(report.stopped))
    if report.corpus is not None:
        lines = [corpus.counted(report), *report.corpus.do]
        ElementTree.SubElement(case, "system-out").text = "\n".join(safe(each, 600) for each in lines)


def _properties(report: Report) -> Iterator[tuple[str, str]]:
    """What is no test of this run: what a setting is worth, what is so elsewhere, how many prompts a folder has."""
    yield from ((f"logits.{about}", line) for about, line in logits.in_brief(report))
    for each in report.engines:
        yield f"engine.{safe(each.engine.name, 40)}", f"{each.verdict.upper()}: {engines.told(report, each)}"
    told = report.corpus
    if told is not None:
        yield "prompts", str(told.prompts)
        yield "blocks", str(told.blocks)
        yield "blocks.missing", str(told.missing_blocks)
        for dtype in report.verdict:
            yield f"prompts.failing.{dtype}", str(corpus.failing(report, dtype))


def _line(finding: Finding) -> str:
    return f"{placed(finding.place.layer, safe(finding.place.name))}: {safe(finding.cause.sentence, 500)}"


def _in_full(finding: Finding) -> str:
    """With what to do."""
    return f"{_line(finding)} {safe(finding.cause.advice, 500)}".rstrip()
