"""A tokenizer.json is a program: what would multiply a text is refused unread, real ones pass, a panic is told."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_precision.cli import main
from qwen_precision.errors import QprecError
from qwen_precision.model.steps import check_steps
from support.checkpoints import edit_json
from support.runs import sentence

pytestmark = pytest.mark.usefixtures("scratch")

Capture = pytest.CaptureFixture[str]


def replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def in_a_row(key: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", key: list(steps)}


TEXT = {"Sequence": {"id": "A", "type_id": 0}}

BOMBS: dict[str, dict[str, Any]] = {
    "texts": {"normalizer": in_a_row("normalizers", *[replace("ll", String="l")] * 13)},
    "in a list in a list": {
        "normalizer": in_a_row("normalizers", *[in_a_row("normalizers", *[replace("ll", String="l")] * 5)] * 3)
    },
    "a regex that matches nothing": {"normalizer": in_a_row("normalizers", *[replace("l", Regex="(?=l)")] * 13)},
    "one text": {"normalizer": replace("l" * 5000, String="l")},
    "prepended": {"normalizer": in_a_row("normalizers", *[{"type": "Prepend", "prepend": "l"}] * 13)},
    "bytes of bytes": {"pre_tokenizer": in_a_row("pretokenizers", *[{"type": "ByteLevel"}] * 13)},
    "over two keys": {
        "normalizer": replace("l" * 4000, String="l"),
        "pre_tokenizer": in_a_row("pretokenizers", *[{"type": "ByteLevel"}] * 2),
    },
    "out": {"decoder": in_a_row("decoders", *[replace("ll", String="l")] * 40)},
    "steps": {"decoder": in_a_row("decoders", *[{"type": "Fuse"}] * 65)},
    "a template that doubles": {
        "post_processor": in_a_row("processors", *[{"type": "TemplateProcessing", "single": [TEXT, TEXT]}] * 13)
    },
    "a template of many": {"post_processor": {"type": "TemplateProcessing", "single": [TEXT] * 65}},
}


@pytest.mark.parametrize("what", BOMBS)
def test_steps_that_multiply_a_text_are_refused_before_the_tokenizer_is_loaded(what: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(BOMBS[what]))
    with pytest.raises(
        QprecError, match=r"tokenizer\.json: \w+: holds (more than 64 steps|steps that multiply a text)"
    ):
        check_steps(tmp_path)


def test_a_tokenizer_of_another_version_of_transformers_is_looked_at_too(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.4.0.0.json").write_text(json.dumps(BOMBS["out"]))
    with pytest.raises(QprecError, match=r"tokenizer\.4\.0\.0\.json: decoder"):
        check_steps(tmp_path)


STRIP, FUSE = {"type": "Strip", "content": " ", "start": 1, "stop": 0}, {"type": "Fuse"}
REAL: dict[str, dict[str, Any]] = {
    "Gemma": {
        "normalizer": replace("▁", String=" "),
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"},
        "decoder": in_a_row("decoders", replace(" ", String="▁"), {"type": "ByteFallback"}, FUSE),
    },
    "Llama 2": {
        "normalizer": in_a_row("normalizers", {"type": "Prepend", "prepend": "▁"}, replace("▁", String=" ")),
        "decoder": in_a_row("decoders", replace(" ", String="▁"), {"type": "ByteFallback"}, FUSE, STRIP),
    },
    "Qwen": {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": in_a_row("pretokenizers", {"type": "Split"}, {"type": "ByteLevel"}),
        "post_processor": {"type": "ByteLevel"},
    },
    "XLNet": {
        "normalizer": in_a_row(
            "normalizers",
            replace('"', String="``"),
            replace('"', String="''"),
            {"type": "NFKD"},
            {"type": "StripAccents"},
            {"type": "Lowercase"},
            {"type": "Precompiled", "precompiled_charsmap": "AAAAAAA="},
            replace(" ", Regex=" {2,}"),
        ),
        "pre_tokenizer": {"type": "Metaspace"},
    },
}


@pytest.mark.parametrize("name", REAL)
def test_real_lists_of_steps_pass(name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(REAL[name]))
    check_steps(tmp_path)


@pytest.mark.parametrize("verb", [["probe", "model", "--dtype", "fp16"], ["generate", "model"]])
def test_a_panic_of_the_tokenizer_is_a_sentence(verb: list[str], broken: Path, capsys: Capture) -> None:
    plain = json.loads((broken / "tokenizer.json").read_text())["pre_tokenizer"]
    endless = {"type": "Split", "pattern": {"Regex": "(x+x+)+[qz]"}, "behavior": "Isolated", "invert": False}
    edit_json(broken / "tokenizer.json", pre_tokenizer=in_a_row("pretokenizers", endless, plain))
    given = ["--prompt", "z" + "x" * 44 + "!z"]
    assert main([*verb, *given]) == 3
    assert "model: transformers fails on this checkpoint (PanicException" in sentence(capsys)


def test_whatever_is_raised_ends_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    class Panic(BaseException):
        """As Rust code raises it."""

    def panics(*args: object, **kwargs: object) -> None:
        raise Panic("gave up")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("qwen_precision.cli.app.app", panics)
    assert main(["probe", "demo"]) == 3
    assert "Panic: gave up" in sentence(capsys)
