"""A checkpoint on disk: its config, its tokenizer and an index of its tensors; no weight is read here.

Nothing of the checkpoint's own Python code is ever run.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qwen_precision.errors import ENDS, QprecError, in_one_line
from qwen_precision.model.foreign import beside, check_readable
from qwen_precision.model.gate import check_tokenizer, foreign_faults, read_config, tamed
from qwen_precision.model.gguffile import gguf_of, read_gguf
from qwen_precision.model.index import TensorInfo, read_index
from qwen_precision.model.quantised import unquantised
from qwen_precision.model.skeleton import model_class
from qwen_precision.model.steps import check_steps
from qwen_precision.qwen3 import EMBEDDING, HEAD
from qwen_precision.record import Choice

_WITHOUT_HEAD = frozenset(("Qwen3Model", "Qwen3MoeModel"))
"""Architectures that are the causal language model but for its lm_head."""


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint folder."""

    folder: Path
    source: str
    """What the user typed."""
    revision: str | None
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    tensors: dict[str, TensorInfo]
    """By name; a quantised weight is one, under the name it would have if it were not."""
    notes: tuple[Choice, ...] = ()
    """What a reader of the report has to know of the folder."""
    gguf: str | None = None
    """The GGUF file that all of it was read from."""

    @property
    def text_config(self) -> Any:
        """What of the config is about text: all of it, or a part, where the model reads images too."""
        return self.config.get_text_config()

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.size for info in self.tensors.values())

    @property
    def given_out(self) -> int:
        """Bytes of all tensors once they are read: quantised weights become float32."""
        return sum(info.given_out for info in self.tensors.values())

    @property
    def context(self) -> int | None:
        """Tokens of the longest sequence that it takes: where rotary embeddings are stretched by a factor (YaRN and
        others), that many times the positions it was trained with. None if its config names none."""
        longest: int | None = getattr(self.text_config, "max_position_embeddings", None)
        if longest is None:
            return None
        told = [getattr(self.text_config, name, None) for name in ("rope_parameters", "rope_scaling")]
        given = [each for each in told if isinstance(each, dict)]
        kinds = given + [each for one in given for each in one.values() if isinstance(each, dict)]  # by type of layer
        return max([longest, *(_stretched(each, longest) for each in kinds)])

    @property
    def quantised(self) -> str | None:
        """How weights are quantised, in words, or None."""
        found = dict.fromkeys(info.packed.what for info in self.tensors.values() if info.packed is not None)
        return ", ".join(found) or None

    @property
    def only_read(self) -> str | None:
        """Why weights cannot be written back in the form in which they are kept, or None."""
        if self.quantised is not None:
            return f"the weights are quantised, as {self.quantised}"
        return None if self.gguf is None else "the weights are in a GGUF file"

    @property
    def parameters(self) -> int:
        """How many numbers all tensors hold."""
        return sum(info.elements for info in self.tensors.values())

    @property
    def bare(self) -> bool:
        """Whether this is a model without lm_head, as embedding models are: its answer is its final hidden states.

        A tied one has no lm_head in its files either way; there the names tell what it was saved from.
        """
        if not _names_a_head(self.config.architectures):
            return True
        saved_bare = not getattr(self.config, "tie_word_embeddings", False) or EMBEDDING in self.tensors
        return HEAD not in self.tensors and saved_bare

    @property
    def source_dtype(self) -> str:
        """The format that most of the numbers are in."""
        count: dict[str, int] = {}
        for info in self.tensors.values():
            count[info.dtype] = count.get(info.dtype, 0) + info.elements
        return max(count, key=lambda name: count[name])


def _stretched(rope: dict[str, Any], longest: int) -> int:
    factor, trained = rope.get("factor"), rope.get("original_max_position_embeddings") or longest
    if not isinstance(factor, (int, float)) or not isinstance(trained, int) or not math.isfinite(factor):
        return 0
    return int(factor * trained)


