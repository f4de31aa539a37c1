"""What this machine is and what is chosen because of it; every choice comes with its reason."""

import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from qwen_precision.errors import QprecError, UsageError
from qwen_precision.record import Choice

_NO_MEMORY = re.compile(
    r"out of memory|not enough memory|can't allocate memory|cannot allocate memory|STATUS_ALLOC_FAILED", re.IGNORECASE
)
"""As torch, the C library, cuBLAS and cuDNN say it."""

REDUCED_SUMS = (
    "allow_fp16_accumulation",
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
)
"""Flags of ``torch.backends.cuda.matmul`` under which a card keeps sums, or parts of them, in 16 bits; the first is
there since torch 2.7.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html (reduced precision reduction; full fp16 accumulation).
"""

_SHARE = 0.7  # of the free memory that weights and buffers may take; the rest is for activations


def choose_device(asked: str) -> tuple[torch.device, Choice]:
    """The device to compute on.

    Raises:
        UsageError: not a device name.
        QprecError: a device this machine does not have.
    """
    if asked == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda:0"), Choice(what="device", value="cuda:0", reason="auto: a CUDA device is here")
        if torch.backends.mps.is_available():
            return torch.device("mps"), Choice(what="device", value="mps", reason="auto: Apple's GPU is here")
        return torch.device("cpu"), Choice(what="device", value="cpu", reason="auto: no GPU is here")
    kind, _, number = asked.partition(":")
    if kind not in {"cpu", "cuda", "mps"} or (number and (kind != "cuda" or not number.isdigit())):
        raise UsageError(f"--device {asked}: unknown; expected auto, cpu, cuda, cuda:N or mps.")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if kind == "cuda" and not torch.cuda.is_available():
        raise QprecError(f"--device {asked}: this machine has no CUDA device that torch can use; try --device cpu.")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise QprecError("--device mps: this machine has no Apple GPU that torch can use; try --device cpu.")
    if number and int(number) >= count:
        raise QprecError(f"--device {asked}: this machine has {count} CUDA device(s); use cuda:0 to cuda:{count - 1}.")
    name = "cuda:0" if asked == "cuda" else asked
    return torch.device(name), Choice(what="device", value=name, reason="asked for")


def choose_memory(asked: str, device: torch.device, weight_bytes: int, working_bytes: int) -> tuple[bool, Choice]:
    """Whether to keep the weights resident.

    Args:
        asked: ``auto``, ``resident`` or ``streamed``.
        weight_bytes: all weights as they are kept: in the files' dtype, quantised ones in float32.
        working_bytes: the cast copies of the largest part.
    """
    if asked != "auto":
        return asked == "resident", Choice(what="memory", value=asked, reason="asked for")
    free = free_bytes(device)
    need = weight_bytes + working_bytes
    fits = need <= _SHARE * free
    size = f"{need / 2**30:.1f} GiB" if need >= 2**30 else f"{need / 2**20:.0f} MiB"
    relation = "at most" if fits else "more than"
    reason = f"auto: needs {size}, {relation} {_SHARE:.0%} of the {free / 2**30:.1f} GiB free on {device}"
    return fits, Choice(what="memory", value="resident" if fits else "streamed", reason=reason)


def attention_used(model: Any, asked: str | None) -> Choice:
    """The attention implementation that a model of transformers has."""
    used = str(getattr(model.config, "_attn_implementation", "unknown"))
    return Choice(what="attention", value=used, reason="asked for" if asked else "transformers' own choice")


def free_bytes(device: torch.device) -> int:
    """Memory free on a device, with what torch keeps; on the CPU no more than the container's limit leaves."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    free = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        return min(free, int(limit) - int(used)) if limit.isdigit() else free
    except (OSError, ValueError):
        return free


@contextmanager
def exact_float32(device: torch.device) -> Iterator[list[Choice]]:
    """fp32 products in fp32, where something switched TF32 on: with its 10 bits the reference would be none.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices (also
    by the environment variable TORCH_ALLOW_TF32_CUBLAS_OVERRIDE).
    """
    flags = torch.backends.cuda.matmul
    before = flags.allow_tf32
    if device.type != "cuda" or not before:
        yield []
        return
    flags.allow_tf32 = False
    try:
        yield [Choice(what="TF32", value="off", reason="it was on, and has 10 bits where the fp32 reference needs 23")]
    finally:
        flags.allow_tf32 = before


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says so: torch's own is a RuntimeError, on the CPU a bare one."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or bool(_NO_MEMORY.search(str(error)))


def environment(device: torch.device) -> dict[str, str]:
    """What a maintainer asks for first: versions, hardware, and the flags that change arithmetic."""
    facts = {
        "python": sys.version.split()[0],
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
    }
    for package in ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub"):
        facts[package] = metadata.version(package)
    for package in ("accelerate", "numpy"):  # not needed, but asked for in bug reports
        with suppress(metadata.PackageNotFoundError):
            facts[package] = metadata.version(package)
    if device.type == "cuda":
        facts["cuda"] = str(torch.version.cuda)
        matmul = torch.backends.cuda.matmul
        for flag in ("allow_tf32", *REDUCED_SUMS):
            if hasattr(matmul, flag):
                facts[flag] = str(getattr(matmul, flag))
    return facts
