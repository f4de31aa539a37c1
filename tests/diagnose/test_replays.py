"""A step of a generation that fails although one forward of its ids does not: it is made again, to tell what makes it.

The faults lie in the cache of transformers, which no single forward touches: layer 1 reads values that are too large.
"""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from qwen_precision.cli.app import main
from qwen_precision.judge.checks import judge
from qwen_precision.judge.findings import Finding
from qwen_precision.record.explanation import REPLAYS
from qwen_precision.record.file import load
from qwen_precision.record.run import Run
from support.checkpoints import SHAPES, make_checkpoint
from support.loud import says
from support.plants import ids_of, loud_token, low_score
from support.runs import faults

pytestmark = [pytest.mark.usefixtures("scratch"), pytest.mark.transformers]

Fault = Callable[[int, int, int], bool]
"""Told rows, new tokens and tokens before: whether what is read from the cache goes wrong."""

Capture = pytest.CaptureFixture[str]
LONG, SHORT = "The quick brown fox", "Hello"


def plant(
    monkeypatch: pytest.MonkeyPatch, fault: Fault, layer: int = 1, row: int = -1, size: float = 1e7, read: bool = True
) -> None:
    """In fp16, values of a row in the cache of a layer are 10 million times too large, and are read from there."""
    update = DynamicCache.update

    def wrong(self: DynamicCache, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        before = self.get_seq_length(layer_idx)
        keys_all, values_all = update(self, keys, values, layer_idx, *args, **kwargs)
        if layer_idx == layer and values.dtype == torch.float16 and fault(len(values), values.shape[2], before):
            sizes = torch.ones(len(values), 1, 1, 1)
            sizes[row] = size
            scaled = (values_all * sizes).to(values.dtype)
            values_all = scaled if read else values_all
        return keys_all, values_all

    monkeypatch.setattr(DynamicCache, "update", wrong)


def generated(folder: Path, prompts: list[str], capsys: Capture, *flags: str) -> list[str]:
    """Generate, and the words of the command that is named next."""
    asked = [word for text in prompts for word in ("--prompt", text)]
    main(["generate", str(folder), *asked, "--max-new-tokens", "4", "-o", "gen.json", *flags])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Find it ")]
    assert len(lines) == 1
    return shlex.split(lines[0].removeprefix("Find it"))[1:]


def outcomes(run: Run) -> dict[str, bool]:
    """What was made again, and whether it was clean."""
    made = run.explanation.controls if run.explanation is not None else []
    return {each.what: each.clean for each in made if each.what in REPLAYS}


def probed(words: list[str], code: int) -> tuple[Run, Finding]:
    """Run the next command; gives the run and what it found about the step."""
    assert main(words) == code
    run = load(Path("qprec-run.json"))
    (finding,) = [each for each in judge(run).findings if each.kind == "unseen-failure"]
    return run, finding


def a_step(rows: int, new: int, before: int) -> bool:
    return new == 1 and before > 0


def a_step_of_a_batch(rows: int, new: int, before: int) -> bool:
    return rows > 1 and new == 1 and before > 0


def a_second_chunk(rows: int, new: int, before: int) -> bool:
    return new > 1 and before > 0


# -- what makes it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_that_only_a_cache_spoils_is_told_by_doing_without(
    shape: str, attention: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    plant(monkeypatch, a_step)
    words = generated(make_checkpoint(Path("model"), **SHAPES[shape]), [LONG], capsys, "--attn", attention)
    run, finding = probed(words, 1)
    assert outcomes(run) == {"as generated": False, "without cache": True}
    assert (finding.severity, finding.cause.kind) == ("error", "cache")
    assert judge(run).verdict["fp16"] == "fail"
    assert "yet a single forward of the same ids is finite" in finding.cause.sentence
    assert [line.rsplit(": ", 1)[1] for line in finding.cause.evidence] == ["fails", "clean"]


def test_where_the_step_goes_wrong_is_named(healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    plant(monkeypatch, a_step)
    _, finding = probed(generated(healthy, [LONG], capsys), 1)
    place = finding.place
    assert (place.layer, place.module, place.op) == (1, "model.layers.1.self_attn", "cast") and finding.origin
    assert (place.step, place.row, place.prompt) == (1, 0, "row 0")
    assert "step 1 of row 0, layer 1, " in " ".join(capsys.readouterr().out.split())


def test_a_step_that_only_a_batch_spoils_is_told_by_its_row_alone(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    plant(monkeypatch, a_step_of_a_batch)
    words = generated(healthy, [LONG, SHORT], capsys)
    run, finding = probed(words, 1)
    assert outcomes(run) == {"as generated": False, "generated alone": True, "without cache": True}
    assert (finding.cause.kind, finding.place.row, finding.place.layer) == ("batch", 1, 1)
    assert "in a batch of 2, padded" in finding.cause.sentence


def test_rows_of_one_length_are_made_again_as_the_batch_they_were(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    plant(monkeypatch, lambda rows, new, before: rows > 1 and before == 0, row=0)
    words = generated(healthy, ["a c", "b c"], capsys)
    _, finding = probed(words, 1)
    assert (finding.cause.kind, finding.place.step, finding.place.row) == ("batch", 0, 0)
    assert "padded" not in finding.cause.sentence


def test_a_step_that_only_chunks_spoil_is_told_by_prefilling_whole(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    plant(monkeypatch, a_second_chunk)
    Path("chunks.yaml").write_text("float32_logits: {chunk: 2}\n")
    words = generated(healthy, [LONG], capsys, "--guards", "chunks.yaml")
    run, finding = probed(words, 1)
    assert outcomes(run) == {"as generated": False, "prefilled whole": True, "without cache": True}
    assert finding.cause.kind == "chunked-prefill" and "prefilled 2 tokens at a time" in finding.cause.sentence
    assert (finding.place.layer, finding.place.op, finding.place.step) == (1, "cast", 0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_mixture_of_experts_is_made_again_as_it_was(
    attention: str, healthy_moe: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    plant(monkeypatch, a_step_of_a_batch)
    words = generated(healthy_moe, [LONG, SHORT], capsys, "--attn", attention)
    _, finding = probed(words, 1)
    assert (finding.cause.kind, finding.place.row, finding.place.layer, finding.place.op) == ("batch", 1, 1, "cast")


def test_every_format_with_room_names_step_row_and_operation(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    plant(monkeypatch, a_step)
    probed(generated(healthy, [LONG], capsys), 1)
    for name in ("run.txt", "run.md", "run.html"):
        assert main(["report", "qprec-run.json", "-o", name]) == 1
        text = Path(name).read_text().replace("\\", "")
        assert "step 1, row 0" in text and "model.layers.1.self_attn" in text, name


def test_a_row_that_fails_alone_and_in_chunks_alike_is_the_cache_s(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    plant(monkeypatch, a_step)
    Path("chunks.yaml").write_text("float32_logits: {chunk: 2}\n")
    run, finding = probed(generated(healthy, [SHORT, LONG], capsys, "--guards", "chunks.yaml"), 1)
    assert outcomes(run) == {
        "as generated": False,
        "generated alone": False,
        "prefilled whole": False,
        "without cache": True,
    }
    assert finding.cause.kind == "cache"


@pytest.mark.parametrize("shape", ["healthy", "healthy_moe"])
def test_a_row_that_failed_in_the_batch_before_is_not_taken_for_this_one(
    shape: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Row 1 fails by itself at step 1; row 0 is asked about at step 2, when row 1 is bad from the first layer on."""
    healthy = request.getfixturevalue(shape)
    plant(monkeypatch, a_step_of_a_batch, layer=0, row=1)
    plant(monkeypatch, lambda rows, new, before: new == 1 and before > len(ids_of(LONG)), layer=2, row=0)
    words = generated(healthy, [LONG, SHORT], capsys)
    assert main([*words, "--budget", "20"]) == 1
    found = [each for each in judge(load(Path("qprec-run.json"))).findings if each.kind == "unseen-failure"]
    assert [(f.place.row, f.place.step, f.place.layer, f.cause.kind) for f in found] == [
        (1, 1, 0, "batch"),
        (0, 2, 2, "cache"),
    ]


def test_another_row_that_fails_without_a_cache_is_not_taken_for_this_one(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    folder = make_checkpoint(Path("model"), edit=loud_token("Z", 40_000.0))
    plant(monkeypatch, a_step, row=0)
    _, finding = probed(generated(folder, [LONG, "Z"], capsys), 1)
    assert (finding.place.row, finding.cause.kind) == (0, "cache")


@pytest.mark.parametrize(
    "earlier",
    [lambda rows, new, before: before == 0, lambda rows, new, before: new == 1 and before == len(ids_of(LONG))],
    ids=["the prompt", "a step"],
)
def test_an_infinity_that_nothing_read_in_an_earlier_forward_is_not_where_it_began(
    earlier: Fault, healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    plant(monkeypatch, earlier, layer=0, read=False)
    plant(monkeypatch, lambda rows, new, before: new == 1 and before > len(ids_of(LONG)))
    _, finding = probed(generated(healthy, [LONG], capsys), 1)
    assert (finding.place.step, finding.place.layer) == (2, 1)


def test_scores_that_a_mask_makes_infinite_are_not_where_it_began(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """A score of -1,000, to which the mask of padding adds the lowest finite number."""
    plant(monkeypatch, a_step_of_a_batch, layer=2)
    folder = make_checkpoint(Path("model"), edit=low_score(1000.0, "<|endoftext|>"))
    _, finding = probed(generated(folder, [LONG, SHORT], capsys, "--attn", "eager"), 1)
    assert (finding.place.row, finding.place.layer, finding.place.op) == (1, 2, "cast")


def test_operations_are_counted_anew_in_every_chunk(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    plant(monkeypatch, lambda rows, new, before: new > 1 and before == 0, size=1.0)
    plant(monkeypatch, a_second_chunk)
    Path("chunks.yaml").write_text("float32_logits: {chunk: 2}\n")
    run, _ = probed(generated(healthy, [LONG], capsys, "--guards", "chunks.yaml"), 1)
    (began,) = [each.began for each in run.explanation.controls if each.began] if run.explanation else []
    assert (began.op, began.call) == ("cast", 0)


# -- what does not make it -------------------------------------------------------------------------------------


def test_a_step_that_does_not_fail_again_names_no_cause(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    with monkeypatch.context() as broken:
        plant(broken, a_step)
        words = generated(healthy, [LONG], capsys)
    run, finding = probed(words, 0)
    assert outcomes(run)["as generated"] and judge(run).verdict["fp16"] == "risk"
    assert finding.cause.kind == "not-told" and "so is the step made again" in finding.cause.sentence
    assert finding.place.name == "logits" and not finding.origin


def test_without_controls_the_report_says_that_the_failure_did_not_show(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    plant(monkeypatch, a_step)
    words = generated(healthy, [LONG], capsys)
    run, _ = probed([*words, "--no-explain", "--full"], 0)
    said = " ".join(capsys.readouterr().out.split())
    assert run.explanation is None and run.rescue is None and judge(run).verdict["fp16"] == "risk"
    assert "a single forward of the same ids is finite, and the controls that tell what made it were not run" in said
    assert "probe it again without --no-explain" in said


def test_a_model_that_is_streamed_is_not_made_resident(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    plant(monkeypatch, a_step)
    words = generated(healthy, [LONG], capsys)
    run, finding = probed([*words, "--memory", "streamed"], 0)
    assert run.explanation is not None and outcomes(run) == {}
    assert run.explanation.left_out == [
        f"fp16: {what}: needs all weights in memory (--memory resident)" for what in ("as generated", "without cache")
    ]
    assert "see what was not run" in finding.cause.advice


def test_controls_that_are_beyond_the_budget_are_left_out(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    plant(monkeypatch, a_step)
    run, finding = probed([*generated(healthy, [LONG], capsys), "--budget", "1"], 1)
    assert outcomes(run) == {"as generated": False} and finding.cause.kind == "not-told"
    assert run.explanation is not None
    assert run.explanation.left_out == ["fp16: without cache: beyond --budget 1"]


def test_a_failure_that_a_single_forward_shows_is_not_made_again(capsys: Capture, tmp_path: Path) -> None:
    token = next(ids[0] for ids in map(ids_of, "龘é🙂ß") if len(ids) > 1)
    folder = make_checkpoint(tmp_path / "model", edit=says(token))
    words = generated(folder, [LONG], capsys)
    assert main(words) == 1
    run = load(Path("qprec-run.json"))
    assert run.prompts[0].failed is not None and run.explanation is not None
    assert outcomes(run) == {} and all(each.kind != "unseen-failure" for each in judge(run).findings)


def test_a_generation_that_did_not_fail_has_no_step_to_make_again(healthy: Path, capsys: Capture) -> None:
    assert main(["generate", str(healthy), "--prompt", LONG, "--max-new-tokens", "2", "-o", "gen.json"]) == 0
    assert main(["probe", str(healthy), "--prompts", "gen.json"]) == 0
    run = load(Path("qprec-run.json"))
    assert run.explanation is None and [each.failed for each in run.prompts] == [None]


def test_prompts_of_their_own_make_no_step_again(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    plant(monkeypatch, a_step)
    assert main(["probe", str(healthy), "--prompt", LONG]) == 0
    assert load(Path("qprec-run.json")).explanation is None


@pytest.mark.parametrize(("failed", "asked"), [("fp16", "bf16"), ("fp32", "bf16")])
def test_a_step_is_not_made_again_where_another_dtype_is_asked_about(
    failed: str, asked: str, healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The reference runs in fp32 whatever is asked."""
    plant(monkeypatch, a_step)
    generated(healthy, [LONG], capsys)
    made = json.loads(Path("gen.json").read_text())
    made["dtypes"] = ["fp16", "bf16", "fp32"]
    for trip in made["generation"]["trips"]:
        trip["dtype"] = failed
    Path("gen.json").write_text(json.dumps(made))
    assert main(["probe", str(healthy), "--dtype", asked, "--prompts", "gen.json"]) == 0
    run = load(Path("qprec-run.json"))
    assert run.explanation is None and run.prompts[0].failed is not None and faults(judge(run)) == []


def test_a_prompt_that_was_cut_is_not_what_the_step_was_given(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    plant(monkeypatch, a_step)
    words = generated(healthy, [LONG], capsys)
    assert main([*words, "--max-tokens", "3"]) == 0
    assert load(Path("qprec-run.json")).prompts[0].failed is None


def test_a_step_of_another_checkpoint_is_not_made_again_and_that_is_said(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    plant(monkeypatch, a_step)
    generated(healthy, [LONG], capsys)
    other = make_checkpoint(Path("other"))
    assert main(["probe", str(other), "--dtype", "fp16", "--prompts", "gen.json"]) == 0
    assert "steps that failed not made again" in capsys.readouterr().out
    assert load(Path("qprec-run.json")).explanation is None


def test_the_record_of_the_probe_makes_the_same_steps_again(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    plant(monkeypatch, a_step)
    words = generated(healthy, [LONG], capsys)
    first, _ = probed(words, 1)
    Path("qprec-run.json").rename("first.json")
    again, finding = probed(["probe", str(healthy), "--dtype", "fp16", "--prompts", "first.json"], 1)
    assert again.prompts == first.prompts and finding.cause.kind == "cache"


@pytest.mark.parametrize("wrong", [{"step": 99}, {"rows": [1]}])
def test_a_step_that_a_prompt_cannot_be_of_is_refused(wrong: dict[str, Any], healthy: Path, capsys: Capture) -> None:
    main(["probe", str(healthy), "--dtype", "fp16", "--prompt", LONG])
    made = json.loads(Path("qprec-run.json").read_text())
    made["prompts"][0]["failed"] = {"dtype": "fp16", "step": 1, "rows": [0], "chunk": 0, **wrong}
    Path("qprec-run.json").write_text(json.dumps(made))
    capsys.readouterr()
    assert main(["report", "qprec-run.json"]) == 3
    assert "prompts.0.failed does not fit" in capsys.readouterr().err


def test_a_batch_that_a_record_holds_in_part_is_not_made_again(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    plant(monkeypatch, a_step)
    generated(healthy, [LONG, SHORT], capsys)
    made = json.loads(Path("gen.json").read_text())
    del made["generation"]["rows"][0]
    Path("gen.json").write_text(json.dumps(made))
    assert main(["probe", str(healthy), "--dtype", "fp16", "--prompts", "gen.json"]) == 0
    assert load(Path("qprec-run.json")).prompts[0].failed is None
