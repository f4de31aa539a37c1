"""`qprec generate` through `main`: what is printed where, exit codes, one sentence a mistake, no half files."""

import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qwen_precision.cli.app import main
from qwen_precision.judge.checks import judge
from qwen_precision.record.file import load
from qwen_precision.render.text import room
from support.checkpoints import DEMO, edit_json
from support.generations import ANSWER, PROMPT
from support.runs import sentence

Capture = pytest.CaptureFixture[str]


pytestmark = pytest.mark.usefixtures("scratch")


def untimed(text: str) -> str:
    return re.sub(r"\S+ ms a step|time [^)]*\)", "took #", " ".join(text.split()))  # the number moves the line's end


def report_json(path: str, capsys: Capture) -> dict[str, Any]:
    capsys.readouterr()
    main(["report", path, "--format", "json"])
    return dict(json.loads(capsys.readouterr().out))


def test_without_guards_the_demo_prints_exclamation_marks_and_exits_with_1(capsys: Capture) -> None:
    assert main(["generate", "demo", "--dtype", "fp16", "--no-guards"]) == 1
    out = capsys.readouterr().out
    assert '"!!!!!!!!' in out and "degenerate-text" in out and "fp16      FAIL" in out
    assert f"qprec probe demo --dtype fp16 --prompt '{PROMPT}'" in out
    data = report_json("qprec-gen.json", capsys)
    kinds = {finding["kind"]: finding for finding in data["findings"]}
    assert data["verdict"] == {"fp16": "fail"} and data["exit_code"] == 1
    assert kinds["degenerate-text"]["step"] == 0 and kinds["nonfinite-logits"]["row"] == 0


def test_the_command_that_is_named_next_finds_the_origin(capsys: Capture) -> None:
    import shlex

    main(["generate", "demo", "--no-guards"])
    out = capsys.readouterr().out
    command = next(line.removeprefix("Find it") for line in out.splitlines() if line.startswith("Find it"))
    assert main(shlex.split(command)[1:]) == 1
    assert "Starts    layer 3, down_proj output" in capsys.readouterr().out


def test_with_guards_the_demo_answers_and_says_how(capsys: Capture) -> None:
    assert main(["generate", "demo", "--dtype", "fp16", "-o", "gen.json"]) == 0
    out = capsys.readouterr().out
    assert f'"{ANSWER}"' in out and "Computed again in bf16" in out and "qprec report gen.json" in out
    assert main(["generate", "demo", "--dtype", "fp16", "-o", "gen.json", "--full"]) == 0
    out = capsys.readouterr().out
    assert "recovered" in out and "in bf16" in out
    assert main(["generate", "demo", "--fail-on", "risk", "-o", "gen.json"]) == 1
    capsys.readouterr()
    assert main(["report", "gen.json"]) == 0
    assert untimed(capsys.readouterr().out) == untimed(out)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ([], 0),
        (["--no-guards"], 1),
        (["--guards", "off"], 1),
        (["--guards", "observe"], 1),
        (["--guards", "strict"], 1),
        (["--on-failure", "stop"], 1),
        (["--on-failure", "fallback"], 0),
        (["--no-guards", "--do-sample"], 1),
        (["--no-guards", "--fail-on", "never"], 0),
        (["--dtype", "bf16", "--fail-on", "risk"], 0),
    ],
)
def test_the_exit_code_says_how_it_ended(options: list[str], code: int, capsys: Capture) -> None:
    assert main(["generate", "demo", "--max-new-tokens", "8", *options]) == code


def test_no_guards_is_the_profile_off(capsys: Capture) -> None:
    rows = []
    for options in (["--no-guards"], ["--guards", "off"]):
        main(["generate", "demo", *options, "-o", "gen.json"])
        made = json.loads(Path("gen.json").read_text())["generation"]
        rows.append((made["rows"], made["guards"]))
    assert rows[0] == rows[1]


def test_several_prompts_are_one_left_padded_batch(capsys: Capture) -> None:
    assert main(["generate", "demo", "--dtype", "fp32", "--prompt", PROMPT, "--prompt", "The quick"]) == 0
    out = capsys.readouterr().out
    assert ANSWER in out and "brown fox" in out and "row 1" in out
    Path("texts.txt").write_text(f"{PROMPT}\nThe quick\n", encoding="utf-8")
    assert main(["generate", "demo", "--dtype", "fp32", "--prompts", "texts.txt"]) == 0
    again = capsys.readouterr().out
    assert untimed(again) == untimed(out)


