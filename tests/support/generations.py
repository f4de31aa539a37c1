"""Generations for tests: run one in a line, plant a fault at a known step, and plain transformers beside it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_precision.dtypes import DTYPES
from qwen_precision.generate.run import generate
from qwen_precision.model.lanes import cache_argument
from qwen_precision.model.loaded import Models
from qwen_precision.record.run import Run
from qwen_precision.settings.config import load_generate_settings
from qwen_precision.settings.guards import GuardSettings, load_guards
from qwen_precision.settings.prompts import read_prompts
from support.checkpoints import DEMO

PROMPT, ANSWER = "上海有个非常出名的地方，", "叫做外滩，晚上灯光很美。"
BATCH = ["The quick brown", "Hello", "上海有个非常出名的地方，"]

Fault = Callable[[int, torch.Tensor, Any], None]
"""Called with the step, the ``[rows, vocabulary]`` logits of the last position (write into them) and the cache."""


def run(
    source: str | Path = "demo",
    prompts: Sequence[str] = (PROMPT,),
    guards: str | GuardSettings = "default",
    **flags: Any,
) -> Run:
    how = load_guards(guards) if isinstance(guards, str) else guards
    more = {key: flags.pop(key) for key in ("probe_run", "progress", "on_token") if key in flags}
    return generate(str(source), load_generate_settings(flags), how, read_prompts(list(prompts), None), **more)


def settings(**guards: Any) -> GuardSettings:
    return GuardSettings.model_validate(guards)


def ids_of(run: Run) -> list[list[int]]:
    assert run.generation is not None
    return [row.ids for row in run.generation.rows]


def trips_of(run: Run, guard: str | None = None) -> list[tuple[int, int, str, str]]:
    """(step, row, guard, kind) of every trip."""
    assert run.generation is not None
    return [(t.step, t.row, t.guard, t.kind) for t in run.generation.trips if guard in (None, t.guard)]


def plain(
    folder: Path, prompts: Sequence[str], dtype: str, seed: int = 0, attention: str = "sdpa", **options: Any
) -> list[list[int]]:
    """What transformers' own generate gives: ids without padding after the end."""
    torch_dtype = getattr(torch, DTYPES[dtype].torch_name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype, attn_implementation=attention).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True)
    torch.manual_seed(seed)
    out = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)
    rows = out[:, batch["input_ids"].shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return [row[: next((n + 1 for n, token in enumerate(row) if token in ends), len(row))] for row in rows]


def plant(monkeypatch: pytest.MonkeyPatch, fault: Fault, dtypes: Sequence[str] = ("fp16",)) -> list[str]:
    """Every model loaded in one of ``dtypes`` has this fault; gives the dtypes in the order they were loaded."""
    load, loaded = Models._load, []

    def with_fault(self: Models, dtype: str) -> Any:
        model = load(self, dtype)
        loaded.append(dtype)
        step = {"now": 0}

        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            fault(step["now"], out.logits[:, -1], kwargs[cache_argument(module)])
            step["now"] += 1

        if dtype in dtypes:
            model.register_forward_hook(hook, with_kwargs=True)
        return model

    monkeypatch.setattr(Models, "_load", with_fault)
    return loaded


__all__ = ["ANSWER", "BATCH", "DEMO", "PROMPT", "ids_of", "plain", "plant", "run", "settings", "trips_of"]
