"""The model without its weights: its own code, run around decoder layers that only pass things on.

One decoder layer at a time can hold weights, so the layers are taken out of the model's forward and run one
by one. What they need (masks, rotary embeddings, positions) comes from running the model's own forward with
stubs in their places: a stub writes down what its layer was called with. That forward must hand each layer's
output straight to the next layer; this is checked, not assumed, and a model that does more in between is
refused. Nothing of the architecture is written again here.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from qwen_precision.errors import QprecError, in_one_line


class _AllCalled(Exception):
    """Every layer's stub was called."""


@dataclass(frozen=True)
class LayerCall:
    """What the model's forward called one decoder layer with, beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def build(config: PretrainedConfig, attention: str | None) -> nn.Module:
    """The model in evaluation mode with weights on the meta device and real buffers.

    Args:
        config: of the checkpoint.
        attention: ``sdpa``, ``eager``, or None for what transformers would choose.

    Raises:
        QprecError: transformers has no causal model for this config, or a buffer cannot be made.
    """
    model = _on_meta(AutoModelForCausalLM, config, attention)
    _check_head(model)
    for path, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            _make_buffers(path, module)
    return model.eval()


def outline(config: PretrainedConfig, attention: str | None) -> nn.Module:
    """The model on the meta device, of the class that transformers would load; for its names, it cannot be run.

    Args:
        config, attention: as for ``build``.

    Raises:
        QprecError: transformers cannot build it.
    """
    return _on_meta(model_class(config), config, attention).eval()


def _on_meta(made: Any, config: PretrainedConfig, attention: str | None) -> nn.Module:
    """A model of a class of transformers, every tensor of it on the meta device."""
    build_from = made.from_config if made is AutoModelForCausalLM else made._from_config
    try:
        with torch.device("meta"):
            model: nn.Module = build_from(
                config, dtype=torch.float32, **({"attn_implementation": attention} if attention else {})
            )
    except Exception as error:  # whatever the broken value in the config leads to
        raise QprecError(f"config.json: transformers cannot build this model: {in_one_line(error)}") from error
    return model


def model_class(config: PretrainedConfig) -> Any:
    """The class of transformers that a checkpoint names, or what its config is mapped to."""
    for name in config.architectures or []:
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            own = found.config_class
            if own is None or isinstance(config, own):
                return found
    return AutoModelForCausalLM


def is_layerwise(config: PretrainedConfig) -> bool:
    """Whether the model can be run layer by layer: its family was compared with transformers' own forward, bit by bit.

    ``tests/probe/test_families.py`` does, for every family of the table.
    """
    named = [str(name) for name in config.architectures or []]
    return config.model_type in LAYERWISE and all(name.endswith(("ForCausalLM", "Model")) for name in named)


LAYERWISE = frozenset(("qwen2", "qwen3", "qwen3_moe", "llama", "mistral"))
"""``model_type`` of the families whose layers can be run one by one."""


def layers_of(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Path and layers of the decoder: of the lists of modules nearest the top the longest; none where there is none."""
    lists = [
        (path.count("."), -len(part), path, list(part))
        for path, part in model.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) > 1 and not _ASIDE.search(path)
    ]
    _, _, path, layers = min(lists, key=lambda each: each[:2], default=(0, 0, "", []))
    return path, layers


_ASIDE = re.compile(r"vis|audio|expert")
"""Lists of modules that are not the decoder's layers."""


_LOGIT_SCALES = {"logit_scale": 1.0, "logits_scaling": 1.0, "final_logit_softcapping": None}
"""Config keys of models that change the logits after lm_head, and the value that changes nothing."""


def _check_head(model: nn.Module) -> None:
    """lm_head's output must be the logits: it is run on its own here."""
    name = type(model).__name__
    if model.get_output_embeddings() is None:  # type: ignore[operator]
        raise QprecError(f"{name}: has no lm_head that transformers can point at; it is not supported.")
    for key, neutral in _LOGIT_SCALES.items():
        if getattr(model.config, key, neutral) not in (neutral, None):
            raise QprecError(f"{name}: changes the logits after lm_head ({key}); it is not supported.")


def _make_buffers(path: str, module: nn.Module) -> None:
    """Buffers (rotary frequencies) are computed by the module's constructor: construct it once for real."""
    try:
        fresh = type(module)(config=module.config)
    except (TypeError, AttributeError) as error:
        raise QprecError(f"{path}: this model keeps constants that qprec cannot make; it is not supported.") from error
    for name, buffer in fresh.named_buffers(recurse=False):
        module._buffers[name] = buffer


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Put the real buffers onto a device; the weights stay where they are, on meta."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder layers.

    Raises:
        QprecError: the model has no list of layers where transformers' decoders keep it.
    """
    base: nn.Module = model.base_model  # type: ignore[assignment]
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise QprecError(f"{type(model).__name__}: has no list of decoder layers; it is not supported.")
    return f"{model.base_model_prefix}.layers", layers


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    """Where a module lies in the model."""
    return next(str(name) for name, module in model.named_modules() if module is wanted)


@contextmanager
def _replaced(layers: nn.ModuleList, stubs: list[Callable[..., Any]]) -> Iterator[None]:
    try:
        for layer, stub in zip(layers, stubs, strict=True):
            layer.forward = stub
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _forward(model: nn.Module, embedded: Tensor, mask: Tensor) -> Any:
    """The model's own forward around whatever stands for its layers now.

    A plain forward counts padding in the position of a token; ``generate`` does not, and it is what a row alone gets.
    """
    base: Any = model.base_model
    takes = "position_ids" in inspect.signature(base.forward).parameters
    positions = {"position_ids": (mask.cumsum(dim=-1) - 1).masked_fill(mask == 0, 0)} if takes else {}
    return base(inputs_embeds=embedded, attention_mask=mask, use_cache=False, **positions)


def layer_calls(model: nn.Module, embedded: Tensor, mask: Tensor) -> list[LayerCall]:
    """What each decoder layer would be called with.

    Args:
        model: from ``build``.
        embedded: ``[batch, tokens, hidden]`` token embeddings in the dtype of the pass.
        mask: ``[batch, tokens]`` 1 at tokens and 0 at padding.

    Raises:
        QprecError: the model changes the hidden states between two layers.
    """
    _, layers = decoder_layers(model)
    calls: list[LayerCall] = []
    state: dict[str, Tensor] = {}

    def stub(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if hidden is not state.get("out", embedded):
            raise QprecError(f"{type(model).__name__}: works before or between its layers; it is not supported.")
        calls.append(LayerCall(args, kwargs))
        if len(calls) == len(layers):
            raise _AllCalled  # what follows needs the final norm's weights, which are not here yet
        state["out"] = hidden.view_as(hidden)  # a new object, so that the next call can be recognised
        return state["out"]

    with _replaced(layers, [stub] * len(layers)), suppress(_AllCalled):
        _forward(model, embedded, mask)
    if len(calls) != len(layers):
        raise QprecError(f"{type(model).__name__}: does not run each of its layers once; it is not supported.")
    return calls


def run_layer(layer: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
    """Run a layer by its forward: its own hooks stay out, those of its parts fire."""
    out = layer.forward(hidden, *call.args, **call.kwargs)
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


def finish(model: nn.Module, embedded: Tensor, mask: Tensor, hidden: Tensor) -> Tensor:
    """What the model's forward makes of the last layer's output: ``[batch, tokens, hidden]`` after the norm."""
    _, layers = decoder_layers(model)

    def stub(_: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden

    with _replaced(layers, [stub] * len(layers)):
        out = _forward(model, embedded, mask)
    final: Tensor = out.last_hidden_state
    return final
