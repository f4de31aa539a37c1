"""Every format over the same few runs: golden, inert, the same exit code, read by the tools it is made for."""

import io
import json
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest

from qwen_precision.judge.checks import judge
from qwen_precision.judge.compare import changes
from qwen_precision.judge.findings import rescue_exit_code
from qwen_precision.judge.nextcommand import next_command, next_rescue, same_again
from qwen_precision.record.file import to_json
from qwen_precision.record.run import Choice, Run
from qwen_precision.render import FORMATS, View, one
from qwen_precision.render.markdown import LONGEST
from qwen_precision.report.bundle import unpack
from qwen_precision.report.redact import redacted, without_paths
from qwen_precision.report.view import bundled
from qwen_precision.settings.levels import FAIL_ON
from support.builders import (
    HOSTILE,
    RUNS,
    divergent_run,
    healthy_run,
    hostile_run,
    hostile_text_run,
    many_overflows_run,
    overflowing_run,
)

TEXTS = [name for name, row in FORMATS.items() if not row.binary]
SUFFIX = {"markdown": "md", "junit": "junit.xml", "github": "github.txt", "html": "html"}


def shown(run: Run, name: str, fail_on: str = "fail") -> str:
    return str(FORMATS[name].render(one(judge(run), fail_on)))


def in_a_line(run: Run, name: str) -> str:
    """Its words, whatever lines they were broken into; of a picture those that are drawn."""
    text = shown(run, name).replace("\n# ", " ")
    drawn = re.findall(r"<!--(.*?)-->", text, flags=re.DOTALL) if name == "svg" else [text]
    return " ".join(" ".join(drawn).split())


@pytest.mark.parametrize("name", SUFFIX)
@pytest.mark.parametrize("run", RUNS)
def test_every_kind_of_run_looks_as_expected(name: str, run: str, golden: Callable[[str, str], None]) -> None:
    # The drawings are matplotlib's, and differ with its version; what is around them is ours.
    text = re.sub(r"<svg.*?</svg>", "<svg/>", shown(RUNS[run](), name), flags=re.DOTALL)
    golden(f"{run}.{SUFFIX[name]}", text)


@pytest.mark.parametrize("run", RUNS)
def test_the_picture_of_every_kind_of_run_has_the_parts_it_should(run: str, golden: Callable[[str, str], None]) -> None:
    """Which parts are drawn, in which order; where a line goes is matplotlib's, and moves with its version."""
    golden(f"{run}.svg.txt", "\n".join(re.findall(r'<g id="([a-z]+)_', shown(RUNS[run](), "svg"))) + "\n")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("run", RUNS)
def test_the_same_run_gives_the_same_bytes(name: str, run: str) -> None:
    first, second = (FORMATS[name].render(one(judge(RUNS[run]()))) for _ in range(2))
    assert first == second and len(first) > 10


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:12]))
@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("run", [hostile_run, hostile_text_run])
def test_strings_from_strangers_are_inert(name: str, text: str, run: Callable[[str], Run]) -> None:
    out = shown(run(text), name)
    if name == "json":
        json.loads(out)
        assert "\x1b" not in out
        return
    assert not {"\x1b", "\x00", "\x07", "\u202e"} & set(out)
    if name in ("html", "svg", "junit", "markdown"):
        assert "<script" not in re.sub(r"^(`{3,})(?:text|python)$.*?^\1$", "", out, flags=re.DOTALL | re.MULTILINE)
    if name in ("junit", "svg"):
        ElementTree.fromstring(out)
    if name == "table":
        assert max(len(line) for line in out.splitlines()) <= 80
        assert not text.startswith("[red]") or "[red]bold[/red]" in out
        assert not text.startswith(":x:") or ":x: :smile:" in out
    if name == "github":
        assert all(line.startswith("::") for line in out.splitlines())
    assert len(out) < 400_000


def test_a_mention_or_a_fence_in_a_prompt_stays_text_in_markdown() -> None:
    from qwen_precision.render.markdown import escaped, fenced

    assert escaped("a@b") == "a@&#8203;b"
    assert "@someone" not in escaped("@someone #123 [x](http://y) **b** <b>")
    assert escaped("a|b`c") == r"a\|b\`c"
    assert fenced("```\nout").startswith("````text\n") and fenced("```\nout").endswith("\n````")


