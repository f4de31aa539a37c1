"""Which way a model runs: layer by layer where that is proven for this very config, else whole.

Two things must hold. Its family was compared with transformers' own forward, bit by bit (``LAYERWISE``,
``tests/probe/test_families.py``). And its code, run with this config around stubs, does nothing that layers run one by
one would leave out: what one checkpoint's config alone switches on (a scale, a cap) is seen here, in any version.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PretrainedConfig
from transformers.modeling_outputs import MoeModelOutputWithPast

from qwen_precision.errors import QprecError, in_one_line
from qwen_precision.model.skeleton import LayerCall, NotLayerwise, build, layer_calls, outline, replaced

LAYERWISE = frozenset(
    (
        "qwen2 qwen3 qwen3_moe llama mistral afmoe arcee bitnet cwm deepseek_v2 diffllama doge ernie4_5 exaone4 "
        "flex_olmo glm glm4 gpt_oss helium hunyuan_v1_dense internlm3 iquestcoder jais2 jamba jetmoe lfm2 mellum "
        "ministral ministral3 moshi nemotron olmo olmo2 olmo3 olmoe persimmon phi3 qwen2_moe qwen3_5_moe_text "
        "qwen3_5_text qwen3_next seed_oss smollm3 stablelm starcoder2 youtu zamba2"
    ).split()
)
"""``model_type`` of the families whose layers can be run one by one."""

_LOUD = 300.0
"""The largest logit of a trial: beyond any cap (Gemma 2 has 30), so that one would show."""


def is_layerwise(config: PretrainedConfig) -> bool:
    """Whether the family is one of ``LAYERWISE``, and the class a causal or a bare model."""
    named = [str(name) for name in config.architectures or []]
    return config.model_type in LAYERWISE and all(name.endswith(("ForCausalLM", "Model")) for name in named)


def arranged(config: PretrainedConfig, attention: str | None) -> tuple[nn.Module, str | None]:
    """The model without its weights, and why it runs whole: ``None`` where it runs layer by layer.

    Args:
        config: of the checkpoint.
        attention: ``sdpa``, ``eager``, or None for what transformers would choose.

    Raises:
        QprecError: transformers cannot build it.
    """
    if not is_layerwise(config):
        what = "its class" if config.model_type in LAYERWISE else "its family"
        return outline(config, attention), f"{what} was not compared layer by layer"
    try:
        model = build(config, attention)
        with torch.inference_mode():
            prove(model)
    except NotLayerwise as error:
        return outline(config, attention), str(error)
    return model, None


def prove(model: nn.Module) -> None:
    """Run a model's own code around stubs, once from ids to its layers and once from them to the logits.

    Args:
        model: from ``build``.

    Raises:
        NotLayerwise: layers run one by one would leave something out.
    """
    for path, module in model.named_modules():
        if module._buffers.keys() - module._non_persistent_buffers_set:
            raise NotLayerwise(f"{path} keeps numbers in the files that are no weights")
    try:
        _prove_layers(model)
        _prove_head(model)
    except QprecError:
        raise
    except Exception as error:  # what a model's code raises around stubs is its own
        raise NotLayerwise(f"around stubs its code raises {in_one_line(error)}") from error


def _prove_layers(model: nn.Module) -> None:
    """From ids, as a user runs it, its layers are called as they are from embeddings, as they are run here."""
    embed: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    embedded = torch.zeros(2, 3, int(embed.weight.shape[1]))  # type: ignore[index]
    with replaced({embed: lambda _: embedded}):
        from_ids = layer_calls(model, embedded, mask, torch.zeros_like(mask))
    if not all(map(_alike, from_ids, layer_calls(model, embedded, mask))):
        raise NotLayerwise("its layers are given more than the hidden states tell")


def _alike(one: LayerCall, other: LayerCall) -> bool:
    left, right = (pytree.tree_flatten((call.args, call.kwargs)) for call in (one, other))
    return left[1] == right[1] and all(map(_equal, left[0], right[0]))


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else bool(one == other)


def _prove_head(model: nn.Module) -> None:
    """lm_head is given what the final norm gives, and what it gives are the logits."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if head is None or getattr(head, "bias", None) is not None:
        raise NotLayerwise("it has no lm_head of weights alone")
    rows, width = head.weight.shape
    states = torch.linspace(-_LOUD, _LOUD, 2 * width).view(1, 2, width)
    logits = torch.linspace(-_LOUD, _LOUD, 2 * rows).view(1, 2, rows)
    given: list[Tensor] = []

    def stub(hidden: Tensor) -> Tensor:
        given.append(hidden)
        return logits

    base: nn.Module = model.base_model  # type: ignore[assignment]
    with replaced({base: lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=states), head: stub}):
        out = model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False, return_dict=True)
    if len(given) != 1 or not torch.equal(given[0], states) or not torch.equal(out.logits, logits):
        raise NotLayerwise("it changes the hidden states before lm_head, or the logits after it")
