"""Many prompts are counted, and the time they take is told, before they begin."""

import re
from pathlib import Path

import pytest
import torch

from qwen_precision.cli import main
from qwen_precision.probe import shadow, whole
from qwen_precision.probe.foretold import MANY
from qwen_precision.watcher.readings import _Pool
from support.families import make_family
from support.runs import sentence

pytestmark = pytest.mark.usefixtures("scratch")

Capture = pytest.CaptureFixture[str]
PROBE = ["--dtype", "bf16", "--no-explain", "--fail-on", "never", "--prompts", "many.txt"]


def write_prompts(count: int) -> None:
    Path("many.txt").write_text("\n".join(f"{number} is a number" for number in range(count)))


def test_many_prompts_are_counted_and_timed_before_the_first_layer_and_few_are_not(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_prompts(MANY)
    told: list[int] = []
    run = shadow.Shadow._run_prompts
    monkeypatch.setattr(
        shadow.Shadow,
        "_run_prompts",
        lambda self, name, index: told.append(capsys.readouterr().err.count("prompts, ")) or run(self, name, index),
    )
    assert main(["probe", "demo", *PROBE]) == 0
    assert told[:2] == [1, 0]
    write_prompts(MANY - 1)
    assert main(["probe", "demo", *PROBE, "--force"]) == 0
    assert not any(told[12:])


def test_what_is_said_has_prompts_tokens_dtypes_and_a_time(capsys: Capture) -> None:
    write_prompts(120)
    assert main(["probe", "demo", *PROBE]) == 0
    assert re.search(r"^120 prompts, \d,\d+ tokens, in fp32, bf16: about \d+ (s|min), ", capsys.readouterr().err)
    assert main(["probe", "demo", *PROBE, "--force", "--quiet"]) == 0
    assert "120 prompts, " not in capsys.readouterr().err


@pytest.mark.parametrize("family", [False, True])
def test_what_was_run_for_its_time_leaves_no_trace(
    family: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_precision.record import load

    source = str(make_family(tmp_path / "model", "gemma2", plant=True).folder) if family else "demo"
    fp16 = [*PROBE, "--dtype", "fp16"]  # which fails, so that places and their order are in the record
    for module in (shadow, whole):
        monkeypatch.setattr(module, "foretell", lambda prompts, dtypes, parts, once, announce: once(0))
    write_prompts(2)
    assert main(["probe", source, *fp16, "-o", "with.json"]) == 0
    for module in (shadow, whole):
        monkeypatch.setattr(module, "foretell", lambda *given: None)
    assert main(["probe", source, *fp16, "-o", "without.json"]) == 0
    one, other = load(Path("with.json")), load(Path("without.json"))
    assert (one.passes, one.sites) == (other.passes, other.sites)


def test_an_empty_text_among_prompts_is_named_by_its_number(capsys: Capture) -> None:
    for text in ("- hello\n- ''\n", "- hello\n- {text: ''}\n", "- hello\n- {name: x, batch: [a, '']}\n"):
        Path("some.yaml").write_text(text)
        assert main(["probe", "demo", "--prompts", "some.yaml"]) == 2
        assert "some.yaml, prompt 2: is empty; a prompt needs at least one character." in sentence(capsys)
    Path("some.yaml").write_text("- hello\n- {batch: []}\n")
    assert main(["probe", "demo", "--prompts", "some.yaml"]) == 2
    assert "prompt 2: is empty; a batch needs at least one text." in sentence(capsys)


def test_a_dry_run_counts_what_each_prompt_costs_beside_its_tokens(capsys: Capture) -> None:
    def seconds() -> int:
        assert main(["probe", "demo", "--prompts", "many.txt", "--dtype", "fp16", "--dry-run"]) == 0
        return int(re.findall(r"roughly (\d+) s", capsys.readouterr().out)[0])

    write_prompts(2000)
    many = seconds()
    Path("many.txt").write_text("- " + "\n- ".join(["1 is a number " * 30] * 70))  # as many tokens
    assert many >= seconds() + 20


def test_what_one_operation_leaves_takes_room_for_few() -> None:
    """Of thousands of prompts, each embedding has a pool of its own, before anything is foretold."""
    pool = _Pool(torch.float16, torch.device("cpu"))
    sizes = []
    for _ in range(7):
        pool.grow()
        sizes.append(len(pool.pairs))
    assert sizes == [16, 32, 64, 128, 256, 512, 1024]