def open_checkpoint(folder: Path, source: str, revision: str | None = None) -> Checkpoint:
    """Check a folder, or a GGUF file, and read all that is small.

    Raises:
        QprecError: it is not a causal language model in safetensors or GGUF, or it is damaged; the message
            names the file.
    """
    path = gguf_of(folder)
    if path is not None:
        return _open_gguf(path, source, revision)
    if not folder.is_dir():
        raise QprecError(f"{source}: is not a folder; give a checkpoint folder, a hub id (owner/name) or `demo`.")
    if not (folder / "config.json").exists():
        check_readable(folder, {})
    raw = read_config(folder)
    check_readable(folder, raw)
    _check_config(raw, folder)
    config = _load_config(folder)
    _check_class(config, folder / "config.json")
    tensors = read_index(folder)
    settings = raw.get("quantization_config")
    if settings:
        tensors = unquantised(tensors, settings if isinstance(settings, dict) else {}, folder)
    checkpoint = Checkpoint(folder, source, revision, config, _load_tokenizer(folder), tensors)
    return replace(checkpoint, notes=tuple(_notes(checkpoint, raw)))


def _open_gguf(path: Path, source: str, revision: str | None) -> Checkpoint:
    read = read_gguf(path)
    checkpoint = Checkpoint(path.parent, source, revision, read.config, read.tokenizer, read.tensors, gguf=path.name)
    notes = [*_notes(checkpoint, {})]
    if read.unused:
        value = read.unused[0] + (f" and {len(read.unused) - 1} more" if len(read.unused) > 1 else "")
        reason = "transformers makes no parameter of it"
        notes.append(Choice(what="tensors not used", value=value, reason=reason))
    return replace(checkpoint, notes=tuple(notes))


def _notes(checkpoint: Checkpoint, raw: dict[str, Any]) -> Iterator[Choice]:
    if checkpoint.quantised is not None:
        engine = "W8A8, NVFP4, MXFP4" if checkpoint.gguf is None else "llama.cpp's Q8 blocks"
        reason = (
            "each to float32 once, and from there to each dtype; activations run in the dtype asked for: quantised "
            f"ones ({engine}) are not imitated"
        )
        yield Choice(what="weights", value=f"dequantised from {checkpoint.quantised}", reason=reason)
    if "auto_map" in raw:
        reason = f"config.json points at code of the checkpoint's own, which is not run; {raw['model_type']} is known"
        yield Choice(what="code", value="transformers' own", reason=reason)
    if getattr(checkpoint.config, "is_encoder_decoder", False):
        reason = "with nothing written yet, it is given what the encoder reads, one token later"
        yield Choice(what="decoder", value="reads the prompt too", reason=reason)
    if checkpoint.gguf is None:
        yield from beside(checkpoint.folder)


def _check_config(raw: dict[str, Any], folder: Path) -> None:
    path = folder / "config.json"
    if "auto_map" in raw and raw.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise QprecError(
            f"{path}: this model needs Python code of its own ({raw.get('model_type')!r} is no model of transformers), "
            "which qprec does not run; probe a checkpoint that transformers loads without trust_remote_code."
        )


def _check_class(config: PretrainedConfig, path: Path) -> None:
    """Transformers must have the model that is named; a causal one may be of a class of its own maker."""
    names = config.architectures if isinstance(config.architectures, list) else []
    if not _names_a_head(names) and model_class(config) is AutoModelForCausalLM:
        found = ", ".join(map(str, names)) or "no architecture"
        raise QprecError(
            f"{path}: names {found}, which is no {config.model_type} model of this transformers; try a newer one, or "
            "compare config.json with the hub's."
        )


def _names_a_head(architectures: Any) -> bool:
    return any(str(name).endswith("ForCausalLM") for name in architectures or [])


def _load_config(folder: Path) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever the broken value leads to
        raise QprecError(f"{folder / 'config.json'}: transformers cannot read it: {in_one_line(error)}") from error
    if not isinstance(config, PretrainedConfig):
        raise QprecError(f"{folder / 'config.json'}: transformers cannot read it.")
    config.__dict__.pop("quantization_config", None)  # weights are given out as if they had never been quantised
    with foreign_faults(folder):
        return tamed(config)


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    check_steps(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ENDS:
        raise
    except BaseException as error:  # as above: any broken tokenizer file
        raise QprecError(f"{folder}: no usable tokenizer (tokenizer.json): {in_one_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or len(tokenizer) < 2:
        # Without any of its files transformers makes an empty one.
        raise QprecError(f"{folder}: no usable tokenizer (tokenizer.json is missing); download the checkpoint again.")
    check_tokenizer(tokenizer, folder)
    return tokenizer
