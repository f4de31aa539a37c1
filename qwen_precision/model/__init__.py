"""A checkpoint: found or fetched, checked, built without its weights, and its tensors read.

Other folders import the names below, from here.
May import: record, qwen3, settings.
"""

from qwen_precision.model.encode import Encoded, encode
from qwen_precision.model.fetching import asked_once
from qwen_precision.model.files import model_part, weight_files
from qwen_precision.model.folder import Checkpoint, open_checkpoint
from qwen_precision.model.gate import check_values, fault, foreign_faults
from qwen_precision.model.hub import download_bytes, gguf_on_hub, is_here, locate, without_weights
from qwen_precision.model.index import FLOAT_TYPES, TensorInfo, read_json
from qwen_precision.model.lanes import (
    Lane,
    cache_argument,
    decoding,
    not_decoded,
    only_the_last,
    positions_of,
    takes_positions,
)
from qwen_precision.model.loaded import Models, NoRoom, filled
from qwen_precision.model.machine import (
    REDUCED_SUMS,
    attention_used,
    choose_device,
    choose_memory,
    environment,
    exact_float32,
    out_of_memory,
)
from qwen_precision.model.scratch import Scratch
from qwen_precision.model.shards import fill, opened
from qwen_precision.model.skeleton import (
    LayerCall,
    NotLayerwise,
    build,
    decoder_layers,
    finish,
    layer_calls,
    layers_of,
    move_buffers,
    outline,
    path_of,
    run_layer,
)
from qwen_precision.model.stopwatch import Stopwatch
from qwen_precision.model.way import arranged, is_layerwise
from qwen_precision.model.weightcheck import WeightCheck
from qwen_precision.model.weights import WeightStore, read_tensor

__all__ = [
    "FLOAT_TYPES",
    "REDUCED_SUMS",
    "Checkpoint",
    "Encoded",
    "Lane",
    "LayerCall",
    "Models",
    "NoRoom",
    "NotLayerwise",
    "Scratch",
    "Stopwatch",
    "TensorInfo",
    "WeightCheck",
    "WeightStore",
    "arranged",
    "asked_once",
    "attention_used",
    "build",
    "cache_argument",
    "check_values",
    "choose_device",
    "choose_memory",
    "decoder_layers",
    "decoding",
    "download_bytes",
    "encode",
    "environment",
    "exact_float32",
    "fault",
    "fill",
    "filled",
    "finish",
    "foreign_faults",
    "gguf_on_hub",
    "is_here",
    "is_layerwise",
    "layer_calls",
    "layers_of",
    "locate",
    "model_part",
    "move_buffers",
    "not_decoded",
    "only_the_last",
    "open_checkpoint",
    "opened",
    "out_of_memory",
    "outline",
    "path_of",
    "positions_of",
    "read_json",
    "read_tensor",
    "run_layer",
    "takes_positions",
    "weight_files",
    "without_weights",
]
