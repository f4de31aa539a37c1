"""The model without its weights: its own code, run around decoder layers that only pass things on.

One decoder layer at a time can hold weights, so the layers are taken out of the model's forward and run one
by one. What they need (masks, rotary embeddings, positions) comes from running the model's own forward with
stubs in their places: a stub writes down what its layer was called with. That forward must hand each layer's
output straight to the next layer; this is checked, not assumed (``way.py``, and again at every run), and a
model that does more in between runs whole. Nothing of the architecture is written again here.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from qwen_precision.errors import QprecError, in_one_line


class _AllCalled(Exception):
    """Every layer's stub was called."""


class NotLayerwise(QprecError):
    """Something that layers run one by one would leave out; says what, as a part of a sentence."""


_NOT_ONCE = "it does not run each of its layers once, in their order"


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
        NotLayerwise: a buffer cannot be made.
        QprecError: transformers has no causal model for this config.
    """
    model = _on_meta(AutoModelForCausalLM, config, attention)
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


def _make_buffers(path: str, module: nn.Module) -> None:
    """Buffers (rotary frequencies) are computed by the module's constructor: construct it once for real."""
    try:
        fresh = type(module)(config=module.config)
    except (TypeError, AttributeError) as error:
        raise NotLayerwise(f"{path} keeps constants of its own") from error
    for name, buffer in fresh.named_buffers(recurse=False):
        module._buffers[name] = buffer
    for name, kept in vars(module).items():  # up to transformers 4 longrope keeps a copy that is no buffer
        if isinstance(kept, Tensor) and kept.is_meta:
            vars(module)[name] = vars(fresh)[name]


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Put the real buffers onto a device; the weights stay where they are, on meta."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder layers.

    Raises:
        NotLayerwise: the model has no list of layers where transformers' decoders keep it.
    """
    base: nn.Module = model.base_model  # type: ignore[assignment]
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise NotLayerwise("its layers are not where transformers' decoders keep them")
    return f"{model.base_model_prefix}.layers", layers


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    """Where a module lies in the model."""
    return next(str(name) for name, module in model.named_modules() if module is wanted)


@contextmanager
def replaced(stubs: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Calls of each module call its stub instead."""
    try:
        for module, stub in stubs.items():
            module.forward = stub
        yield
    finally:
        for module in stubs:
            module.__dict__.pop("forward", None)


def _forward(model: nn.Module, embedded: Tensor, mask: Tensor, ids: Tensor | None = None) -> Any:
    """The model's own forward around whatever stands for its layers now, from embeddings or from ids.

    A plain forward counts padding in the position of a token; ``generate`` does not, and it is what a row alone gets.
    """
    base: Any = model.base_model
    takes = "position_ids" in inspect.signature(base.forward).parameters
    positions = {"position_ids": (mask.cumsum(dim=-1) - 1).masked_fill(mask == 0, 0)} if takes else {}
    given = {"inputs_embeds": embedded} if ids is None else {"input_ids": ids}
    return base(**given, attention_mask=mask, use_cache=False, **positions)


def layer_calls(model: nn.Module, embedded: Tensor, mask: Tensor, ids: Tensor | None = None) -> list[LayerCall]:
    """What each decoder layer would be called with.

    Args:
        model: from ``build``.
        embedded: ``[batch, tokens, hidden]`` token embeddings in the dtype of the pass.
        mask: ``[batch, tokens]`` 1 at tokens and 0 at padding.
        ids: ``[batch, tokens]`` to start from instead; the embedding must then give ``embedded`` itself.

    Raises:
        NotLayerwise: the model changes the hidden states before, between, or runs a layer more or less than once.
    """
    _, layers = decoder_layers(model)
    calls: list[LayerCall] = []
    state: dict[str, Tensor] = {}

    def stub(index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if index != len(calls):
            raise NotLayerwise(_NOT_ONCE)
        if hidden is not state.get("out", embedded):
            raise NotLayerwise("it computes before or between its layers")
        calls.append(LayerCall(args, kwargs))
        if len(calls) == len(layers):
            raise _AllCalled  # what follows needs the final norm's weights, which are not here yet
        state["out"] = hidden.view_as(hidden)  # a new object, so that the next call can be recognised
        return state["out"]

    with replaced({layer: partial(stub, index) for index, layer in enumerate(layers)}), suppress(_AllCalled):
        _forward(model, embedded, mask, ids)
    if len(calls) != len(layers):
        raise NotLayerwise(_NOT_ONCE)
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

    with replaced(dict.fromkeys(layers, stub)):
        out = _forward(model, embedded, mask)
    final: Tensor = out.last_hidden_state
    return final