@pytest.mark.parametrize("name", ["markdown", "html", "table"])
def test_a_run_on_apples_gpu_says_that_no_real_one_was_tried(name: str) -> None:
    cards = ([Choice(what="device", value=device, reason="asked for")] for device in ("mps", "cuda:0"))
    ours, theirs = (str(FORMATS[name].render(one(judge(healthy_run(choices=card))))) for card in cards)
    assert "Not run on a real Apple GPU yet" in ours and "Not run on" not in theirs


def test_markdown_stays_below_what_github_takes_and_says_what_was_left_out() -> None:
    from support.builders import a_prompt

    prompts = [a_prompt(f"prompt {n}", "word " * 500, ids=list(range(400)), tokens=["w"] * 400) for n in range(60)]
    text = shown(overflowing_run(prompts=prompts), "markdown")
    assert len(text) <= 65_536 and len(text) <= LONGEST + 100
    assert "Left out" in text and "prompts" in text.rsplit("Left out", 1)[1] and "All findings" in text


def test_markdown_counts_as_many_findings_as_it_lists() -> None:
    text = shown(many_overflows_run(40), "markdown")
    told = re.search(r"All findings \((\d+)\)(.*?)</details>", text, re.DOTALL)
    assert told is not None and int(told[1]) == len(re.findall(r"^\d+\. ", told[2], re.MULTILINE))


@pytest.mark.parametrize("name", ["table", "markdown", "html"])
def test_of_very_many_prompts_that_fail_a_few_are_named_and_the_rest_is_counted(name: str) -> None:
    from support.builders import HEALTHY, a_pass, a_prompt, a_run, an_event

    bad = [*HEALTHY[:4], float("inf"), float("nan")]
    passes = [
        each
        for n in range(20)
        for each in (
            a_pass("fp32", [*HEALTHY[:4], 80000.0, 31.0], prompt=n),
            a_pass("fp16", bad, [an_event(4)], prompt=n),
        )
    ]
    run = a_run(passes, prompts=[a_prompt(f"prompt {n}") for n in range(20)])
    text = " ".join(unescape(shown(run, name)).split())
    assert 'prompt 11" and 8 more' in text


@pytest.mark.parametrize("name", ["table", "markdown", "html"])
def test_where_no_answer_was_left_to_compare_no_format_counts_answers(name: str) -> None:
    from support.builders import HEALTHY, a_pass, a_run, an_event

    bad = [*HEALTHY[:4], float("inf"), float("nan")]
    fp16 = a_pass("fp16", bad, [an_event(4)], top1=[None], layer_error=[0.001])
    text = shown(a_run([a_pass("fp32", [*HEALTHY[:4], 80000.0, 31.0]), fp16]), name)
    assert "same top-1" in text and "0 of 0" not in text


# -- junit ---------------------------------------------------------------------------------------------------------


def test_junit_loads_in_a_junit_parser_with_right_counts_and_passing_cases() -> None:
    from junitparser import JUnitXml

    xml = JUnitXml.fromstring(shown(overflowing_run(), "junit").encode())
    suites = {suite.name: suite for suite in xml}
    assert (suites["fp16 plain"].tests, suites["fp16 plain"].failures) == (5, 1)
    assert (suites["bf16 plain"].tests, suites["bf16 plain"].failures) == (5, 0)
    assert xml.tests == sum(suite.tests for suite in xml) and xml.failures == 1 and xml.errors == 0
    cases = {case.name: case for case in suites["fp16 plain"]}
    assert cases["overflow"].result[0].type == "overflow" and cases["underflow"].is_passed


@pytest.mark.parametrize("level", FAIL_ON)
@pytest.mark.parametrize("name", [*RUNS, "divergent"])
def test_junit_fails_exactly_where_the_exit_code_says_so(name: str, level: str) -> None:
    run = divergent_run() if name == "divergent" else RUNS[name]()
    failures = int(ElementTree.fromstring(shown(run, "junit", level)).get("failures", "0"))
    assert (failures > 0) == (one(judge(run), level).exit_code == 1)


def test_junit_fails_a_risk_only_when_risks_fail() -> None:
    from support.builders import HEALTHY, a_pass, a_run

    near = [*HEALTHY[:4], 40000.0, 31.0]
    run = a_run([a_pass("fp32", near), a_pass("fp16", near)])
    for level, failures in (("fail", 0), ("risk", 1), ("never", 0)):
        assert ElementTree.fromstring(shown(run, "junit", level)).get("failures") == str(failures)


