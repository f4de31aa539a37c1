"""What we unpack, against the libraries that defined the formats, where they are installed and have code for a CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwen_precision.model.folder import open_checkpoint
from qwen_precision.model.weights import read_tensor
from support.families import make_family
from support.quantise import EXPERTS, MXFP4, SCHEMES, Parts, quantised, rewrite

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj")


def parts_of(folder: Path, module: str) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name.removeprefix(f"{module}."): each for name, each in tensors.items() if name.startswith(f"{module}.")}


@pytest.mark.parametrize("module", MODULES)
def test_fp8_blocks_are_what_transformers_makes_of_them(module: str, healthy: Path, tmp_path: Path) -> None:
    integration = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(getattr(integration, "Fp8Dequantize", None), "_dequantize_one"):
        pytest.skip("this transformers has no such step of its own")
    folder, _ = quantised(healthy, tmp_path / "q", SCHEMES["fp8 blocks"])
    parts = parts_of(folder, module)
    theirs = integration.Fp8Dequantize(None)._dequantize_one(parts["weight"], parts["weight_scale_inv"], torch.float32)
    assert torch.equal(read_tensor(open_checkpoint(folder, "x"), f"{module}.weight"), theirs)


@pytest.mark.transformers
@pytest.mark.parametrize("kept", [torch.uint8, "float8_e8m0fnu"])
def test_experts_in_mxfp4_are_what_transformers_makes_of_them(kept: Any, tmp_path: Path) -> None:
    """Bit by bit, of any bytes; 255 is no scale."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    kept = getattr(torch, kept, None) if isinstance(kept, str) else kept
    if kept is None:
        pytest.skip("this torch has no such format")
    folder, _ = quantised(make_family(tmp_path / "plain", "gpt_oss").folder, tmp_path / "q", MXFP4, EXPERTS)
    torch.manual_seed(0)
    made: Parts = {}

    def change(tensors: Parts) -> None:
        for name in [name for name in tensors if name.endswith("_blocks")]:
            scales = name.replace("_blocks", "_scales")
            blocks, bytes_of = torch.randint(256, tensors[name].shape), torch.randint(255, tensors[scales].shape)
            made[name], made[scales] = blocks.byte(), bytes_of.byte()
            tensors |= {name: made[name], scales: made[scales].view(kept)}

    rewrite(folder, change)
    checkpoint = open_checkpoint(folder, "x")
    for weight in [name.removesuffix("_blocks") for name in made if name.endswith("_blocks")]:
        blocks, scales = made[f"{weight}_blocks"], made[f"{weight}_scales"]
        theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).cpu()
        assert torch.equal(read_tensor(checkpoint, weight).view(torch.int32), theirs.view(torch.int32)), weight
    assert len(made) == 2 * 2 * 4


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", [name for name in SCHEMES if name.startswith("ct ")])
def test_compressed_tensors_are_what_their_library_makes_of_them(
    name: str, module: str, healthy: Path, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    config: dict[str, Any] = SCHEMES[name].config
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    folder, _ = quantised(healthy, tmp_path / "q", SCHEMES[name])
    parts = parts_of(folder, module)
    # The library gives the format of the scale: in float32 it has nothing to round that we have not. What it makes of
    # NVFP4 and of powers of two is bf16 whatever is asked for.
    wide = {
        leaf: part.float() if part.dtype in (torch.float16, torch.bfloat16) else part for leaf, part in parts.items()
    }
    theirs = compressor.decompress(wide, scheme)["weight"]
    ours = read_tensor(open_checkpoint(folder, "x"), f"{module}.weight")
    assert theirs.dtype == (torch.bfloat16 if name in ("ct nvfp4", "ct mxfp4", "ct mxfp8") else torch.float32)
    assert torch.equal(ours.to(theirs.dtype), theirs)
