"""Write a checkpoint of a real shape with random weights, for tests and benchmarks; sharded, in bf16.

    python scripts/make_checkpoint.py 0.6B ./qwen3-0.6b
    python scripts/make_checkpoint.py 8B ./qwen3-8b --outlier model.layers.6.mlp.down_proj.weight=300

The shapes are those of the published configs. Tensors are made and written one shard at a time, so an 8B
checkpoint (16 GB) needs about 3 GB of memory. The tokenizer is the demo's.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

DEMO = Path(__file__).parent.parent / "qwen_precision" / "demo"

# hidden, intermediate, layers, heads, kv heads, tied; head_dim 128 and vocabulary 151,936 in all of them
DENSE = {
    "0.6B": (1024, 3072, 28, 16, 8, True),
    "1.7B": (2048, 6144, 28, 16, 8, True),
    "4B": (2560, 9728, 36, 32, 8, True),
    "8B": (4096, 12288, 36, 32, 8, False),
}
MOE = {"30B-A3B": (2048, 6144, 48, 32, 4, False)}
EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
SHAPES = {**DENSE, **MOE}
VOCABULARY, HEAD = 151936, 128

_POOL_SIZE = 1 << 22


class Pool:
    """Gaussian numbers, made once and cut at random: 8 billion fresh ones would take minutes."""

    def __init__(self, seed: int, std: float) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self._pool = (torch.randn(_POOL_SIZE, generator=self._random) * std).bfloat16()

    def tensor(self, *shape: int) -> torch.Tensor:
        """A tensor of that shape."""
        count = int(torch.tensor(shape).prod())
        out = torch.empty(count, dtype=torch.bfloat16)
        for start in range(0, count, _POOL_SIZE):
            shift = int(torch.randint(_POOL_SIZE, (1,), generator=self._random))
            piece = out[start : start + _POOL_SIZE]
            piece.copy_(torch.roll(self._pool, shift)[: piece.numel()])
        return out.view(*shape)


def config_of(name: str, layers: int | None = None) -> dict:
    """The config.json of one shape."""
    hidden, intermediate, count, heads, kv, tied = SHAPES[name]
    moe = name in MOE
    config = {
        "architectures": ["Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if moe else "qwen3",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers or count,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": HEAD,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": 503,
        "pad_token_id": 504,
    }
    if moe:
        config |= {**EXPERTS, "decoder_sparse_step": 1, "norm_topk_prob": True, "mlp_only_layers": []}
    return config


def tensors(config: dict, pool: Pool) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint by name, in the order of the forward."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv = config["num_attention_heads"] * HEAD, config["num_key_value_heads"] * HEAD
    yield "model.embed_tokens.weight", pool.tensor(VOCABULARY, hidden)
    for layer in range(config["num_hidden_layers"]):
        path = f"model.layers.{layer}"
        for norm, size in (
            ("input_layernorm", hidden),
            ("post_attention_layernorm", hidden),
            ("self_attn.q_norm", HEAD),
            ("self_attn.k_norm", HEAD),
        ):
            yield f"{path}.{norm}.weight", torch.ones(size, dtype=torch.bfloat16)
        for part, shape in (
            ("q_proj", (heads, hidden)),
            ("k_proj", (kv, hidden)),
            ("v_proj", (kv, hidden)),
            ("o_proj", (hidden, heads)),
        ):
            yield f"{path}.self_attn.{part}.weight", pool.tensor(*shape)
        if "num_experts" in config:
            yield f"{path}.mlp.gate.weight", pool.tensor(config["num_experts"], hidden)
            for expert in range(config["num_experts"]):
                yield from _mlp(f"{path}.mlp.experts.{expert}", hidden, config["moe_intermediate_size"], pool)
        else:
            yield from _mlp(f"{path}.mlp", hidden, inner, pool)
    yield "model.norm.weight", torch.ones(hidden, dtype=torch.bfloat16)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", pool.tensor(VOCABULARY, hidden)


def _mlp(path: str, hidden: int, inner: int, pool: Pool) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{path}.gate_proj.weight", pool.tensor(inner, hidden)
    yield f"{path}.up_proj.weight", pool.tensor(inner, hidden)
    yield f"{path}.down_proj.weight", pool.tensor(hidden, inner)


def write(
    name: str, folder: Path, outliers: dict[str, float], seed: int = 0, layers: int | None = None, shard: int = 1 << 30
) -> None:
    """Write the checkpoint; ``outliers`` multiply the first row of a tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(name, layers)
    weight_map: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}
    size = total = number = 0

    def flush() -> None:
        nonlocal held, size, number
        if held:
            number += 1
            file = f"model-{number:05d}.safetensors"
            save_file(held, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(held, file))
            held, size = {}, 0

    missing = set(outliers)
    for key, tensor in tensors(config, Pool(seed, 0.02)):
        if key in outliers:
            tensor.view(-1)[: tensor.shape[-1]] *= outliers[key]
            missing.discard(key)
        held[key] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
        if size >= shard:
            flush()
    flush()
    if missing:
        raise SystemExit(f"--outlier: no tensor of the name {sorted(missing)[0]}")
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / file, folder / file)
    print(f"{folder}: {name}, {total / 1e9:.2f} GB in {number} shards")


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="fewer (or more) layers than the real shape has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--outlier", action="append", default=[], metavar="TENSOR=FACTOR")
    given = parser.parse_args()
    outliers = {name: float(factor) for name, _, factor in (each.partition("=") for each in given.outlier)}
    write(given.shape, given.folder, outliers, given.seed, given.layers)


if __name__ == "__main__":
    main()
