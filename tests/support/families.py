"""Tiny random checkpoints of every causal language model that transformers has."""

import copy
import inspect
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from support.checkpoints import DEMO

FAMILIES: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

SKIPPED: dict[str, str] = {
    "gemma3n": "its picture tower needs timm",
    "gemma4_assistant": "drafts from another model's states, not from ids",
    **dict.fromkeys(("deepseek_v4", "reformer", "xlnet"), "transformers itself mixes dtypes and raises in fp16"),
    "musicgen": "sound codes, not token ids",
    "musicgen_melody": "sound codes, not token ids",
    "gemma4_unified_assistant": "drafts from another model's states, not from ids",
}
"""Model types of which none is made, and why."""

if transformers.__version__.startswith("4."):
    SKIPPED |= {
        **dict.fromkeys(("apertus", "ctrl", "mega"), "this transformers mixes dtypes and raises in fp16"),
        **dict.fromkeys(("speech_to_text_2", "xlstm"), "this transformers raises whatever the dtype"),
        "transfo-xl": "its cutoffs need a larger vocabulary",
        "qdqbert": "needs pytorch-quantization",
        **dict.fromkeys(("emu3", "mllama"), "this transformers cannot read the configuration of the text model alone"),
    }

OWN_CACHE = {"blt", "cpmant", "minimax", "prophetnet", "xlstm"}
"""Model types whose forward takes a cache, but of a kind of its own, or counts positions in a way of its own."""

WRAPPERS: dict[str, str] = {
    "Gemma3ForConditionalGeneration": "gemma3",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "Qwen3Model": "qwen3",
    "Qwen3ForSequenceClassification": "qwen3",
    "GPT2LMHeadModel": "gpt2",
}
"""Classes to make besides those of FAMILIES, by the model type of their configuration."""

WIDTH = 0.25
"""The spread of the weights: wide enough for what a layer hands the next one to be of order one."""

SIZES: dict[Any, str] = {
    512: "vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input",
    128: "intermediate_size ffn_dim n_inner dim_ff dff d_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim "
    "feed_forward_size intermediate_size_mlp dense_intermediate_size "
    "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions",
    64: "hidden_size d_model n_embd dim_model emb_dim embedding_size embedding_dim word_embed_proj_dim "
    "input_embedding_size output_embedding_size attention_hidden_size lru_width max_source_positions "
    "pronunciation_embed_dim shape_embed_dim q_lora_rank o_lora_rank",
    32: "index_head_dim moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "expert_ffn_hidden_size shared_experts_intermediate_size moe_shared_expert_intermediate_size kv_lora_rank "
    "index_topk sliding_window sliding_window_size attention_chunk_size window_size attention_window_size "
    "router_hidden_size",
    16: "head_dim qk_rope_head_dim v_head_dim qk_nope_head_dim swa_head_dim linear_head_dim linear_key_head_dim "
    "linear_value_head_dim d_head dim_head attention_head_size kv_channels global_head_dim "
    "mamba_d_state state_size ssm_state_size mamba_chunk_size chunk_size hidden_size_per_layer_input",
    8: "num_experts n_routed_experts num_local_experts moe_num_experts rotary_dim time_step_rank "
    "mamba_dt_rank laurel_rank rel_extent",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers "
    "num_decoder_layers num_blocks num_layers_per_stack depth "
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads index_n_heads swa_num_attention_heads linear_num_heads "
    "linear_num_value_heads num_query_groups",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok "
    "num_experts_per_token moe_topk moe_k n_group num_expert_group ngram",
    1: "topk_group n_shared_experts num_shared_experts first_k_dense_replace num_dense_layers",
    0: "num_mtp_layers num_nextn_predict_layers",
    WIDTH: "initializer_range init_std",
    504: "pad_token_id",
    505: "bos_token_id decoder_start_token_id",
    503: "eos_token_id forced_eos_token_id",
}
"""What transformers' configurations call the same few things, by what each is here."""

TINY: dict[str, Any] = {name: value for value, names in SIZES.items() for name in names.split()}