def test_stream_prints_tokens_as_they_come(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    import qwen_precision.cli.terminal as terminal

    pieces, whole = [], terminal.result
    monkeypatch.setattr(terminal, "result", lambda text: (pieces.append(text), whole(text))[0])
    assert main(["generate", "demo", "--dtype", "fp32", "--stream"]) == 0
    assert capsys.readouterr().out.startswith(f"{ANSWER}\n\nqprec generate demo")
    assert len(pieces) > 4


def test_a_streamed_character_of_several_tokens_is_printed_whole() -> None:
    from transformers import AutoTokenizer

    import qwen_precision.cli.terminal as terminal

    tokenizer, sink = AutoTokenizer.from_pretrained(DEMO), io.StringIO()
    text = "naïve 漢字 🙂 and a tail that is long enough to go past what is kept"
    with pytest.MonkeyPatch.context() as patch, terminal.streaming() as (_, on_token):
        patch.setattr(terminal, "result", sink.write)
        for token in tokenizer(text)["input_ids"]:
            on_token(tokenizer, 0, token)
    assert sink.getvalue().rstrip("\n") == text


def test_streamed_text_is_whole_where_a_token_ends_in_the_middle_of_a_character() -> None:
    class Bytes:
        pieces = (b"a", b" \xe4", b"\xbd\xa0", b"a", b" x\xe4")

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return b"".join(self.pieces[each] for each in ids).decode(errors="replace")

    import qwen_precision.cli.terminal as terminal

    sink = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, terminal.streaming() as (_, on_token):
        patch.setattr(terminal, "result", sink.write)
        for token in range(5):
            on_token(Bytes(), 0, token)
    assert sink.getvalue().rstrip("\n") == "a 你a x"


def test_a_stdout_that_goes_away_ends_the_printing_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Gone())
    assert main(["generate", "demo", "--dtype", "fp32", "--stream"]) == 3
    made = json.loads(Path("qprec-gen.json").read_text())
    assert made["stopped"] is None and made["generation"]["rows"][0]["text"] == ANSWER


def test_what_is_named_next_is_one_inert_line_that_a_shell_reads_back(capsys: Capture) -> None:
    prompt = PROMPT + "\x1b[31mX\n\u202e[red]it's"
    main(["generate", "demo", "--guards", "strict", "--prompt", prompt])
    out = capsys.readouterr().out
    assert not {"\x1b", "\u202e"} & set(out)
    command = next(line.removeprefix("Find it").strip() for line in out.splitlines() if line.startswith("Find it"))
    done = subprocess.run(["bash", "-c", f'set -- {command}; printf %s "${{@: -1}}"'], capture_output=True, check=True)
    assert done.stdout.decode() == prompt


def test_a_prompt_too_long_for_a_command_line_is_read_from_the_record(capsys: Capture) -> None:
    main(["generate", "demo", "--no-guards", "--max-new-tokens", "2", "--prompt", PROMPT * 30, "-o", "gen.json"])
    assert "qprec probe demo --dtype fp16 --prompts gen.json" in capsys.readouterr().out
    assert main(["probe", "demo", "--dtype", "fp16", "--prompts", "gen.json"]) == 1
    assert "layer 3, down_proj output" in capsys.readouterr().out
    probed = json.loads(Path("qprec-run.json").read_text())
    assert probed["prompts"][0]["rows"][0]["text"] == PROMPT * 30


def test_the_prompts_of_a_probe_can_be_used_again(capsys: Capture) -> None:
    main(["probe", "demo", "--dtype", "bf16", "--prompt", "Hello", "-o", "a.json"])
    assert main(["probe", "demo", "--dtype", "bf16", "--prompts", "a.json", "-o", "b.json"]) == 0
    one, two = (json.loads(Path(name).read_text())["prompts"] for name in ("a.json", "b.json"))
    assert one == two


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0, "do_sample": True},
        {"repetition_penalty": 0},
        {"top_k": -5, "do_sample": True},
        {"top_k": "5", "do_sample": True},
        {"eos_token_id": "a"},
        {"no_repeat_ngram_size": "a"},
        {"bad_words_ids": "q"},
        {"suppress_tokens": [99999]},
        {"suppress_tokens": "x"},
    ],
    ids=str,
)
def test_a_generation_config_that_transformers_refuses_is_one_sentence(
    settings: dict[str, Any], broken: Path, capsys: Capture
) -> None:
    edit_json(broken / "generation_config.json", **settings)
    assert main(["generate", str(broken), "--dtype", "fp32", "--max-new-tokens", "4"]) in (0, 3)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and "bug" not in captured.err
    if not captured.out:
        assert "generation_config.json" in captured.err and len(captured.err.splitlines()) == 1