def test_a_run_that_stopped_is_an_error_of_its_own() -> None:
    root = ElementTree.fromstring(shown(RUNS["stopped"](), "junit"))
    assert root.get("errors") == "1" and root.find(".//error") is not None


# -- float32 logits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("screen", "png")])
def test_every_format_says_what_float32_logits_buy_and_cost_also_where_nothing_is_advised(name: str) -> None:
    run = healthy_run()
    assert not [each for each in judge(run).findings if each.kind == "advice"]
    text = in_a_line(run, name)
    if name == "json":
        told = json.loads(text)["logits"]
        assert told["upcast"]["fp16"]["loss_error"] == 0.0013 and told["cost"]["lengths"][-1]["float32"] == 77791232000
        return
    said = "fp16: upcasting saves at least 0.0013 of loss error (nats) here; without it 0 of 2 next tokens change"
    assert said.replace("(", r"\(").replace(")", r"\)") in text if name == "markdown" else said in text
    for size in ("4.86 GB", "19.4 GB", "77.8 GB", "608 kB"):
        assert size in text, size


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("screen", "png")])
def test_every_format_names_the_step_at_which_a_text_is_farthest_off(name: str) -> None:
    from support.builders import a_continuation, a_generation, generated

    row = a_continuation([1, 2, 3], ["a", "b", "c"], logprob_error=[1e-4, -4e-3, 3e-3])
    text = " ".join(shown(generated(a_generation([row]), ["fp16"]), name).replace("\n# ", " ").split())
    if name == "json":
        told = json.loads(text)
        assert (told["logits"]["upcast"]["fp16"]["row"], told["logits"]["upcast"]["fp16"]["step"]) == (0, 1)
        return
    text = text.replace("&#39;", "'").replace("\\", "")
    assert "upcasting saves 0.004 nats at most of a token's log-probability here (row 0, step 1); " in text


@pytest.mark.parametrize("name", ["table", "markdown", "html", "json"])
def test_each_step_of_a_text_is_shown_where_there_is_room_and_of_many_the_worst(name: str) -> None:
    from support.builders import a_continuation, a_generation, generated

    errors = [1e-4] * 40
    errors[3], errors[31] = 5e-3, 7e-3
    changed, ranks = [0] * 40, [0] * 40
    changed[17], ranks[17] = 1, 6
    row = a_continuation([7] * 40, ["."] * 40, logprob_error=errors, changed=changed, ranks=ranks)
    text = shown(generated(a_generation([row]), ["fp16"]), name)
    if name == "json":
        (told,) = json.loads(text)["generation"]["rows"]
        assert (told["logprob_error"], told["changed"], told["ranks"]) == (errors, changed, ranks)
        assert len(told["logprob"]) == len(told["mass_lost"]) == 40
        return
    assert "the 12 worst of 40 steps" in text
    cells = {"table": "0    {} ", "markdown": "| 0 | {} |", "html": "<tr><td>0</td><td>{}</td>"}[name]
    lines = [line for line in text.splitlines() if "0 of 10" in line or "6 of 10" in line]
    assert len(lines) == 12
    for step, error, then in ((3, "0.005", "same"), (17, "1.00e-04", "other"), (31, "0.007", "same")):
        (line,) = [line for line in lines if cells.format(step) in line]
        assert error in line and then in line


def test_in_junit_an_advice_says_what_to_do() -> None:
    root = ElementTree.fromstring(shown(RUNS["advised"](), "junit"))
    said = " ".join(each.text or "" for each in root.iter("system-out"))
    for each in judge(RUNS["advised"]()).findings:
        assert each.cause.sentence in said and each.cause.advice[:60] in said


@pytest.mark.parametrize("run", [name for name in RUNS if RUNS[name]().generation is not None])
def test_the_script_of_a_text_says_what_its_logits_take(run: str) -> None:
    assert "77.8 GB at 128,000 tokens" in shown(RUNS[run](), "repro")


