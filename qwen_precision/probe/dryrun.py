"""What a probe would take: download, memory, way and rough time, told without reading or fetching a weight."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig

from qwen_precision.errors import QprecError, in_one_line
from qwen_precision.model import (
    arranged,
    asked_once,
    choose_device,
    choose_memory,
    download_bytes,
    gguf_on_hub,
    is_here,
    layers_of,
    without_weights,
)
from qwen_precision.probe.run import prepare, working_bytes
from qwen_precision.progress import lasting
from qwen_precision.record import Choice
from qwen_precision.settings import ProbeSettings, PromptSpec
from qwen_precision.torch_dtypes import torch_dtype

_TOKENS = 128
"""Of a prompt whose tokens cannot be counted, because its tokenizer is not here."""
_WATCHED = 1e-3
"""Seconds that a layer takes for a prompt beside its products: every operation is watched. Of many short ones most."""
_READ = 0.5e9
"""Bytes a second that a disk gives, at the least."""


class Load(NamedTuple):
    """What is run through a checkpoint."""

    prompts: int
    tokens: int
    """Roughly."""
    blocks: int
    """So many times its weights are read."""


def dry_run(
    source: str,
    settings: ProbeSettings,
    specs: Sequence[PromptSpec],
    revision: str | None = None,
    load: Load | None = None,
) -> Iterator[tuple[str, str]]:
    """Pairs of a name and a sentence, as soon as each is known.

    Args:
        source, settings, specs, revision: as for ``probe``.
        load: what is run where the prompts are only a few of it; nothing is said of prompts then.

    Raises:
        QprecError: as ``prepare`` does, for what is not about weights.
    """
    if not is_here(source, revision):
        with asked_once():
            yield from _from_afar(source, settings, specs, revision, load)
        return
    job = prepare(source, settings, specs, revision)
    yield "download", "none: it is on this machine"
    yield from ((each.what, f"{each.value} ({each.reason})") for each in job.choices)
    tokens = sum(len(row.ids) for prompt in job.prompts for row in prompt.rows)
    if load is None:
        yield "prompts", f"{len(job.prompts)}, {tokens:,} tokens"
    load = load or Load(len(job.prompts), tokens, 1)
    layers = len(layers_of(job.model)[1])
    yield "time", _time(load, job.checkpoint.parameters, job.checkpoint.weight_bytes, layers, job.passes, job.device)


def _from_afar(
    source: str, settings: ProbeSettings, specs: Sequence[PromptSpec], revision: str | None, load: Load | None
) -> Iterator[tuple[str, str]]:
    total, weights = download_bytes(source, revision)
    yield "download", f"{total / 1e9:.2f} GB, of which {weights / 1e9:.2f} GB are weights"
    if gguf_on_hub(source, revision):
        yield "memory and time", "not known before the download: what the model is stands in its GGUF file alone"
        return
    folder = without_weights(source, revision)
    device, choice = choose_device(settings.device)
    yield choice.what, f"{choice.value} ({choice.reason})"
    model, memory = _memory(folder, source, settings, device, weights)
    yield memory.what, f"{memory.value} ({memory.reason})"
    tokens = sum(_TOKENS * len(spec.texts()) for spec in specs)
    parameters = sum(each.numel() for each in model.parameters())
    if load is None:
        yield "prompts", f"{len(specs)}, taken as {_TOKENS} tokens each"
    load = load or Load(len(specs), tokens, 1)
    yield "time", _time(load, parameters, weights, len(layers_of(model)[1]), settings.dtypes, device)


def _memory(
    folder: Path, source: str, settings: ProbeSettings, device: torch.device, weights: int
) -> tuple[torch.nn.Module, Choice]:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise QprecError(f"{source}: its config.json cannot be used ({in_one_line(error)}).") from error
    model, why = arranged(config, settings.attention)
    if why is not None:
        reason = "run as transformers loads it, one dtype after another: in fp32 twice the bytes of 16-bit weights"
        return model, Choice(what="memory", value="whole", reason=reason)
    return model, choose_memory(settings.memory, device, weights, working_bytes(model))[1]


def _time(load: Load, parameters: int, weights: int, layers: int, dtypes: Sequence[str], device: torch.device) -> str:
    """Two operations a parameter and token, at the speed of one product made now; what a layer costs; the reading."""
    watched = load.prompts * layers * _WATCHED
    parts = {dtype: 2 * parameters * load.tokens / _speed(dtype, device) + watched for dtype in dtypes}
    reading = load.blocks * weights / _READ
    each = ", ".join(f"{dtype} {seconds:.0f} s" for dtype, seconds in parts.items())
    total = lasting(sum(parts.values()) + reading)
    return f"roughly {total} of computing and reading ({each}); controls after a failure add to it"


def _speed(dtype: str, device: torch.device) -> float:
    """Operations a second of a matrix product in a dtype: the best of three."""
    left = torch.ones(64, 1024, dtype=torch_dtype(dtype), device=device)
    right = torch.ones(1024, 2048, dtype=torch_dtype(dtype), device=device)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        float((left @ right)[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2 * 64 * 1024 * 2048 / best
