"""Rescues for tests: random powers on random tiny models, and one call that probes, exports and gives all of it."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from qwen_precision.diagnose.run import diagnose
from qwen_precision.model.folder import open_checkpoint
from qwen_precision.record.rescue import LayerPowers, Rescaling
from qwen_precision.record.run import Run
from qwen_precision.rescue.export import Exporter
from qwen_precision.settings.config import Target, load_settings
from qwen_precision.settings.prompts import read_prompts

TEXTS = ["The capital of France is Paris", "上海有个非常出名的地方，"]
LLAMA: dict[str, Any] = {
    "attention_bias": True,
    "mlp_bias": True,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
"""What a config of Llama has beside the others: biases everywhere, and frequencies scaled by parts."""
IDS = torch.arange(1, 25).reshape(2, 12) * 17 % 500


def rescue(source: Path | str, folder: Path, texts: list[str] | None = None, **options: Any) -> Run:
    """Probe and export; ``dtype``, ``force`` and ``keep`` are the target's, the rest is settings."""
    target = Target(folder=folder, **{key: options.pop(key) for key in ("dtype", "force", "keep") if key in options})
    specs = read_prompts(TEXTS if texts is None else texts, None)
    return diagnose(str(source), load_settings(None, {"explain": False, **options}), specs, target=target).run


def planned(source: Path | str, texts: list[str] | None = None, **settings: Any) -> Run:
    """Probe, with the plan of a rescue where fp16 fails or is at risk; nothing is written."""
    specs = read_prompts(TEXTS if texts is None else texts, None)
    return diagnose(str(source), load_settings(None, {"explain": False, **settings}), specs).run


def export(source: Path, folder: Path, rescaling: Rescaling, dtype: str = "source") -> Path:
    """Write a rescaling, whatever it is good for."""
    folder.mkdir()
    checkpoint = open_checkpoint(source, str(source))
    Exporter(checkpoint, rescaling, dtype, lambda done, total, what: None).write(folder)
    return folder


def load(folder: Path, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    """By plain transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()


def aligned(model: Any) -> Any:
    """The model with each weight in memory of its own: mapped from a file it begins anywhere, and a product of one row
    adds up in an order that depends on it."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return model


def logits(folder: Path, dtype: torch.dtype, ids: torch.Tensor = IDS, attention: str = "sdpa") -> torch.Tensor:
    with torch.inference_mode():
        return load(folder, dtype, attention)(ids).logits.float()


def powers(**changes: Any) -> Rescaling:
    none = {"stream": 0, "qk_norm": True, "final_norm": 0, "untied": False, "eps": 1e-6, "layers": []}
    return Rescaling(**{**none, **changes})


def layer_powers(layer: int, **changes: Any) -> LayerPowers:
    none = {"input_norm": 0, "query": 0, "value": 0, "post_norm": 0, "product": [0]}
    return LayerPowers(**{"layer": layer, **none, **changes})
