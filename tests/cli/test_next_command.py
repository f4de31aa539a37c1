"""What `qprec generate` prints after a failure, taken literally: it probes what the failing step was given."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qwen_precision.cli.app import main
from qwen_precision.judge.checks import judge
from qwen_precision.record.file import load, save
from qwen_precision.report.redact import redacted
from support.checkpoints import DEMO, SHAPES, make_checkpoint
from support.loud import says
from support.plants import ids_of
from support.runs import sentence

pytestmark = pytest.mark.usefixtures("scratch")

Capture = pytest.CaptureFixture[str]
PLACE = (1, "model.layers.1", "add", "residual add after mlp")


def half_a_character() -> int:
    """The first of the tokens that only together spell a character."""
    return next(ids[0] for ids in map(ids_of, "龘é🙂ß") if len(ids) > 1)


def merging() -> tuple[str, int]:
    """A text of one token, and a token that would merge with it, were they written side by side."""
    words = [(a, b) for a in "abcdefghijklmnopqrstuvwxyz" for b in "abcdefghijklmnopqrstuvwxyz"]
    first, second = next(pair for pair in words if len(ids_of("".join(pair))) == 1)
    return first, ids_of(second)[0]


def generated(folder: Path, prompts: list[str], capsys: Capture, *flags: str) -> list[str]:
    """Generate, and the words of the command that is named next."""
    asked = [word for text in prompts for word in ("--prompt", text)]
    main(["generate", str(folder), *asked, "--max-new-tokens", "3", "-o", "my gen.json", *flags])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Find it ")]
    assert len(lines) == 1
    words = shlex.split(lines[0].removeprefix("Find it"))
    assert words[0] == "qprec"
    return words[1:]


def rows(file: str) -> list[tuple[list[int], int]]:
    """Ids and padding of every row of every prompt of a record."""
    made = json.loads(Path(file).read_text())
    return [(row["ids"], row["padding"]) for prompt in made["prompts"] for row in prompt["rows"]]


def origin(file: str) -> tuple[tuple[Any, ...], int | None, int]:
    """Where the first finding of a probe is, and at which token: its id and place in the padded row."""
    place = judge(load(Path(file))).findings[0].place
    assert place.token is not None
    return (place.layer, place.module, place.op, place.name), place.token.id, place.token.position


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
def test_half_a_character_before_the_failure_reaches_the_probe(
    shape: str, attention: str, capsys: Capture, tmp_path: Path
) -> None:
    token = half_a_character()
    folder = make_checkpoint(tmp_path / "model", edit=says(token), **SHAPES[shape])
    words = generated(folder, ["abc"], capsys, "--attn", attention)
    assert main(words) == 1 and rows("qprec-run.json") == [([*ids_of("abc"), token], 0)]
    assert origin("qprec-run.json") == (PLACE, token, 3)


def test_a_token_that_would_merge_with_the_prompt_reaches_the_probe(capsys: Capture, tmp_path: Path) -> None:
    text, token = merging()
    folder = make_checkpoint(tmp_path / "model", edit=says(token))
    words = generated(folder, [text], capsys)
    assert main(words) == 1 and rows("qprec-run.json") == [([*ids_of(text), token], 0)]
    assert origin("qprec-run.json") == (PLACE, token, 1)


def test_a_failing_batch_is_probed_with_its_padding(capsys: Capture, tmp_path: Path) -> None:
    text, token = merging()
    folder = make_checkpoint(tmp_path / "model", edit=says(token))
    words = generated(folder, [text, "a b c d"], capsys)
    short, long = [*ids_of(text), token], [*ids_of("a b c d"), token]
    assert main(words) == 1 and rows("qprec-run.json") == [(short, len(long) - len(short)), (long, 0)]
    assert origin("qprec-run.json") == (PLACE, token, len(long) - 1)


def test_rows_of_one_length_are_probed_as_the_batch_they_were(capsys: Capture, tmp_path: Path) -> None:
    token = half_a_character()
    folder = make_checkpoint(tmp_path / "model", edit=says(token))
    assert main(generated(folder, ["a c", "b c"], capsys)) == 1
    assert rows("qprec-run.json") == [([*ids_of(text), token], 0) for text in ("a c", "b c")]
    assert [len(prompt.rows) for prompt in load(Path("qprec-run.json")).prompts] == [2]


def test_a_row_that_was_over_is_filled_up_as_it_was(capsys: Capture, tmp_path: Path) -> None:
    """Its end token is what it always says, so it ends at once; a minimum of new tokens keeps the other rows going."""
    end = half_a_character()
    folder = make_checkpoint(tmp_path / "model", edit=says(end, 10_000.0))
    pad = AutoTokenizer.from_pretrained(DEMO).pad_token_id
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, end], "pad_token_id": pad}))
    main(["generate", str(folder), "--prompt", "a", "--prompt", "b c", "--max-new-tokens", "4", "-o", "gen.json"])
    made = json.loads(Path("gen.json").read_text())
    trip = {"step": 2, "row": 1, "guard": "watch", "kind": "wholly bad", "dtype": "fp16", "why": "planted"}
    made["generation"]["rows"][1].update(ids=[end, end, end], tokens=["x"] * 3, top1=[1.0] * 3)
    made["generation"]["rows"][1].update(margin=[1.0] * 3, entropy=[0.0] * 3)
    unknown = ("logprob", "logprob_error", "mass_lost", "ranks", "changed")
    made["generation"]["rows"][1].update(dict.fromkeys(unknown, [None] * 3))
    made["generation"]["trips"] = [{**trip, "acted": False, "before": {}, "after": {}, "poisoned": None}]
    Path("gen.json").write_text(json.dumps(made))
    assert main(["probe", str(folder), "--prompts", "gen.json"]) == 0
    one, two = ids_of("a"), ids_of("b c")
    assert [ids for ids, _ in rows("qprec-run.json")] == [[*one, end, pad], [*two, end, end]]


def test_what_is_not_at_fault_gives_no_next_command(capsys: Capture, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", edit=says(half_a_character(), 10_000.0))
    assert main(["generate", str(folder), "--prompt", "abc", "--max-new-tokens", "3"]) == 0
    assert "Find it" not in capsys.readouterr().out


def test_a_prompt_that_fails_by_itself_is_named_as_text(capsys: Capture) -> None:
    words = generated(DEMO, ["Hello there"], capsys)
    assert words[-2:] == ["--prompt", "Hello there"]
    assert main(words) == 1 and rows("qprec-run.json") == [(ids_of("Hello there"), 0)]


def test_a_chat_turn_that_fails_is_probed_with_its_template(capsys: Capture) -> None:
    words = generated(DEMO, ["Hello"], capsys, "--chat")
    (given,) = rows("my gen.json")
    assert len(given[0]) > len(ids_of("Hello")) and words[-2:] == ["--prompts", "my gen.json"]
    assert main(words) == 1 and rows("qprec-run.json") == [given]


def test_the_device_that_was_asked_for_is_asked_for_again(capsys: Capture) -> None:
    assert "--device cpu" in " ".join(generated(DEMO, ["Hello there"], capsys, "--device", "cpu"))


def test_a_run_saved_under_any_name_is_read_as_one(capsys: Capture) -> None:
    generated(DEMO, ["Hello there"], capsys)
    Path("my gen.json").rename("gen")
    main(["probe", "demo", "--prompts", "gen"])
    assert rows("qprec-run.json") == [(ids_of("Hello there"), 0)]


def test_the_prompts_of_a_probe_are_its_ids_and_not_its_text(capsys: Capture, tmp_path: Path) -> None:
    token = half_a_character()
    folder = make_checkpoint(tmp_path / "model", edit=says(token))
    main(generated(folder, ["abc"], capsys))
    assert main(["probe", str(folder), "--prompts", "qprec-run.json", "-o", "again.json"]) == 1
    assert rows("again.json") == rows("qprec-run.json") and origin("again.json") == origin("qprec-run.json")


def test_a_saved_generation_given_to_generate_is_that_generation_again(capsys: Capture, tmp_path: Path) -> None:
    text, token = merging()
    folder = make_checkpoint(tmp_path / "model", edit=says(token))
    generated(folder, [text, "a b c d"], capsys)
    main(["generate", str(folder), "--prompts", "my gen.json", "--max-new-tokens", "3", "-o", "again.json"])
    one, two = (json.loads(Path(name).read_text())["generation"] for name in ("my gen.json", "again.json"))
    assert rows("again.json") == rows("my gen.json")
    assert [row["ids"] for row in one["rows"]] == [row["ids"] for row in two["rows"]]


def test_ids_that_a_report_made_up_are_refused(capsys: Capture) -> None:
    generated(DEMO, ["Hello there"], capsys)
    save(redacted(load(Path("my gen.json"))), Path("redacted.json"))
    capsys.readouterr()
    for verb in ("probe", "generate"):
        assert main([verb, "demo", "--prompts", "redacted.json"]) == 2
        assert sentence(capsys) == (
            "qprec: --prompts: redacted.json is redacted, its token ids are made up; give the record as it was saved."
        )


@pytest.mark.parametrize(("token", "said"), [(-1, "token id -1"), (99_999, "99999")])
def test_an_id_that_no_embedding_has_is_refused(token: int, said: str, capsys: Capture) -> None:
    main(["probe", "demo", "--dtype", "bf16", "--prompt", "Hello", "-o", "a.json"])
    made = json.loads(Path("a.json").read_text())
    made["prompts"][0]["rows"][0]["ids"][0] = token
    Path("a.json").write_text(json.dumps(made))
    capsys.readouterr()
    assert main(["probe", "demo", "--prompts", "a.json"]) == 2 and said in capsys.readouterr().err


def test_a_file_of_prompts_cannot_bring_ids_of_its_own(capsys: Capture) -> None:
    Path("p.yaml").write_text("- name: x\n  rows: [{text: a, ids: [1], tokens: [a], padding: 0}]\n")
    assert main(["probe", "demo", "--prompts", "p.yaml"]) == 2
    assert "only a saved run" in capsys.readouterr().err
