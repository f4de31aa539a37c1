"""Folders of records: measured by the command in this process, or made up from small runs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_precision.blocks import Folder, Plan, Told, for_block, plan_for
from qwen_precision.cli import main
from qwen_precision.judge.checks import judge
from qwen_precision.record import Run, joined
from qwen_precision.record.file import load
from qwen_precision.settings import Corpus, load_settings
from support.builders import HEALTHY, a_cost, a_pass, a_prompt, a_run, an_event, an_upcast

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
    texts: Mapping[int, str] | None = None,
    weights: str | None = None,
    share: tuple[int, int] = (0, 1),
    dtypes: Sequence[str] = ("fp16",),
    unfit: Mapping[int, str] | None = None,
) -> Plan:
    """A folder in which prompt ``n`` reaches ``sizes[n]`` in fp32; blocks whose number is in ``skip`` are not there.

    Args:
        texts: of some prompts, in place of those made of ``text``.
        weights: of all checkpoints; each has its own without.
        share: that all records say they were measured as.
        unfit: prompts that are left out of their record, and why.
    """
    out.mkdir(exist_ok=True)
    every = {n: f"{text} {n}" for n in range(len(sizes))} | dict(texts or {})
    corpus = Corpus(list(every.values()), None, block)
    settings = load_settings(None, {"dtypes": list(dtypes)})
    plan = plan_for(sources, None, settings, corpus)
    folder = Folder(out)
    folder.prepare()
    folder.keep(plan)
    for source in sources:
        folder.remember(source, None, weights or f"weights of {source}")
    for item in plan.items():
        first = item.block.first
        if first // block in (skip or set()):
            continue
        numbers = range(first, first + item.block.count)
        told = {f"prompt {n + 1}": Told(key, True) for n, key in zip(numbers, item.block.keys, strict=True)}
        left = {told[f"prompt {n + 1}"].key: why for n, why in (unfit or {}).items() if n in numbers}
        run = _run_of(item.source, {n: sizes[n] for n in numbers if n not in (unfit or {})}, every)
        mine = weights or f"weights of {item.source}"
        made = for_block(run.model_copy(update={"settings": settings.model_dump()}), mine, plan, item.block, told, left)
        folder.save(plan.key(mine, item.block), judge(made), share)
    return plan


def _run_of(source: str, sizes: Mapping[int, float], texts: Mapping[int, str]) -> Run:
    prompts = [a_prompt(f"prompt {n + 1}", texts[n]) for n in sizes]
    passes = []
    for number, (place, size) in enumerate(sizes.items()):
        column = [*HEALTHY[:4], size, HEALTHY[5]]
        close = {"layer_error": [1e-4 * (number + 1)], "kl": [1e-3 * size], "logprob_error": [0.1]}
        lost = {"logprob_rms": 1e-6 * size, "mass_lost": 1e-8 * size, "loss_in_dtype": 2.3451 + 1e-8 * size}
        worth = None if size > LARGEST else an_upcast(tokens=place + 1, **lost)
        ours, bad = [*HEALTHY[:4], size if size < LARGEST else math.inf, HEALTHY[5]], [an_event(4)]
        passes.append(a_pass("fp32", column, prompt=number))
        passes.append(a_pass("fp16", ours, bad if size > LARGEST else [], prompt=number, upcast=[worth], **close))
    logits = a_cost(steps=len(sizes), whole_prompt_bytes=2048 * int(max(sizes.values())))
    run = a_run(passes, dtypes=["fp16"], prompts=prompts, logits=logits)
    return run.model_copy(update={"model": run.model.model_copy(update={"source": source})})