def test_nothing_but_our_own_lines_is_on_stderr(broken: Path, capsys: Capture) -> None:
    edit_json(broken / "generation_config.json", min_new_tokens=100)
    main(["generate", str(broken), "--dtype", "fp32", "--max-new-tokens", "3"])
    assert [line[:5] for line in capsys.readouterr().err.splitlines()] == ["saved"]


def test_a_checkpoint_without_any_tokenizer_file_is_named(broken: Path, capsys: Capture) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (broken / name).unlink()
    assert main(["generate", str(broken)]) == 3
    assert "tokenizer" in sentence(capsys)


def test_chat_puts_the_prompt_into_the_template(capsys: Capture) -> None:
    assert main(["generate", "demo", "--dtype", "fp32", "--chat", "--max-new-tokens", "3"]) == 0
    made = json.loads(Path("qprec-gen.json").read_text())["generation"]
    assert made["chat"] and made["rows"][0]["input"].startswith("<|im_start|>user\n" + PROMPT)


def test_settings_known_to_make_it_worse_are_advice_and_never_a_failure(capsys: Capture) -> None:
    options = ["--do-sample", "--temperature", "0.1", "--repetition-penalty", "1.8", "--fail-on", "risk"]
    assert main(["generate", "demo", "--dtype", "fp32", *options]) == 0
    found = report_json("qprec-gen.json", capsys)["findings"]
    assert [(each["kind"], each["severity"], each["name"]) for each in found] == [
        ("advice", "info", "temperature"),
        ("advice", "info", "repetition penalty"),
    ]


def test_a_probe_of_the_same_checkpoint_gives_advice(capsys: Capture) -> None:
    main(["probe", "demo", "--dtype", "fp16", "-o", "probe.json"])
    main(["generate", "demo", "--probe-run", "probe.json"])
    found = report_json("qprec-gen.json", capsys)
    least = room(judge(load(Path("probe.json"))).headroom["fp16"][0].headroom)
    assert f"headroom {least} at layer 3" in next(f["cause"] for f in found["findings"] if f["kind"] == "advice")


def test_a_base_model_asked_to_chat_is_advice(broken: Path, capsys: Capture) -> None:
    edit_json(broken / "generation_config.json", eos_token_id=507)
    main(["generate", str(broken), "--dtype", "fp32", "--chat", "--max-new-tokens", "2"])
    assert "base model" in capsys.readouterr().out
    main(["generate", "demo", "--dtype", "fp32", "--chat", "--max-new-tokens", "2"])
    assert "base model" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--temperature", "-1"], ["--temperature", "above 0", "--greedy"]),
        (["--temperature", "0"], ["--temperature", "--greedy"]),
        (["--temperature", "nan"], ["--temperature"]),
        (["--top-p", "0"], ["--top-p", "greater than 0"]),
        (["--top-p", "1.5"], ["--top-p"]),
        (["--top-k", "-1"], ["--top-k"]),
        (["--min-p", "2"], ["--min-p"]),
        (["--repetition-penalty", "0"], ["--repetition-penalty"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens"]),
        (["--seed", "-1"], ["--seed"]),
        (["--dtype", "fp7"], ["fp7", "fp16"]),
        (["--guards", "nope"], ["--guards nope", "default, observe, off, strict"]),
        (["--guards", "missing.yaml"], ["--guards missing.yaml", "No such file"]),
        (["--no-guards", "--guards", "strict"], ["--no-guards", "--guards"]),
        (["--no-guards", "--on-failure", "stop"], ["--no-guards", "--on-failure"]),
        (["--on-failure", "rescale", "--dtype", "bf16"], ["--on-failure rescale", "fp16", "fallback"]),
        (["--on-failure", "pray"], ["pray", "fallback"]),
        (["--prompt", ""], ["--prompt", "empty"]),
        (["--prompt", "x", "--prompts", "y"], ["--prompt and --prompts"]),
        (["--prompt", "word " * 600], ["context is 512", "shorten"]),
        (["--prompts", "missing.txt"], ["missing.txt"]),
        (["--attn", "flash"], ["flash", "sdpa"]),
        (["--device", "tpu"], ["--device tpu"]),
    ],
)
def test_a_wrong_request_gets_one_sentence_and_exit_code_2(
    options: list[str], words: list[str], capsys: Capture
) -> None:
    assert main(["generate", "demo", *options]) == 2
    line = sentence(capsys)
    assert all(word in line for word in words), line
    assert not Path("qprec-gen.json").exists()


