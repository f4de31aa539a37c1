"""Tiny GGUF files of several families, written as llama.cpp's converter writes them: by code that shares nothing with
the package's or transformers' reading.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from support.checkpoints import DEMO

HEADS, SHARED, SIZE, INNER, LAYERS = 4, 2, 64, 128, 3
"""Heads of queries, of keys, numbers of the stream, of the mlp, and layers."""

WIDTH = {"qwen3": 128, "qwen2": 16, "llama": 16, "gemma3": 256}
"""Numbers of a head. Of Qwen3 transformers takes 128 for granted, of Gemma 256."""

FAMILIES: dict[str, tuple[Any, Any]] = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "llama": (LlamaForCausalLM, LlamaConfig),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig),
}

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write_gguf(
    path: Path,
    family: str = "qwen3",
    kind: Kind = Kind.Q8_0,
    *,
    tied: bool = False,
    width: int | None = None,
    edit: Callable[[Any], None] | None = None,
    alter: Callable[[Any], None] | None = None,
) -> Path:
    """A seeded tiny model in a GGUF file.

    Args:
        family: one of ``FAMILIES``.
        kind: the format of matrices; vectors are float32, as llama.cpp keeps them.
        width: numbers of a head.
        edit: called with the fp32 model before it is written: where faults are planted.
        alter: called with the writer before it writes.
    """
    width = width or WIDTH[family]
    model = tiny(family, tied or family == "gemma3", width)
    if edit is not None:
        with torch.no_grad():
            edit(model)
    writer = gguf.GGUFWriter(path, family)
    _keys(writer, family, width)
    if family == "gemma3":
        _spaces(writer)
    else:
        _bytes(writer, bos=family == "llama")
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not model.config.tie_word_embeddings:
            _add(writer, family, name, tensor.float().numpy(), kind)
    if alter is not None:
        alter(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny(family: str, tied: bool, width: int, **changes: Any) -> Any:
    """The model, with norms that are not all alike; ``changes`` are of its config."""
    made, config = FAMILIES[family]
    torch.manual_seed(0)
    more = {"query_pre_attn_scalar": width, "sliding_window": 16} if family == "gemma3" else {}
    settings = {
        "vocab_size": 512,
        "hidden_size": SIZE,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": SHARED,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        **({} if family == "qwen2" else {"head_dim": width}),
    }
    model = made(config(**{**settings, **more, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "proj" in name:
                parameter.mul_(4)
    return model.eval()


def _keys(writer: Any, family: str, width: int) -> None:
    writer.add_name(f"tiny {family}")
    writer.add_context_length(128)
    writer.add_embedding_length(SIZE)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(SHARED)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    if family == "gemma3":
        writer.add_sliding_window(16)


def _bytes(writer: Any, bos: bool) -> None:
    """The demo's vocabulary: byte-level, with its merges; a Llama begins with a token of its own, a Qwen does not."""
    told = json.loads((DEMO / "tokenizer.json").read_text())
    tokens = {**told["model"]["vocab"], **{each["content"]: each["id"] for each in told["added_tokens"]}}
    names = sorted(tokens, key=lambda name: tokens[name])
    control = {each["content"] for each in told["added_tokens"]}
    names += [f"[PAD{number}]" for number in range(len(names), 512)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(names)
    writer.add_token_types([3 if name in control else 5 if name.startswith("[PAD") else 1 for name in names])
    writer.add_token_merges([" ".join(merge) for merge in told["model"]["merges"]])
    writer.add_eos_token_id(tokens["<|im_end|>"])
    if bos:
        writer.add_bos_token_id(tokens["<|im_start|>"])
    writer.add_add_bos_token(bos)


def _spaces(writer: Any) -> None:
    """A vocabulary of Gemma's kind: pieces with scores, bytes for what is none of them, and no merges."""
    pieces = [
        "▁",
        *"abcdefghijklmnopqrstuvwxyzT,.",
        "th",
        "he",
        "the",
        "▁the",
        "in",
        "er",
        "▁a",
        "▁c",
        "▁of",
        "of",
        "is",
    ]
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    names += [f"<unused{number}>" for number in range(512 - len(names))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names)
    writer.add_token_scores([-float(place) for place in range(512)])
    writer.add_token_types([3] * 4 + [6] * 256 + [1] * len(pieces) + [4] * (512 - 260 - len(pieces)))
    for add, number in (
        (writer.add_pad_token_id, 0),
        (writer.add_eos_token_id, 1),
        (writer.add_bos_token_id, 2),
        (writer.add_unk_token_id, 3),
    ):
        add(number)
    writer.add_add_bos_token(True)


def _add(writer: Any, family: str, name: str, weight: np.ndarray, kind: Kind) -> None:
    name = _name(family, name)
    if family == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = HEADS if ".attn_q." in name else SHARED
        # llama.cpp rotates neighbours, transformers halves: convert_hf_to_gguf.py, LlamaModel.permute.
        weight = weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    if family == "gemma3" and name.endswith("norm.weight"):
        weight = weight + 1
    if weight.ndim == 1 or kind == Kind.F32:
        writer.add_tensor(name, np.ascontiguousarray(weight, dtype=np.float32))
    elif kind == Kind.F16:
        writer.add_tensor(name, weight.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(weight), kind), raw_dtype=kind)


def _name(family: str, name: str) -> str:
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, leaf = rest.rpartition(".")
    names = {**_LAYER, **_GEMMA} if family == "gemma3" else _LAYER
    return f"blk.{layer}.{names[module]}.{leaf}"
