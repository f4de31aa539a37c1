"""The table of formats: a new one is a file here and a row in ``FORMATS``; command line, help and tests read it."""

from collections.abc import Callable
from dataclasses import dataclass

from qwen_precision.render.github import render_github
from qwen_precision.render.html import render_html
from qwen_precision.render.json import render_json
from qwen_precision.render.junit import render_junit
from qwen_precision.render.markdown import render_markdown
from qwen_precision.render.pictures import render_png, render_svg
from qwen_precision.render.repro.script import render_repro
from qwen_precision.render.screen import render_screen
from qwen_precision.render.table.table import render_table
from qwen_precision.render.view import View


@dataclass(frozen=True)
class Format:
    """One way to show reports."""

    render: Callable[[View], str | bytes]
    suffixes: tuple[str, ...]
    """Of ``-o``, by which it is chosen."""
    about: str
    binary: bool = False
    """Whether it needs a file: it is not for a terminal."""


FORMATS: dict[str, Format] = {
    "screen": Format(render_screen, (), "the answer, on one screen of a terminal"),
    "table": Format(render_table, (".txt",), "everything, for a terminal"),
    "markdown": Format(render_markdown, (".md",), "for a bug report or a pull request"),
    "html": Format(render_html, (".html", ".htm"), "one page with pictures; no network, no script"),
    "json": Format(render_json, (".json",), "for scripts; stable keys, JSON Schema in configs/schema"),
    "junit": Format(render_junit, (".xml",), "for CI servers: a case a check, the passing ones too"),
    "svg": Format(render_svg, (".svg",), "headroom by layer and bytes of logits by length, as a picture"),
    "png": Format(render_png, (".png",), "the same, for places that take images only", binary=True),
    "repro": Format(render_repro, (".py",), "forty lines of torch and transformers that fail by themselves"),
    "github": Format(render_github, (), "GitHub annotations, and a job summary where GITHUB_STEP_SUMMARY is set"),
}