@pytest.mark.parametrize("name", ["table", "markdown", "html", "github", "junit", "repro", "svg"])
def test_why_a_dtype_has_fewer_next_tokens_than_another_is_said_beside_them(name: str) -> None:
    from support.builders import HEALTHY, a_cost, a_pass, a_run, an_upcast

    replaced = a_pass("fp16", HEALTHY, upcast=[an_upcast(), None, None])
    run = a_run([a_pass("fp32", HEALTHY), replaced], logits=a_cost())
    text = in_a_line(run, name)
    assert "0 of 2 next tokens change" in text and "at most" in text
    assert "2 rows left out: no finite logits of their own" in text
    assert "left out" not in shown(healthy_run(), name)


def test_the_attachment_says_it_too(tmp_path: Path) -> None:
    import zipfile

    path = tmp_path / "out.zip"
    path.write_bytes(bundled(one(judge(healthy_run()))))
    with zipfile.ZipFile(path) as archive:
        for member in ("report.md", "report.html", "repro.py"):
            assert "upcasting saves at least 0.0013 of loss error" in archive.read(member).decode()


@pytest.mark.parametrize("name", TEXTS)
def test_where_no_logits_were_seen_nothing_is_said_of_them(name: str) -> None:
    assert "upcasting" not in shown(overflowing_run(), name)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:12]))
@pytest.mark.parametrize("name", TEXTS)
def test_the_prompt_whose_loss_is_told_is_named_and_inert(name: str, text: str) -> None:
    from support.builders import a_prompt

    run = healthy_run(prompts=[a_prompt(text), a_prompt("other")])
    out = shown(run, name)
    assert name == "json" or not {"\x1b", "\x00", "\x07", "\u202e"} & set(out)
    if name in ("junit", "svg"):
        ElementTree.fromstring(out)
    if name == "table":
        assert max(len(line) for line in out.splitlines()) <= 80 and "loss of" in out


# -- several runs, baselines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", FAIL_ON)
@pytest.mark.parametrize("run", RUNS)
def test_the_exit_code_is_the_reports_and_after_an_export_that_of_the_rescue(run: str, level: str) -> None:
    report = judge(RUNS[run]())
    wanted = rescue_exit_code(report, level) if run == "rescued" else report.exit_code(level)
    assert one(report, level).exit_code == wanted


@pytest.mark.parametrize("level", FAIL_ON)
@pytest.mark.parametrize("verified", [True, False])
@pytest.mark.parametrize("verdict", ["ok", "risk", "fail"])
@pytest.mark.parametrize("stopped", [None, "interrupted"])
def test_after_an_export_exit_code_and_junit_are_of_what_was_exported(
    stopped: str | None, verdict: str, verified: bool, level: str
) -> None:
    run = RUNS["rescued"]()
    assert run.rescue is not None and run.rescue.exported is not None
    exported = run.rescue.exported.model_copy(update={"verdict": verdict, "verified": verified, "why": "a reason"})
    run = run.model_copy(update={"stopped": stopped, "rescue": run.rescue.model_copy(update={"exported": exported})})
    bad = not verified or (verdict == "fail" and level != "never") or (verdict == "risk" and level == "risk")
    assert one(judge(run), level).exit_code == (3 if stopped else int(bad))
    failures = ElementTree.fromstring(shown(run, "junit", level)).get("failures")
    assert failures == str(int(bad and not stopped))


@pytest.mark.parametrize("names", [("one-overflow",), ("one-overflow", "healthy")])
def test_reports_are_always_a_list_and_the_keys_of_one_alone_stand_at_the_top_too(names: tuple[str, ...]) -> None:
    view = View(tuple(judge(RUNS[name]()) for name in names))
    data = json.loads(str(FORMATS["json"].render(view)))
    assert [each["verdict"] for each in data["reports"]] == [report.verdict for report in view.reports]
    at_top = {key: value for key, value in data.items() if key not in ("schema", "exit_code", "reports")}
    assert at_top == (data["reports"][0] if len(names) == 1 else {})


def test_several_runs_are_shown_side_by_side() -> None:
    reports = tuple(
        judge(RUNS[name](), name=f"{name}.json") for name in ("healthy", "one-overflow", "text-exclamation")
    )
    view = View(reports)
    table = str(FORMATS["table"].render(view))
    assert re.search(r"healthy\.json \(probe\)\s+OK\s+OK\s+OK", table)
    assert re.search(r"text-exclamation\.json \(generate\)\s+FAIL\s+-\s+-", table)
    assert view.exit_code == 1
    data = json.loads(str(FORMATS["json"].render(view)))
    assert [each["file"] for each in data["reports"]] == [report.name for report in reports]
    assert str(FORMATS["markdown"].render(view)).count("\n# qprec") == 2
    assert str(FORMATS["html"].render(view)).count("<main>") == 3


