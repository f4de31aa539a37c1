"""The config and the tokenizer of a GGUF file, as transformers' own tables of it say."""

import importlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from qwen_precision.errors import ENDS, QprecError, in_one_line
from qwen_precision.model.ggufheader import Header, without_weights

DIVISORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""Tensors that rotary frequencies are divided by: Llama 3's; longrope's up to the trained context, and beyond it."""

_TRAINED = "original_max_position_embeddings"

_SCALING = {
    "factor": "factor",
    "original_context_length": _TRAINED,
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
"""Settings of a stretched rotary embedding: what llama.cpp calls them, and transformers."""

Told = dict[str, Any]
"""What transformers makes of the file's keys: a config's settings by name."""


def read_config(header: Header, path: Path) -> tuple[PretrainedConfig, Told]:
    """The config, and the settings that it was made of.

    Raises:
        QprecError: transformers knows no such architecture, or a value is broken.
    """
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if header.architecture in _kept_packed():
        raise QprecError(
            f"{path}: is a {header.architecture}, whose GGUF transformers reads in another way than the rest and qprec "
            "not yet; probe the checkpoint it was made from."
        )
    _check(header, path)
    try:
        with tempfile.TemporaryDirectory() as folder:
            small = Path(folder) / "header.gguf"
            small.write_bytes(without_weights(header))
            told: Told = load_gguf_checkpoint(str(small))["config"]  # type: ignore[no-untyped-call]
        told.setdefault("vocab_size", header.vocabulary)
        width = header.keys.get(f"{header.architecture}.attention.key_length")
        if width is not None:  # its tables leave that out for some families, and take the default of the config
            told.setdefault("head_dim", width)
        told.update(_scaled_scores(header, width))
        told.setdefault("rope_scaling", _stretched(header, told, path))
        if (told["rope_scaling"] or {}).get("rope_type") == "longrope":  # transformers 4 looks for it here
            told.setdefault(
                "original_max_position_embeddings", told["rope_scaling"]["original_max_position_embeddings"]
            )
        config = AutoConfig.for_model(**told)
    except OSError as error:
        raise QprecError(f"{path}: no room for its header in {tempfile.gettempdir()} ({error.strerror}).") from error
    except Exception as error:  # transformers raises whatever the broken value leads to
        raise QprecError(f"{path}: transformers makes no model of it: {in_one_line(error)}") from error
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if name is None:
        raise QprecError(f"{path}: is a {header.architecture}, of which transformers has no causal language model.")
    config.architectures = [name]
    return config, told


_LARGEST = {"gemma2": 46, "gemma3": 62}
"""By architecture: how many layers the one has (27B) whose scores are scaled by another number than the rest's."""


