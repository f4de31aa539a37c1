"""Files that once broke a promise, kept as they were: each gets at most one sentence, and an exit code from 0 to 3.

The folder that a file is in says what it stands for: the values of ``config.json/`` go over those of the demo's file,
what is in ``header/`` becomes the header of its weights, and so on. A new file needs no line here.
"""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwen_precision.cli import main
from qwen_precision.settings import templates
from support.checkpoints import DEMO

pytestmark = pytest.mark.usefixtures("scratch")

HOSTILE = Path(__file__).parent.parent / "fixtures" / "hostile"
ON_A_MODEL = [
    ["probe", "model", "--dtype", "fp16", "--no-explain", "--fail-on", "never"],
    ["generate", "model", "--chat", "--max-new-tokens", "2", "--fail-on", "never"],
]


def over(file: Path) -> None:
    """Its values over those of the demo's file of the folder's name; what is no object takes its place."""
    path, text = Path("model", file.parent.name), file.read_text()
    if text.startswith("{"):
        text = json.dumps({**json.loads(path.read_text()), **json.loads(text)})
    path.write_text(text)


def as_header(file: Path) -> None:
    weights, header = Path("model/model.safetensors"), file.read_bytes()
    data = weights.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    weights.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def as_index(file: Path) -> None:
    Path("model/model.safetensors").rename("model/other.safetensors")
    shutil.copyfile(file, "model/model.safetensors.index.json")


def as_template(file: Path) -> None:
    shutil.copyfile(file, "model/chat_template.jinja")


def none(file: Path) -> None:
    """It is named in the command."""


KINDS: dict[str, Callable[[Path], None]] = {
    "config.json": over,
    "tokenizer.json": over,
    "tokenizer_config.json": over,
    "generation_config.json": over,
    "header": as_header,
    "index": as_index,
    "template": as_template,
    "record": none,
    "engine": none,
    "yaml": none,
}


def commands(file: Path) -> Iterator[list[str]]:
    """What a user would do with it."""
    if file.parent.name == "record":
        yield from (["report", str(file), *more] for more in ([], ["--format", "junit"], ["-o", "page.html"]))
    elif file.parent.name == "engine":
        yield ["report", str(HOSTILE.parent / "demo-probe.json"), "--engine", str(file)]
    elif file.parent.name == "yaml":
        yield ["probe", "demo", "--config", str(file)]
        yield ["probe", "demo", "--prompts", str(file)]
        yield ["generate", "demo", "--guards", str(file)]
    else:
        yield from ON_A_MODEL


FILES = sorted(path for path in HOSTILE.rglob("*") if path.is_file())


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}"[:60])
def test_a_file_that_once_broke_a_promise_gets_a_sentence(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(templates, "SECONDS", 1.0)
    monkeypatch.setattr(templates, "_endless", set())
    shutil.copytree(DEMO, "model")
    KINDS[file.parent.name](file)
    for words in commands(file):
        code = main(words)
        told = capsys.readouterr()
        said = [line for line in told.err.splitlines() if line.startswith("qprec: ")]
        assert code in (0, 1, 2, 3) and len(said) == (code > 1 and not told.out), (words, told)
        assert "Traceback" not in told.err and "bug in qprec" not in told.err, told.err
        assert "\x1b" not in told.out + told.err
