"""Tiny checkpoints with known faults."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
DEMO = ROOT / "qwen_precision" / "demo"

RATIO = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {},
    "another head ratio": RATIO,
    "moe": {"moe": True, "mlp_only_layers": [1]},
}
"""Shapes in which layer 1 has a plain mlp to plant into."""


def make_checkpoint(
    folder: Path,
    *,
    family: str = "qwen3",
    moe: bool = False,
    tied: bool = False,
    dtype: str = "bfloat16",
    edit: Callable[[Any], None] | None = None,
    shard: str | None = None,
    **config: Any,
) -> Path:
    """A seeded tiny Qwen3 with the demo's tokenizer, or a model of another family.

    Args:
        family: its ``model_type``; ``moe`` makes ``qwen3`` into ``qwen3_moe``.
        edit: called with the fp32 model before it is cast and saved: where faults are planted.
        shard: safetensors shard size, for checkpoints of several files.
    """
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    common = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        **config,
    }
    if moe:
        few = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
        experts = {**few, **common}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**experts))
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **common))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):  # transformers begins with zeros, to which any factor does nothing
                parameter.normal_(0.0, 0.5)
        if edit is not None:
            edit(model)
    # Saved in fp32 first where the values must survive: a weight of 70,000 is finite in bf16 and fp32.
    model.to(getattr(torch, dtype)).save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, folder / name)
    return folder


def begin_data_at(folder: Path, offset: int) -> Path:
    """Write the single file of weights anew, so that its data begins ``offset`` bytes after a multiple of 64."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for filler in range(0, 64, 8):
        save_file(tensors, path, metadata={"format": "pt", "filler": "x" * filler})
        if (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 64 == offset:
            return folder
    raise AssertionError(f"no header ends {offset} bytes after a multiple of 64")


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