def _scaled_scores(header: Header, width: Any) -> Told:
    """What Gemma's scores are divided by the root of, which the file leaves out and transformers takes for 256.

    Source: llama.cpp, src/models/gemma2.cpp and gemma3.cpp, ``f_attention_scale``.
    """
    name = header.architecture
    layers, *parts = (
        header.keys.get(f"{name}.{key}") for key in ("block_count", "embedding_length", "attention.head_count")
    )
    if name not in _LARGEST or not isinstance(width, int):
        return {}
    size, heads = (each if isinstance(each, int) and each > 0 else 1 for each in parts)  # else refused elsewhere
    return {"query_pre_attn_scalar": size // heads if layers == _LARGEST[name] else width}


def _stretched(header: Header, told: Told, path: Path) -> Told | None:
    """How rotary frequencies are stretched for long contexts: of that transformers' tables take gpt-oss's alone.

    Llama 3's way is written out by llama.cpp, a divisor a frequency; longrope divides by such, and does nothing else.
    """
    before = f"{header.architecture}.rope."
    kind, width = header.keys.get(f"{before}scaling.type"), header.keys.get(f"{before}dimension_count")
    if kind in ("linear", "yarn"):
        given = {name: header.keys.get(f"{before}scaling.{key}") for key, name in _SCALING.items()}
        return {"rope_type": kind, **{name: value for name, value in given.items() if value is not None}}
    every, short, long = (_stored(header, path, name, width) for name in DIVISORS)
    longest = told.get("max_position_embeddings", 1)
    if every is not None:
        same = {"short_factor": every, "long_factor": every, "factor": 1.0, "attention_factor": 1.0}
        return {"rope_type": "longrope", _TRAINED: longest, **same}
    if short is None or long is None:
        return None
    trained = header.keys.get(f"{before}scaling.original_context_length") or longest
    scale = header.keys.get(f"{before}scaling.attn_factor")
    factors = {"short_factor": short, "long_factor": long, **({"attention_factor": scale} if scale else {})}
    return {"rope_type": "longrope", _TRAINED: trained, **factors}


def _stored(header: Header, path: Path, name: str, width: Any) -> list[float] | None:
    """A divisor a frequency; None where there is none, or not one for each."""
    stored = next((each for each in header.tensors if each.name == name), None)
    if stored is None or not isinstance(width, int) or (stored.shape, stored.kind) != ((width // 2,), 0):
        return None
    if stored.start + 2 * width > header.sizes[stored.file]:
        return None  # a truncated file, which is told where its tensors are looked at
    found: list[float] = np.fromfile(path.with_name(stored.file), "<f4", width // 2, offset=stored.start).tolist()
    return found


def _check(header: Header, path: Path) -> None:
    """The numbers that a config and a model are built by must be those of the tensors, before anything is built."""
    layers, width = (header.keys.get(f"{header.architecture}.{key}") for key in ("block_count", "embedding_length"))
    embedding = next((tensor.shape for tensor in header.tensors if tensor.name == "token_embd.weight"), ())
    if embedding[1:] != (width,):
        raise QprecError(
            f"{path}: token_embd.weight has shape {list(embedding)}, its keys ask for {width} columns; the file is "
            "broken, or not a whole model."
        )
    if not isinstance(layers, int) or not 0 < layers <= len(header.tensors):
        raise QprecError(f"{path}: has {len(header.tensors)} tensors and asks for {layers} layers; the file is broken.")


def _kept_packed() -> frozenset[str]:
    """Architectures for which newer versions of transformers have other tables."""
    try:
        from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
    except ImportError:
        return frozenset()
    return frozenset(GGUF_CONFIG_ARCHS)


def read_tokenizer(header: Header, config: PretrainedConfig, path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, by transformers' own conversion, without its detour through the library gguf.

    Raises:
        QprecError: there is none that transformers can make.
    """
    try:
        made, backend, settings = _converted(header, config, path)
        tokenizer: PreTrainedTokenizerBase = made(tokenizer_object=backend, **settings)
    except ENDS:
        raise
    except BaseException as error:  # as above
        raise QprecError(f"{path}: transformers makes no tokenizer of it: {in_one_line(error)}") from error
    return tokenizer


def _converted(header: Header, config: PretrainedConfig, path: Path) -> tuple[Any, Any, dict[str, Any]]:
    """The class of the tokenizer, its engine, and what its class is told."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer, get_gguf_tokenizer
    except ImportError:
        return _converted_before(header, config)
    architecture, told, settings = get_gguf_tokenizer(str(path.with_name(header.tensors[0].file)))
    backend, more = convert_gguf_tokenizer(architecture, told)
    return PreTrainedTokenizerFast, backend, {**settings, **more}


def _converted_before(header: Header, config: PretrainedConfig) -> tuple[Any, Any, dict[str, Any]]:
    """The same by versions of transformers that read the keys with the library.

    Up to version 4 it is the family's own class that puts <bos> in front.
    """
    ggml: Any = importlib.import_module("transformers.integrations.ggml")
    told, settings = (
        {new: header.keys[f"tokenizer.{old}"] for old, new in names.items() if f"tokenizer.{old}" in header.keys}
        for names in (ggml.GGUF_TOKENIZER_MAPPING["tokenizer"], ggml.GGUF_TOKENIZER_MAPPING["tokenizer_config"])
    )
    backend, more = ggml.convert_gguf_tokenizer(config.model_type, told)
    made = TOKENIZER_MAPPING.get(type(config), None)
    fast = made[1] if isinstance(made, tuple) and made[1] is not None else PreTrainedTokenizerFast
    bos = header.keys.get("tokenizer.ggml.add_bos_token", told.get("tokenizer_type") == "llama")
    named = {name: told.get(f"{name}_id") for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    special = {name: told["tokens"][number] for name, number in named.items() if number is not None}
    return fast, backend, {"add_bos_token": bos and "bos_token" in special, **special, **settings, **more}
