"""Folders and files that are no checkpoint qprec can read, though each is whole: what it is, and what to do with it.

A row a thing: how it is recognised (by names of files and by config.json), and the rest of the sentence. Without them
such a folder would be called incomplete, which sends its owner off to download it again.
"""

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qwen_precision.errors import QprecError
from qwen_precision.model.index import read_json
from qwen_precision.record import Choice

ADAPTER = "adapter_config.json"
_PEFT = {
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
    "FEATURE_EXTRACTION": "FeatureExtraction",
    "SEQ_2_SEQ_LM": "Seq2SeqLM",
}
"""By an adapter's ``task_type``: the end of the class of peft that opens it, which refuses any other."""
_MODULES = "modules.json"
"""Of sentence-transformers: a model, and what follows it."""
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_ORIGINAL = "probe the checkpoint it was made from"


class Foreign(NamedTuple):
    """One thing that is not read."""

    there: Callable[[Path, dict[str, Any]], bool]
    """Whether a folder, with what is in its config.json, is one."""
    sentence: Callable[[Path, dict[str, Any]], str]
    """What it is and what to do, behind the name of the folder."""


def check_readable(folder: Path, raw: dict[str, Any]) -> None:
    """Refuse what is known not to be read.

    Args:
        folder: the checkpoint.
        raw: what its config.json holds; empty where it has none.

    Raises:
        QprecError: it is one of ``FOREIGN``.
    """
    for row in FOREIGN:
        if row.there(folder, raw):
            raise QprecError(f"{folder}: {row.sentence(folder, raw)}.")


def file_in_words(path: Path) -> str:
    """What a single file is, given in place of a folder."""
    return {
        ".onnx": f"is an ONNX graph, which qprec does not read; {_ORIGINAL}",
        ".bin": "is a pickle, which can run code when loaded; give a folder with safetensors in it",
    }.get(path.suffix, "is a file; give the checkpoint's folder")


def beside(folder: Path) -> Iterator[Choice]:
    """Notes of what lies beside a whole model and is not run with it."""
    if (folder / ADAPTER).is_file():
        reason = f"{ADAPTER} is there, and a whole model too: the model alone is run; merge the adapter to probe both"
        yield Choice(what="adapter", value="not applied", reason=reason)
    if (folder / _MODULES).is_file():
        reason = f"{_MODULES} is sentence-transformers': the model alone is run, not what follows it"
        yield Choice(what="pooling", value="not run", reason=reason)


def _files(folder: Path, pattern: str) -> bool:
    """Whether there are such files, and no safetensors of a whole model."""
    return any(folder.glob(pattern)) and not any((folder / name).is_file() for name in _WEIGHTS)


def _merge(folder: Path, raw: dict[str, Any]) -> str:
    try:
        told = read_json(folder / ADAPTER, "")
    except QprecError:
        told = {}
    base, made = told.get("base_model_name_or_path"), _PEFT.get(str(told.get("task_type")), "CausalLM")
    if not isinstance(base, str):
        return f"is an adapter (LoRA), no whole model, and {ADAPTER} names no base; merge it into its base with peft"
    merged = f"{folder.name or 'model'}-merged"
    speaks = str(folder) if (folder / "tokenizer_config.json").is_file() else base  # tokens may have been added
    code = (
        f"from peft import AutoPeftModelFor{made} as A; from transformers import AutoTokenizer as T; "
        f"A.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained({merged!r}); "
        f"T.from_pretrained({speaks!r}).save_pretrained({merged!r})"
    )
    return (
        f"is an adapter (LoRA) for {base}, no whole model; merge the two and probe {merged}: "
        f"python -c {shlex.quote(code)}"
    )


def _first_module(folder: Path) -> Path | None:
    """The model of an older sentence-transformers folder."""
    return next((each.parent for each in sorted(folder.glob("0_*/config.json"))), None)


def _method(raw: dict[str, Any]) -> str:
    settings = raw.get("quantization_config")
    return str(settings.get("quant_method", "")) if isinstance(settings, dict) else ""


def _bitsandbytes(raw: dict[str, Any]) -> str:
    kind = "8-bit" if raw["quantization_config"].get("load_in_8bit") else "4-bit"
    return (
        f"its weights are packed by bitsandbytes ({kind}), which only its own kernels unpack; {_ORIGINAL}, or save it "
        "unpacked (transformers: model.dequantize(), then save_pretrained)"
    )


FOREIGN = (
    Foreign(
        lambda folder, raw: not raw and (folder / _MODULES).is_file() and bool(_first_module(folder)),
        lambda folder, raw: (
            f"is of sentence-transformers, with the model in a folder of its own; give {_first_module(folder)}"
        ),
    ),
    Foreign(lambda folder, raw: _files(folder, ADAPTER), _merge),
    Foreign(
        lambda folder, raw: _files(folder, "*.onnx") or _files(folder, "onnx/*.onnx"),
        lambda folder, raw: f"holds an ONNX graph, no weights by name; {_ORIGINAL}",
    ),
    Foreign(
        lambda folder, raw: (
            _method(raw) in ("modelopt", "")
            and (_method(raw) == "modelopt" or (folder / "hf_quant_config.json").is_file())
        ),
        lambda folder, raw: (
            f"its weights are quantised by NVIDIA's ModelOpt, whose layout qprec does not read; {_ORIGINAL}, or "
            "an export in compressed-tensors' layout"
        ),
    ),
    Foreign(
        lambda folder, raw: _method(raw) == "bitsandbytes",
        lambda folder, raw: _bitsandbytes(raw),
    ),
    Foreign(
        lambda folder, raw: isinstance(raw.get("quantization"), dict) and "group_size" in raw["quantization"],
        lambda folder, raw: (
            "its weights are quantised by MLX for Apple's GPUs, whose layout qprec does not read; "
            f"{_ORIGINAL}, or unpack it (mlx_lm.convert --dequantize)"
        ),
    ),
)
"""In the order in which they are tried."""
