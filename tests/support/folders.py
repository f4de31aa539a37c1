"""Folders of records: measured by the command in this process, or made up from small runs."""

import math
from pathlib import Path
from typing import Any

from qwen_precision.blocks import Folder, Plan, Told, for_block, plan_for
from qwen_precision.cli import main
from qwen_precision.judge.checks import judge
from qwen_precision.record import Run, joined
from qwen_precision.record.file import load
from qwen_precision.settings import Corpus, load_settings
from support.builders import HEALTHY, a_pass, a_prompt, a_run, an_event

LARGEST = 65_504.0
TEXTS = ["The capital of France is", "Hello", "上海有个非常出名的地方，", "def f(x):", "1, 2, 3, 4", "import os"]


def write_texts(folder: Path, texts: list[str] = TEXTS) -> Path:
    """A corpus of a prompt a line."""
    path = folder / "corpus.txt"
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def measured(out: Path, *words: str) -> int:
    """Exit code of a probe into a folder."""
    return main(["probe", *words, "-o", f"{out}/", "-q"])


def records(out: Path, source: str | None = None) -> list[Run]:
    """All of a folder, or those of a checkpoint, in the order of the corpus."""
    runs = [run for run in map(load, Folder(out).records()) if source in (None, run.model.source)]
    return sorted(runs, key=lambda run: (run.sweep is not None, run.settings["block"]["block"]["first"]))


def readings(run: Run) -> dict[tuple[Any, ...], Any]:
    """Every number of every pass, by what it is of; NaN as a word, for it equals nothing."""
    found: dict[tuple[Any, ...], Any] = {}
    for each in run.passes:
        key, told = (
            (each.dtype, run.prompts[each.prompt].name),
            each.model_dump(exclude={"prompt", "abs_max", "events"}),
        )
        found[key] = repr(told)
        for site, value in zip(run.sites, each.abs_max, strict=True):
            if value is not None:
                found[*key, site.module, site.op, site.call] = repr(value)
        for event in each.events:
            site = run.sites[event.site]
            told = event.model_dump(exclude={"site", "step"})
            found[*key, site.module, site.op, site.call, event.row, event.expert, event.clean_weights] = repr(told)
    return found


def all_readings(out: Path, source: str | None = None) -> dict[tuple[Any, ...], Any]:
    """Those of a folder, as if one process had measured all of its prompts."""
    return readings(joined([run for run in records(out, source) if run.sweep is None]))


def made_up(
    out: Path,
    sizes: list[float],
    block: int = 2,
    sources: tuple[str, ...] = ("a",),
    skip: set[int] | None = None,
    text: str = "text",
) -> Plan:
    """A folder in which prompt ``n`` reaches ``sizes[n]`` in fp32; blocks whose number is in ``skip`` are not there."""
    out.mkdir(exist_ok=True)
    corpus = Corpus([f"{text} {n}" for n in range(len(sizes))], None, block)
    plan = plan_for(sources, None, load_settings(None, {"dtypes": ["fp16"]}), corpus)
    folder = Folder(out)
    folder.prepare()
    folder.keep(plan)
    for item in plan.items():
        part = sizes[item.block.first : item.block.first + item.block.count]
        if item.block.first // block not in (skip or set()):
            run = _run_of(item.source, item.block.first, part, text)
            weights = f"weights of {item.source}"
            told = {prompt.name: Told(key, True) for prompt, key in zip(run.prompts, item.block.keys, strict=True)}
            folder.save(plan.key(weights, item.block), judge(for_block(run, weights, plan, item.block, told)), (0, 1))
    return plan


def _run_of(source: str, first: int, sizes: list[float], text: str) -> Run:
    prompts = [a_prompt(f"prompt {first + n + 1}", f"{text} {first + n}") for n in range(len(sizes))]
    passes = []
    for number, size in enumerate(sizes):
        column = [*HEALTHY[:4], size, HEALTHY[5]]
        close = {"layer_error": [1e-4 * (number + 1)], "kl": [1e-3 * size], "logprob_error": [0.1]}
        ours, bad = [*HEALTHY[:4], size if size < LARGEST else math.inf, HEALTHY[5]], [an_event(4)]
        passes.append(a_pass("fp32", column, prompt=number))
        passes.append(a_pass("fp16", ours, bad if size > LARGEST else [], prompt=number, **close))
    run = a_run(passes, dtypes=["fp16"], prompts=prompts)
    return run.model_copy(update={"model": run.model.model_copy(update={"source": source})})
