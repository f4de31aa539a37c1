"""A whole probe from Python: the same as the command line's, in silence, and misuse is one sentence."""

from pathlib import Path
from typing import Any

import pytest

import qwen_precision
from qwen_precision.cli.app import main
from qwen_precision.errors import QprecError
from qwen_precision.record import load, to_json
from support.runs import timeless

pytestmark = pytest.mark.usefixtures("scratch")


def test_a_probe_from_python_gives_what_the_command_line_gives_and_neither_prints_nor_writes(
    capfd: pytest.CaptureFixture[str],
) -> None:
    report = qwen_precision.probe_model("demo", dtypes=["fp16"], prompts=["Hello there"])
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "") and not list(Path().iterdir())
    assert report.verdict == {"fp16": "fail"} and report.findings[0].place.name == "down_proj output"
    assert main(["probe", "demo", "--dtype", "fp16", "--prompt", "Hello there", "-o", "run.json"]) == 1
    theirs = load(Path("run.json"))
    ours, wanted = (timeless(run).model_copy(update={"choices": []}) for run in (report.run, theirs))  # free memory
    assert to_json(ours) == to_json(wanted)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"dtype": "fp16"}, TypeError, "unexpected keyword argument 'dtype'; known: "),
        ({"dtypes": "fp16"}, TypeError, r"takes a list; give \['fp16'\]"),
        ({"prompts": "Hello"}, TypeError, "takes a list of texts, or a pathlib.Path"),
        ({"prompts": []}, QprecError, "prompts: is empty"),
        ({"dtypes": ["fp8"]}, QprecError, "unknown dtype 'fp8'"),
        ({"prompts": Path("none.yaml")}, QprecError, "cannot read none.yaml"),
    ],
)
def test_a_wrong_argument_is_one_sentence(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said) as raised:
        qwen_precision.probe_model("demo", **arguments)
    assert "\n" not in str(raised.value)


def test_prompts_of_a_profile_are_taken_where_none_are_given() -> None:
    Path("p.txt").write_text("Hello there\n")
    Path("mine.yaml").write_text("prompts: p.txt\ndtypes: [bf16]\nexplain: false\n")
    report = qwen_precision.probe_model("demo", config="mine.yaml")
    assert list(report.verdict) == ["bf16"] and [prompt.name for prompt in report.run.prompts] == ["prompt 1"]