def against(older: Run, newer: Run, fail_on: str = "fail") -> View:
    base, report = judge(older, name="old.json"), judge(newer, name="new.json")
    return View((report,), fail_on, (changes(base, report),))


def test_against_a_baseline_only_what_is_new_fails() -> None:
    same = against(overflowing_run(), overflowing_run())
    assert same.exit_code == 0 and same.changes and not same.changes[0].new and not same.changes[0].changed
    worse = against(healthy_run(), overflowing_run())
    assert worse.exit_code == 1 and worse.changes and len(worse.changes[0].new) == 2
    better = against(overflowing_run(), healthy_run())
    assert better.exit_code == 0 and better.changes and len(better.changes[0].fixed) == 2
    assert against(healthy_run(), overflowing_run(), "never").exit_code == 0


def test_what_was_not_run_is_not_called_fixed() -> None:
    from support.builders import HEALTHY, a_pass, a_run, stopped_run

    view = against(overflowing_run(), a_run([a_pass("bf16", HEALTHY)]))
    assert view.changes and view.changes[0].fixed == () and "fp16" in view.changes[0].not_compared
    assert "not compared" in str(FORMATS["table"].render(view))
    stopped = against(overflowing_run(), stopped_run())
    assert stopped.exit_code == 3 and stopped.changes and stopped.changes[0].fixed == ()


def test_an_operation_that_went_from_near_to_beyond_is_worse_and_no_format_disagrees() -> None:
    from support.builders import HEALTHY, a_pass, a_run, an_event

    near, over = [*HEALTHY[:4], 40000.0, 31.0], [*HEALTHY[:4], 80000.0, 31.0]
    older = a_run([a_pass("fp32", near), a_pass("fp16", near)])
    newer = a_run([a_pass("fp32", over), a_pass("fp16", [*HEALTHY[:4], float("inf"), 31.0], [an_event(4)])])
    view = against(older, newer)
    assert view.exit_code == 1 and view.changes and not view.changes[0].fixed and view.changes[0].changed[0].worse
    assert ElementTree.fromstring(str(FORMATS["junit"].render(view))).get("failures") == "1"
    assert str(FORMATS["github"].render(view)).startswith("::error")
    # More of the same is told, and fails nothing: the exit code and the JUnit file say so alike.
    worse = [*HEALTHY[:4], 55000.0, 31.0]
    same = against(older, a_run([a_pass("fp32", worse), a_pass("fp16", worse)]), "risk")
    assert same.exit_code == 0 and same.changes and same.changes[0].changed
    assert ElementTree.fromstring(str(FORMATS["junit"].render(same))).get("failures") == "0"


def test_a_bf16_run_has_a_picture_too() -> None:
    from qwen_precision.render.pictures import headroom
    from support.builders import HEALTHY, a_pass, a_run

    report = judge(a_run([a_pass("fp32", HEALTHY), a_pass("bf16", HEALTHY)], dtypes=["bf16"]))
    assert headroom(report) is None and headroom(report, wide=True) is not None
    assert FORMATS["svg"].render(one(report)) != FORMATS["svg"].render(one(judge(RUNS["empty"]())))


def test_a_headroom_that_moved_is_told_just_above_its_limit_and_not_below() -> None:
    from support.builders import HEALTHY, a_pass, a_run

    def near(value: float) -> Run:
        column = [*HEALTHY[:4], value, 31.0]
        return a_run([a_pass("fp32", column), a_pass("fp16", column)])

    for factor, moved in ((1.04, 0), (1.06, 1)):
        view = against(near(40000.0), near(40000.0 * factor))
        assert view.changes and len(view.changes[0].changed) == moved
    for name in TEXTS:
        assert FORMATS[name].render(against(near(40000.0), near(60000.0)))
    text = str(FORMATS["table"].render(against(near(40000.0), near(60000.0))))
    assert "worse: fp16 near-overflow" in text and "least headroom in fp16: 1.64x -> 1.09x" in text


# -- bundle, redaction ---------------------------------------------------------------------------------------------


