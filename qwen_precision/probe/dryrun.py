"""What a probe would take: download, memory, way and rough time, told without reading or fetching a weight."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig

from qwen_precision.errors import QprecError, in_one_line
from qwen_precision.model import (
    build,
    choose_device,
    choose_memory,
    download_bytes,
    gguf_on_hub,
    is_here,
    is_layerwise,
    outline,
    without_weights,
)
from qwen_precision.probe.run import prepare, working_bytes
from qwen_precision.progress import lasting
from qwen_precision.record import Choice
from qwen_precision.settings import ProbeSettings, PromptSpec
from qwen_precision.torch_dtypes import torch_dtype

_TOKENS = 128
"""Of a prompt whose tokens cannot be counted, because its tokenizer is not here."""
_READ = 0.5e9
"""Bytes a second that a disk gives, at the least."""


def dry_run(
    source: str, settings: ProbeSettings, specs: Sequence[PromptSpec], revision: str | None = None
) -> Iterator[tuple[str, str]]:
    """Pairs of a name and a sentence, as soon as each is known.

    Raises:
        QprecError: as ``prepare`` does, for what is not about weights.
    """
    if not is_here(source, revision):
        yield from _from_afar(source, settings, specs, revision)
        return
    job = prepare(source, settings, specs, revision)
    yield "download", "none: it is on this machine"
    yield from ((each.what, f"{each.value} ({each.reason})") for each in job.choices)
    tokens = sum(len(row.ids) for prompt in job.prompts for row in prompt.rows)
    yield "prompts", f"{len(job.prompts)}, {tokens:,} tokens"
    yield "time", _time(job.checkpoint.parameters, job.checkpoint.weight_bytes, tokens, job.passes, job.device)


def _from_afar(
    source: str, settings: ProbeSettings, specs: Sequence[PromptSpec], revision: str | None
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
    yield "prompts", f"{len(specs)}, taken as {_TOKENS} tokens each"
    yield "time", _time(parameters, weights, tokens, settings.dtypes, device)


def _memory(
    folder: Path, source: str, settings: ProbeSettings, device: torch.device, weights: int
) -> tuple[torch.nn.Module, Choice]:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise QprecError(f"{source}: its config.json cannot be used ({in_one_line(error)}).") from error
    if not is_layerwise(config):
        model = outline(config, settings.attention)
        reason = "run as transformers loads it, one dtype after another: in fp32 twice the bytes of 16-bit weights"
        return model, Choice(what="memory", value="whole", reason=reason)
    model = build(config, settings.attention)
    return model, choose_memory(settings.memory, device, weights, working_bytes(model))[1]


def _time(parameters: int, weights: int, tokens: int, dtypes: Sequence[str], device: torch.device) -> str:
    """Two operations a parameter and token, at the speed of one product made now; and the reading."""
    parts = {dtype: 2 * parameters * tokens / _speed(dtype, device) for dtype in dtypes}
    reading = weights / _READ
    each = ", ".join(f"{dtype} {seconds:.0f} s" for dtype, seconds in parts.items())
    total = lasting(sum(parts.values()) + reading)
    return f"roughly {total} of arithmetic and reading ({each}); controls after a failure add to it"


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