def test_what_cannot_be_run_gets_one_sentence_and_exit_code_3(broken: Path, capsys: Capture) -> None:
    def refused(*words: str) -> None:
        assert main(["generate", str(broken)]) == 3
        line = sentence(capsys)
        assert all(word in line for word in words), line
        shutil.rmtree(broken)
        shutil.copytree(DEMO, broken)

    (broken / "tokenizer.json").unlink()
    refused("tokenizer")
    (broken / "generation_config.json").write_text("{")
    refused("generation_config.json")
    edit_json(broken / "generation_config.json", temperature="warm", do_sample=True)
    refused("generation_config.json", "temperature")
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused("model.safetensors", "truncated")
    assert main(["generate", "demo", "--probe-run", "missing.json"]) == 3
    assert "missing.json" in sentence(capsys)
    assert main(["generate", "./no-such-folder"]) == 3
    assert "no-such-folder" in sentence(capsys)


def test_a_chat_without_a_template_says_to_use_raw(broken: Path, capsys: Capture) -> None:
    (broken / "chat_template.jinja").unlink()
    edit_json(broken / "tokenizer_config.json", chat_template=None)
    assert main(["generate", str(broken), "--chat"]) == 2
    assert "--raw" in sentence(capsys)


def test_a_generation_given_as_a_probe_is_refused(capsys: Capture) -> None:
    main(["generate", "demo", "--dtype", "fp32", "-o", "gen.json"])
    capsys.readouterr()
    assert main(["generate", "demo", "--probe-run", "gen.json"]) == 2
    assert "qprec generate" in sentence(capsys)


def test_an_output_that_is_an_input_is_refused(broken: Path, capsys: Capture) -> None:
    main(["probe", "demo", "--dtype", "fp16", "--prompt", "Hello", "-o", "probe.json"])
    Path("mine.yaml").write_text("clamp: false")
    capsys.readouterr()
    for options in (
        ["demo", "--probe-run", "probe.json", "-o", "probe.json"],
        ["demo", "--guards", "mine.yaml", "-o", "mine.yaml"],
        [str(broken), "-o", str(broken / "gen.json")],
    ):
        assert main(["generate", *options]) == 3
        assert "would write over what is read" in sentence(capsys)
    assert Path("mine.yaml").read_text() == "clamp: false"


def test_ways_of_decoding_that_are_not_sampling_are_left_out_and_that_is_told(broken: Path, capsys: Capture) -> None:
    edit_json(broken / "generation_config.json", num_beams=4)
    assert main(["generate", str(broken), "--dtype", "fp32"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "left out num_beams=4" in out and ANSWER in out


def test_sampling_flags_without_sampling_are_told_to_have_no_effect(capsys: Capture) -> None:
    assert main(["generate", "demo", "--dtype", "fp32", "--temperature", "0.7"]) == 0
    assert "no effect --temperature" in " ".join(capsys.readouterr().out.split())


def test_more_tokens_than_the_context_holds_are_cut_and_that_is_told(capsys: Capture) -> None:
    assert main(["generate", "demo", "--dtype", "fp32", "--max-new-tokens", "9999"]) == 0
    assert "the context is 512" in " ".join(capsys.readouterr().out.split())


def test_ctrl_c_saves_what_was_generated(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    import qwen_precision.generate.decode as decode

    accept = decode.Session._accept

    def interrupted(self: Any, state: Any, drawn: Any) -> None:
        if state.step == 2:
            raise KeyboardInterrupt
        accept(self, state, drawn)

    monkeypatch.setattr(decode.Session, "_accept", interrupted)
    assert main(["generate", "demo", "--dtype", "fp32"]) == 3
    saved = json.loads(Path("qprec-gen.json").read_text())
    assert saved["stopped"] == "interrupted" and len(saved["generation"]["rows"][0]["ids"]) == 2
    assert "Stopped   interrupted" in capsys.readouterr().out
