"""How tokens are chosen: the checkpoint's ``generation_config.json``, with the flags over it, for transformers.

What is not plain greedy decoding or sampling (beams, assistants, guidance) is switched off, and that is said.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from qwen_precision.errors import ENDS, QprecError, UsageError, in_one_line
from qwen_precision.model import Checkpoint, check_values, read_json
from qwen_precision.record import Choice
from qwen_precision.settings import GenerateSettings, flag_of, has_template, in_template

DEFAULT_NEW_TOKENS = 64
"""For a checkpoint that names no limit; transformers' own 20 is too short to see a model go wrong."""

_FLAGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "do_sample")
_SAMPLING_ONLY = ("temperature", "top_p", "top_k", "min_p")
_SHOWN = (
    "do_sample",
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "min_new_tokens",
    "eos_token_id",
    "pad_token_id",
)

_OTHER_WAYS: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": None,
    "guidance_scale": None,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "stop_strings": None,
    "watermarking_config": None,
    "cache_implementation": None,
    "prefill_chunk_size": None,
    "constraints": None,
    "force_words_ids": None,
}
"""Keys of generation_config.json that ask for another way of decoding, and the value that does not."""


def generation_config(
    checkpoint: Checkpoint, settings: GenerateSettings, prompt_tokens: int
) -> tuple[GenerationConfig, list[Choice]]:
    """What transformers' ``generate`` is told, and the choices made on the way.

    Args:
        checkpoint: a checked checkpoint.
        settings: the flags.
        prompt_tokens: of the padded batch; with the new ones it must fit into the context.

    Raises:
        QprecError: the file is broken.
        UsageError: a flag does not go with the file.
    """
    path = checkpoint.folder / "generation_config.json"
    config = _read(path) if path.is_file() else GenerationConfig.from_model_config(checkpoint.config)
    asked = {name: getattr(settings, name) for name in _FLAGS if getattr(settings, name) is not None}
    for name, value in asked.items():
        setattr(config, name, value)
    notes = _plain(config)
    config.max_new_tokens, length = _new_tokens(config, settings, prompt_tokens, checkpoint.context)
    config.max_length = None
    config.use_cache, config.return_dict_in_generate = True, False
    config.output_scores = config.output_logits = config.output_attentions = config.output_hidden_states = False
    how = "asked for" if settings.do_sample is not None else "generation_config.json" if path.is_file() else "default"
    decoding = Choice(what="decoding", value="sampled" if config.do_sample else "greedy", reason=how)
    idle = [flag_of(name) for name in _SAMPLING_ONLY if name in asked and not config.do_sample]
    if idle:
        notes.append(Choice(what="no effect", value=", ".join(idle), reason="decoding is greedy; add --do-sample"))
    return config, [decoding, length, *notes]


def options(config: GenerationConfig, seed: int) -> dict[str, Any]:
    """What the record keeps of it."""
    kept = {name: getattr(config, name, None) for name in _SHOWN}
    return {**{name: value for name, value in kept.items() if value is not None}, "seed": seed}


def looks_like_a_base_model(checkpoint: Checkpoint, config: GenerationConfig) -> str | None:
    """Why a checkpoint looks like one that was never taught to end a turn, or None."""
    if re.search(r"(^|[-_/])base/?$", checkpoint.source, re.IGNORECASE):
        return "its name ends in Base"
    tokenizer: Any = checkpoint.tokenizer
    ends = config.eos_token_id
    ids: Sequence[int] = [] if ends is None else ends if isinstance(ends, list) else [ends]
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    try:
        if not has_template(tokenizer):
            return "its tokenizer has no chat template"
        shown = in_template(turns, tokenizer, answer=False)
        words = [str(tokenizer.convert_ids_to_tokens(each)) for each in ids]
    except ENDS:
        raise
    except BaseException:  # if the template or an id is broken, nothing can be said
        return None
    if words and not any(word in shown for word in words):
        return f"its end token {words[0]} does not occur in its chat template"
    return None


def _read(path: Path) -> GenerationConfig:
    check_values(path, read_json(path, ""))
    try:
        config: GenerationConfig = GenerationConfig.from_pretrained(path.parent, local_files_only=True)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(config, name, None)
            if value is not None and not (isinstance(value, (int, float)) and 0 <= value < 1e6):
                raise ValueError(f"{name} is {value!r}")
    except Exception as error:  # transformers raises whatever the broken value leads to
        raise QprecError(f"{path}: transformers cannot read it: {in_one_line(error)}") from error
    return config


def _plain(config: GenerationConfig) -> list[Choice]:
    dropped = []
    for key, plain in _OTHER_WAYS.items():
        if getattr(config, key, plain) not in (plain, None):
            dropped.append(f"{key}={getattr(config, key)!r}")
            setattr(config, key, plain)
    if not dropped:
        return []
    return [Choice(what="left out", value=", ".join(dropped), reason="qprec decodes greedily or samples, no other way")]


def _new_tokens(
    config: GenerationConfig, settings: GenerateSettings, prompt_tokens: int, context: int | None
) -> tuple[int, Choice]:
    asked, why = settings.max_new_tokens, "asked for"
    if asked is None:
        why = "generation_config.json"
        longest = config.max_length if config.max_length not in (None, 20) else None  # 20 is transformers' default
        asked = config.max_new_tokens or (max(longest - prompt_tokens, 0) if longest else None)
    if asked is None:
        asked, why = DEFAULT_NEW_TOKENS, "default"
    if context is not None and prompt_tokens >= context:
        raise UsageError(
            f"the prompt has {prompt_tokens} tokens, the model's context {context}: no room for more; shorten it."
        )
    if context is not None and prompt_tokens + asked > context:
        asked, why = context - prompt_tokens, f"the context is {context}"
    if asked < 1:
        raise UsageError(
            f"generation_config.json: max_length leaves no new token after {prompt_tokens}; give --max-new-tokens."
        )
    return asked, Choice(what="new tokens at most", value=str(asked), reason=why)
