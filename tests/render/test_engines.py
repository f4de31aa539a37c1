"""What comes of a run in other engines, in every format: golden, in one line of the first screen, inert."""

import json
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from qwen_precision.judge import Report, judge, with_engines
from qwen_precision.render import FORMATS, View
from qwen_precision.render.schema import report_schema
from qwen_precision.render.screen import MOST_LINES
from qwen_precision.render.words.engines import avoids
from qwen_precision.settings import Engine, Option, Rule
from support.builders import HOSTILE, a_plan, explained_run, healthy_run, overflowing_run

READ = {"source": "https://example.org/blob/0123456789/kernel.cu", "version": "0123456789"}
SUFFIX = {
    "table": "txt",
    "screen": "screen80.txt",
    "markdown": "md",
    "html": "html",
    "json": "json",
    "junit": "junit.xml",
    "github": "github.txt",
}


def an_engine(name: str, *values: str, **rule: Any) -> Engine:
    rules = [Rule(values=list(values), because="its kernels do so", **READ, **rule)] if values else []
    return Engine(name=name, runs=f"{name} --dtype float16", rules=rules)


WIDE = [Option(option=f"--dtype {each}", evidence="read in the source", **READ) for each in ("bfloat16", "float32")]
SEEN = [Option(option="FAST=0", evidence="reported by users", **READ)]
ENGINES = [
    an_engine("plain", "weights", "outputs", avoid=WIDE),
    an_engine("accumulating", "products", "sums", avoid=SEEN),
    an_engine("saturating", "residual", saturates=True),
    an_engine("casting", "operands"),
    an_engine("wide"),
]


def with_some() -> Report:
    return with_engines(judge(overflowing_run(rescue=a_plan())), ENGINES)


def shown(report: Report, name: str, width: int = 80) -> str:
    return str(FORMATS[name].render(View((report,), width=width, record="run.json")))


@pytest.mark.parametrize("name", SUFFIX)
def test_every_format_tells_each_engine(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"engines.{SUFFIX[name]}", re.sub(r"<svg.*?</svg>", "<svg/>", shown(with_some(), name), flags=re.DOTALL))


@pytest.mark.parametrize("name", [*SUFFIX, "repro", "svg"])
def test_where_no_engine_is_asked_about_none_is_told(name: str) -> None:
    assert "ngine" not in re.sub(r"ngine(_version)?</dt>", "", shown(judge(healthy_run()), name))


@pytest.mark.parametrize("width", [80, 120])
def test_the_first_screen_tells_all_engines_in_one_line_and_few_one_by_one(width: int) -> None:
    report = with_engines(judge(explained_run()), [an_engine(f"engine-{n}", "outputs") for n in range(12)])
    lines = shown(report, "screen", width).splitlines()
    assert len(lines) <= MOST_LINES and sum(line.startswith("Engine") for line in lines) == 1
    assert "Engines   FAIL engine-0, engine-1 +10" in lines
    few = shown(with_engines(judge(overflowing_run()), [ENGINES[0]]), "screen", width)
    assert "Engine    plain FAIL: layer 31, residual add after mlp" in few
    assert "avoided by --dtype bfloat16 or --dtype float32 (read in the source)" in " ".join(few.split())


def test_the_json_of_engines_fits_the_schema_and_holds_the_source_of_the_rule() -> None:
    data = json.loads(shown(with_some(), "json"))
    jsonschema.validate(data, report_schema())
    plain = data["engines"][0]
    assert (plain["engine"], plain["verdict"], plain["layer"]) == ("plain", "fail", 31)
    assert plain["rule"]["source"] == READ["source"] and plain["rule"]["avoid"][0]["option"] == "--dtype bfloat16"


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:12]))
@pytest.mark.parametrize("name", [each for each in SUFFIX if each != "json"])
def test_what_a_strangers_engine_is_called_is_inert(name: str, text: str) -> None:
    option = Option(option=text, evidence="reported by users", **READ)
    out = shown(with_engines(judge(overflowing_run()), [an_engine(text, "outputs", avoid=[option])]), name)
    assert not {"\x1b", "\x00", "\x07", "‮"} & set(out)
    assert "<script" not in out or name in ("table", "screen", "github")
    assert len(out) < 400_000
    if name in ("table", "screen"):
        assert max(map(len, out.splitlines())) <= 80


def two_rules(*avoided: list[str]) -> Engine:
    """An engine that fails by two rules at one place; of each the options that avoid it."""
    options = [[Option(option=each, evidence="read in the source", **READ) for each in names] for names in avoided]
    kinds = (["outputs"], ["residual"])
    rules = [Rule(values=kind, because="x", avoid=each, **READ) for kind, each in zip(kinds, options, strict=True)]
    return Engine(name="two", runs="x", rules=rules)


BOTH: dict[str, tuple[list[str], list[str], str]] = {
    "an option each": (["A=1"], ["B=1"], "A=1 and B=1 (read in the source)"),
    "one for both": (["A=1", "--wide"], ["--wide", "B=1"], "--wide (read in the source)"),
    "the same one": (["--wide"], ["--wide"], "--wide (read in the source)"),
    "none for one of them": (["A=1"], [], "no option of the engine is known for residual"),
    "none at all": ([], [], "no option of the engine is known"),
}


@pytest.mark.parametrize("case", BOTH)
def test_no_option_is_named_that_leaves_another_rule_failing(case: str) -> None:
    first, second, expected = BOTH[case]
    for one, other in ((first, second), (second, first)):
        report = with_engines(judge(overflowing_run()), [two_rules(one, other)])
        said = avoids(report, report.engines[0])
        if one is first:
            assert said == expected
        assert set(said.replace("(read in the source)", "").split(" and ")) != {"A=1 "} and "or B" not in said


def test_an_option_is_told_with_the_weakest_evidence_that_any_rule_has_for_it() -> None:
    known, reported = WIDE[:1], [WIDE[0].model_copy(update={"evidence": "reported by users"})]
    rules = [Rule(values=[v], because="x", avoid=o, **READ) for v, o in (("outputs", known), ("residual", reported))]
    report = with_engines(judge(overflowing_run()), [Engine(name="two", runs="x", rules=rules)])
    assert avoids(report, report.engines[0]) == "--dtype bfloat16 (reported by users)"


@pytest.mark.parametrize("name", [*SUFFIX])
def test_every_format_names_the_options_that_go_together(name: str) -> None:
    report = with_engines(judge(overflowing_run()), [two_rules(["A=1"], ["B=1"])])
    out = " ".join(shown(report, name).split())
    assert "A=1 and B=1" in out if name != "json" else "A=1" in out and "B=1" in out


@pytest.mark.parametrize("name", ["table", "markdown", "html", "json"])
def test_what_a_user_should_know_of_an_engine_is_shown_with_its_verdict(name: str) -> None:
    engine = ENGINES[0].model_copy(update={"note": "It does not start on Tuesdays."})
    assert "not start on Tuesdays" in " ".join(shown(with_engines(judge(overflowing_run()), [engine]), name).split())


def test_a_rescaled_checkpoint_is_named_only_where_it_helps() -> None:
    outputs, sums = with_engines(judge(overflowing_run()), [an_engine("a", "outputs"), an_engine("b", "sums")]).engines
    assert avoids(with_some(), outputs) == "--rescue-to"
    assert avoids(judge(overflowing_run()), outputs) == "no option of the engine is known"
    assert "avoided by no option" not in "".join(
        shown(with_engines(judge(overflowing_run()), ENGINES), n) for n in SUFFIX
    )
    assert sums.verdict == "risk" and avoids(with_some(), sums) == "no option of the engine is known"
