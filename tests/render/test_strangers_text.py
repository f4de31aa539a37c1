"""Whatever stands in a prompt, a path or a cause: every rendering is what its format says, and nothing in it acts."""

import json
import re
from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from qwen_precision.judge import judge
from qwen_precision.record import Run
from qwen_precision.render import FORMATS, View, safe
from qwen_precision.render.markdown import escaped
from support.builders import hostile_run, hostile_text_run

TEXTS = [
    "\x00\x01\x08\x0b",
    "\ud800",
    "\ufffe\uffff\U0001fffe",
    "]]><b>&\"'",
    "\x1b[2J\x1b]0;title\x07",
    "%0A::error::x%25",
    "\r\n::error file=x::y",
    "\u202e\u2028\x85",
    "|`*_~[x](y)<!-- --><script>",
]


@pytest.mark.parametrize("make", [hostile_run, hostile_text_run])
@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_every_rendering_is_well_formed(text: str, make: Callable[[str], Run]) -> None:
    view = View((judge(make(text)),), "fail")
    out = {name: str(each.render(view)) for name, each in FORMATS.items() if not each.binary}
    for name, shown in out.items():
        assert shown.encode("utf-8"), name
        assert "\x1b" not in shown, name
    for name in ("junit", "svg"):
        ElementTree.fromstring(out[name])
    json.loads(out["json"])
    compile(out["repro"], "repro.py", "exec")
    assert all(re.match(r"::(error|warning|notice) title=[^\r\n]*::", line) for line in out["github"].splitlines())
    assert "<script" not in out["html"]


def test_a_hidden_character_is_spelled_so_that_it_can_be_read_back() -> None:
    text = "\x1b\u202e\ufffe\U0001fffe\U000e0001"
    assert safe(text) == "\\u001b\\u202e\\ufffe\\U0001fffe\\U000e0001"
    assert safe(text).encode().decode("unicode_escape") == text


@pytest.mark.parametrize(
    ("text", "links"),
    [
        ("@user", "@user"),
        ("&#64;user", "@user"),
        ("#1", "#1"),
        ("\\#1", "#1"),
        ("owner/repo#12", "#12"),
        ("GH-1", "GH-1"),
        ("gh-22", "gh-22"),
        ("da39a3ee5e6b4b0d3255bfef95601890afd80709", "da39a3ee5e6b4b0d3255bfef95601890afd80709"),
    ],
)
def test_nothing_of_it_is_a_mention_an_issue_or_a_commit_on_github(text: str, links: str) -> None:
    """GitHub looks at the text after Markdown took back slashes and entities away; a space of no width stops it."""
    shown = re.sub(r"\\([^\w])", r"\1", escaped(text)).replace("&#8203;", "\u200b")
    assert links not in shown and "\u200b" in shown
