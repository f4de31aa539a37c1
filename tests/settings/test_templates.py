"""A chat template is a stranger's program: it may take some time, some memory and some text, and no more."""

import os
from pathlib import Path
from typing import Any

import pytest

from qwen_precision.cli import main
from qwen_precision.settings import templates
from qwen_precision.settings.templates import TemplateFault, in_template
from support.checkpoints import DEMO, edit_json

pytestmark = pytest.mark.usefixtures("scratch")

Capture = pytest.CaptureFixture[str]
TURNS = [{"role": "user", "content": "Hello"}]

HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "string": "{{ 'x' * 9999999999 }}",
    "strings": "{% set a = namespace(s='x' * 9999) %}{% for i in range(999) %}{% set a.s = a.s ~ a.s %}{% endfor %}",
    "power": "{% set ten = 10 %}{{ ten ** (ten ** 10) }}",
    "folded power": "{{ 10 ** 9999999999 }}",
    "list": "{% set a = [messages] * 999999999 %}",
    "format": "{{ '%999999999d' % 1 }}",
    "text": "{{ 'x' * 30000000 }}",
    "recursion": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "raise": "{{ raise_exception('no') }}",
    "syntax": "{% for %}",
}


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> Any:
    from transformers import AutoTokenizer

    monkeypatch.setattr(templates, "SECONDS", 1.0)
    monkeypatch.setattr(templates, "_endless", set())
    return AutoTokenizer.from_pretrained(DEMO)


def test_a_template_gives_what_transformers_makes_of_it(tokenizer: Any) -> None:
    for answer in (True, False):
        expected = tokenizer.apply_chat_template(TURNS, add_generation_prompt=answer, tokenize=False)
        assert in_template(TURNS, tokenizer, answer) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits need a child process")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_takes_too_much_or_fails_is_a_sentence(name: str, tokenizer: Any) -> None:
    tokenizer.chat_template = HOSTILE[name]
    with pytest.raises(TemplateFault, match=r"takes (longer|more) than|gives more than|fails \("):
        in_template(TURNS, tokenizer, answer=True)
    assert in_template.__module__ and not _children()


@pytest.mark.transformers
@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits need a child process")
def test_nothing_is_printed_of_the_child(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)  # as a user has it, and this suite does not
    tokenizer(["the", "only", "use", "that", "older tokenizers", "call parallel"])
    in_template(TURNS, tokenizer, answer=True)
    assert capfd.readouterr() == ("", "") and "TOKENIZERS_PARALLELISM" not in os.environ


def _children() -> list[str]:
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return path.read_text().split() if path.exists() else []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits need a child process")
def test_the_chat_prompt_of_such_a_checkpoint_is_left_out_and_that_is_said(
    broken: Path, tokenizer: Any, capsys: Capture
) -> None:
    (broken / "chat_template.jinja").write_text(HOSTILE["loops"])
    edit_json(broken / "tokenizer_config.json", chat_template=None)
    assert main(["probe", "model", "--dtype", "fp16", "--no-explain", "--full"]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "prompts left out" in told and "the checkpoint's chat template takes longer than" in told
    assert main(["generate", "model", "--chat"]) == 3
    assert "chat template takes longer than" in capsys.readouterr().err