def test_a_bundle_has_the_same_bytes_again_and_reads_back(tmp_path: Path) -> None:
    view = View((judge(overflowing_run()),))
    assert bundled(view) == bundled(view)
    (tmp_path / "report.zip").write_bytes(bundled(view))
    ((run, merged),) = unpack((tmp_path / "report.zip").read_bytes(), tmp_path)
    assert to_json(run) == to_json(overflowing_run()) and merged is None


def test_paths_and_user_names_never_go_into_a_bundle() -> None:
    from support.builders import a_model

    run = overflowing_run(
        model=a_model(source="/home/alice/models/mine"),
        stopped="/home/alice/models/mine/model.safetensors: broken",
        settings={"prompts": "/home/alice/p.yaml"},
    )
    text = to_json(without_paths(run))
    assert "alice" not in text and '"source":"mine"' in text and "model.safetensors: broken" in text
    told = "cannot read /home/John Smith/my models/x.safetensors, C:\\Users\\bob and /home/carol: gone /root/o'brien/y"
    text = to_json(without_paths(overflowing_run(stopped=told, environment={"HF_HOME": "/home/dave"})))
    assert not [name for name in ("John", "bob", "carol", "brien", "dave") if name in text], text
    for source in ("C:\\Users\\bob", "/home/bob", "~/", "/root"):
        assert without_paths(overflowing_run(model=a_model(source=source))).model.source == "model"
    assert without_paths(overflowing_run()).model.source == "Qwen/Qwen3-8B"


@pytest.mark.parametrize("name", RUNS)
def test_redacted_no_text_is_left_and_the_verdict_is_the_same(name: str) -> None:
    run, clean = RUNS[name](), redacted(RUNS[name]())
    text = to_json(clean)
    for prompt in run.prompts:
        for row in prompt.rows:
            assert row.text not in text and len(row.ids) == len(clean.prompts[0].rows[0].ids)
    for row in run.generation.rows if run.generation else []:
        assert len(row.text) < 3 or row.text not in text
    assert judge(clean).verdict == judge(run).verdict
    for each in FORMATS.keys() - {"repro"}:  # which says that it cannot: test_repro.py
        assert FORMATS[each].render(one(judge(clean)))


@pytest.mark.parametrize("name", RUNS)
def test_redacted_no_command_asks_for_prompts_that_are_gone(name: str) -> None:
    report = judge(redacted(RUNS[name]()))
    for each in set(TEXTS) - {"repro"}:  # that one is refused: it would hold the ids
        assert "--prompt" not in str(FORMATS[each].render(one(report))), each
    assert same_again(report.run).startswith("# The prompts are redacted")
    assert next_command(report, "run.json") is None and next_rescue(report, "run.json") is None


# -- the page in a browser -------------------------------------------------------------------------------------------

CHROMIUM = next((path for path in ("/usr/bin/chromium", "/usr/bin/google-chrome") if Path(path).exists()), None)


def dumped(page: str, tmp_path: Path, width: int = 1100) -> str:
    path = tmp_path / "page.html"
    probe = "<script>document.title='ran'</script>"  # refused by the page's own policy; a hostile one would be too
    path.write_text(page.replace("</body>", probe + "</body>"), encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},2000",
        "--virtual-time-budget=2000",
        "--dump-dom",
    ]
    done = subprocess.run([str(CHROMIUM), *flags, path.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [390, 1100])
def test_the_page_opens_in_chromium_and_no_script_runs(width: int, tmp_path: Path) -> None:
    dom = dumped(shown(hostile_run("</script><script>document.title='ran'</script>"), "html"), tmp_path, width)
    assert "<title>ran</title>" not in dom and "<h2>Findings</h2>" in dom and "<svg" in dom


def test_the_page_asks_for_nothing_from_the_network() -> None:
    page = shown(overflowing_run(), "html")
    assert not re.search(
        r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)
    )
    assert "url(http" not in page and "@import" not in page and "Content-Security-Policy" in page


# -- pictures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_pictures_are_well_formed(name: str) -> None:
    from PIL import Image

    ElementTree.fromstring(shown(RUNS[name](), "svg"))
    png = FORMATS["png"].render(one(judge(RUNS[name]())))
    assert isinstance(png, bytes) and Image.open(io.BytesIO(png)).size[0] > 500