PADDED = (
    "camembert data2vec-text prophetnet roberta roberta-prelayernorm xglm xlm-prophetnet xlm-roberta xlm-roberta-xl"
).split()
"""Model types whose positions begin after the padding's id."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"use_cache": False, "encoder_hash_byte_group_vocab": 512},
    "blt_local_encoder": {"hidden_size_global": 64},
    "blt_local_decoder": {"hidden_size_global": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 128},
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense"] * 4, "adapter_in_dim": 64, "adapter_out_dim": 64},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 64,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 32,
        "swa_qk_nope_head_dim": 16,
        "swa_qk_rope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_unified_vision": {"mm_embed_dim": 64, "mm_posemb_size": 64, "output_proj_dims": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": None},
    "jamba": {"use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mllama_text_model": {"rope_scaling": {"rope_type": "default"}},
    "moshi": {"audio_vocab_size": 512},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 16,
    },
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 48]},
    "xlstm": {"qk_dim_factor": 1.0},
    "zamba": {
        "use_mamba_kernels": False,
        "attention_hidden_size": 128,
        "layers_block_type": ["mamba", "mamba", "hybrid", "hybrid"],
    },
    "zamba2": {"layers_block_type": ["mamba", "mamba", "hybrid", "mamba"]},
    "zaya": {"num_experts_per_tok": 1},
    **{name: {"max_position_embeddings": 640} for name in PADDED},
    "xmod": {"max_position_embeddings": 640, "default_language": "en_XX"},
}
"""By model type (also of a configuration inside another): what the rule for all gets wrong."""

WRITERS = (
    r"(down_proj|fc2|dense_4h_to_h|(mlp|ffn|feed_forward)\.(c_proj|w2|wo|fc_out|proj_out|out_proj)|fc_out|w2|wo|Wo|lin2)",
    r"(output_linear|output_layer|layer_2|ffn_down|proj_down|w_out|ffn\.2|feed_forward\.value|(?<!attention\.)output\.dense)",
    r"(out_proj|o_proj|c_proj)",
)
"""What the matrix is called that writes into the residual stream: the mlp's, or else the mixer's."""

BIGGEST = 40000.0
"""The largest weight of a planted matrix: finite in fp16, and its product with inputs of order one is not."""

UNIT_INPUTS = {"dory"}
"""Families in which a vector of length one goes into that matrix: all its weights have to be as large."""


class Family(NamedTuple):
    """A checkpoint and the module in it that overflows in fp16, if one was asked for.

    Where an older transformers has a module for every expert, it is the list that holds them.
    """

    folder: Path
    planted: str | None


def make_family(
    folder: Path, model_type: str, dtype: str = "bfloat16", plant: bool = False, architecture: str | None = None
) -> Family:
    """A seeded tiny model of a family with the demo's tokenizer.

    Args:
        plant: make one module of a layer past the first overflow in fp16.
        architecture: another class than the family's causal language model, one of WRAPPERS.
    """
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    made = getattr(transformers, architecture or FAMILIES[model_type])
    model = made(config_for(made, tiny_config(model_type)))
    widen(model)
    planted = plant_overflow(model) if plant else None
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, folder / name)
    return Family(folder, planted)


def config_for(made: Any, config: Any) -> Any:
    """The configuration that a class takes: of a model for pictures and text, a causal one takes the text's."""
    inside = (getattr(config, name) for name in getattr(type(config), "sub_configs", {}))
    return next((inner for inner in inside if type(inner) is made.config_class), config)


def widen(model: Any) -> None:
    """Give the matrices whose class starts them at zero or next to it, whatever the configuration says, some weight."""
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ in ("Linear", "Conv1D") and module.weight.std() < WIDTH / 4:
                module.weight.normal_(0.0, WIDTH)


def plant_overflow(model: Any) -> str:
    """Scale what a layer past the first adds to the residual stream; returns the path of the module that does."""
    path, layers = decoder_layers(model)
    for at, layer in list(enumerate(layers))[1:]:
        weights = {name: weight for name, weight in layer.named_parameters() if weight.ndim >= 2}
        for writer in WRITERS:
            found = [name for name in weights if re.search(rf"(^|\.){writer}(\.weight)?$", name)]
            if not found:
                continue
            # Experts are a list of modules in older versions: all of a kind, as the router may pick any.
            kind = re.sub(r"\d+", "#", found[0])
            alike = [name for name in found if re.sub(r"\d+", "#", name) == kind]
            with torch.no_grad():
                for name in alike:
                    weight = weights[name]
                    even = weight.sign() if model.config.model_type in UNIT_INPUTS else weight / weight.abs().max()
                    weight.copy_(even * BIGGEST)
            return f"{path}.{at}.{owner(alike)}"
    raise LookupError(f"no matrix that writes into the residual stream in {path} of {type(model).__name__}")


def owner(weights: list[str]) -> str:
    """The module that holds a weight, or all of several."""
    if len(weights) > 1:
        return re.split(r"\.\d+\.", weights[0])[0]
    return weights[0].removesuffix(".weight") if weights[0].endswith(".weight") else weights[0].rpartition(".")[0]


def decoder_layers(model: Any) -> tuple[str, Any]:
    """The list of modules with the most weights that is not part of a tower for pictures or sound."""
    lists = [
        (sum(weight.numel() for weight in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and not re.search(r"vision|visual|audio|patcher", name)
    ]
    return max(lists, key=lambda found: found[0])[1:]


def tiny_config(model_type: str) -> Any:
    """A small configuration: every size that its class has a name for."""
    return CONFIG_MAPPING[model_type](**tiny_sizes(CONFIG_MAPPING[model_type]))


def tiny_sizes(config: Any) -> dict[str, Any]:
    """The arguments of a configuration class, those of the configurations inside it too."""
    names = list(inspect.signature(config.__init__).parameters)
    sizes = {name: TINY[name] for name in names if name in TINY}
    if "kv_lora_rank" in sizes:  # latent attention has a key for every head
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    # Ids that the demo's tokenizer never writes, so that no prompt asks for a picture.
    marks = [name for name in names if re.search(r"token_(id|index)$", name) and name not in TINY]
    sizes |= {name: 506 + at % 6 for at, name in enumerate(marks)}
    for name, (kind, inner) in inner_configs(config).items():
        sizes[name] = {**tiny_sizes(inner), **({"model_type": kind} if kind else {})}
    for name, value in OVERRIDES.get(config.model_type, {}).items():
        merged = isinstance(value, dict) and isinstance(sizes.get(name), dict)
        sizes[name] = {**sizes[name], **value} if merged else copy.deepcopy(value)
    return sizes


def inner_configs(config: Any) -> dict[str, tuple[str | None, Any]]:
    """The configurations inside another, by name: the model type where the class leaves it open, and the class."""
    found = {}
    for name, inner in getattr(config, "sub_configs", {}).items():
        kind = None
        if inner is transformers.AutoConfig:
            kind = getattr(getattr(config, "sub_configs_defaults", {}).get(name), "model_type", None)
            inner = CONFIG_MAPPING[kind] if kind else None
        if inner is not None:
            found[name] = (kind, inner)
    return found
