"""A model in one GGUF file: found, and read into what a checkpoint folder consists of.

What reads its parts is imported when there is such a file: it needs the library ``gguf``.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from qwen_precision.errors import QprecError
from qwen_precision.model.ggufheader import first_part, read_header
from qwen_precision.model.index import TensorInfo


@dataclass(frozen=True)
class GgufModel:
    """What a GGUF file holds."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    tensors: dict[str, TensorInfo]
    """By the names of the model's parameters."""
    unused: list[str]
    """Tensors that no parameter is made of."""


def is_gguf(path: Path) -> bool:
    """Whether a file calls itself GGUF."""
    return path.suffix.lower() == ".gguf"


def gguf_of(path: Path) -> Path | None:
    """The GGUF file that was given, or is the only model of a folder; None where there is none.

    Raises:
        QprecError: the folder holds several.
    """
    if not path.is_dir():
        return path if is_gguf(path) else None
    if any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").is_file():
        return None
    found = sorted({first_part(each) for each in path.iterdir() if is_gguf(each) and each.is_file()})
    if len(found) > 1:
        names = ", ".join(each.name for each in found[:6]) + (", …" if len(found) > 6 else "")
        raise QprecError(f"{path}: holds {len(found)} GGUF files ({names}); give one of them.")
    return found[0] if found else None


def read_gguf(path: Path) -> GgufModel:
    """Everything but the weights.

    Raises:
        QprecError: it is broken, or not of a kind that transformers knows, or a library is missing.
    """
    header = read_header(path)
    if importlib.util.find_spec("gguf") is None:
        raise QprecError(f'{path}: reading GGUF needs the library gguf; install it: pip install "gguf>=0.10".')
    from qwen_precision.model.ggufmodel import DIVISORS, read_config, read_tokenizer
    from qwen_precision.model.gguftensors import read_tensors

    config, told = read_config(header, path)
    tensors, unused = read_tensors(header, config, told, path)
    if told["rope_scaling"] is not None and told["rope_scaling"]["rope_type"] == "longrope":
        unused = [name for name in unused if name not in DIVISORS]
    return GgufModel(config, read_tokenizer(header, config, path), tensors, unused)
