"""Forwards that do for real what an engine's rule says: fp32, but for one kind of value that passes through fp16.

By plain torch around plain transformers; nothing of the package is used. Each says whether anything left the range.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoTokenizer

_PRODUCTS = (functional.linear, torch.matmul, functional.scaled_dot_product_attention)
_BLOCK = 16


class _Half(TorchFunctionMode):
    """Casts what it is told to fp16 and back; ``left`` tells whether something finite became infinite by it."""

    def __init__(self, value: str) -> None:
        super().__init__()
        self.value, self.left = value, False

    def half(self, tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.float32:
            return tensor
        out = tensor.half().float()
        self.left |= bool((out.isinf() & tensor.isfinite()).any())
        return out

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            if self.value == "operands":
                args = [self.half(each) for each in args]
            if self.value == "keys and values" and func is _PRODUCTS[2]:
                args = [args[0], self.half(args[1]), self.half(args[2]), *args[3:]]
            if self.value == "sums" and func is functional.linear:
                return self._in_blocks(*args)
            out = func(*args, **kwargs)
            return self.half(out) if self.value == "products" else out

    def _in_blocks(self, states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        total = torch.zeros((), dtype=torch.float32)
        for at in range(0, states.shape[-1], _BLOCK):
            total = self.half(total + states[..., at : at + _BLOCK] @ weight[:, at : at + _BLOCK].T)
        return total if bias is None else total + bias


def _half_norm(mode: _Half, norm: Any) -> Callable[[Tensor], Tensor]:
    """A norm with its square and their mean in fp16, or with the mean alone, added up as it comes."""

    def forward(states: Tensor) -> Tensor:
        if mode.value == "squares":
            mean = mode.half(mode.half(states * states).mean(-1, keepdim=True))
        else:
            mean = mode.half((states * (states / states.shape[-1])).sum(-1, keepdim=True))
        return torch.as_tensor(norm.weight * (states * torch.rsqrt(mean + norm.variance_epsilon)))

    return forward


def _cast_stream(mode: _Half, model: Any) -> None:
    """The residual stream in fp16: what the embedding gives, a layer's second norm reads, and a layer gives."""
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: mode.half(out))
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(lambda module, args: tuple(map(mode.half, args)))
        layer.register_forward_hook(lambda module, args, out: mode.half(out))


class _Saturating(TorchFunctionMode):
    """What leaves fp16's range becomes its largest number, and a NaN 0."""

    clipped = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not isinstance(out, Tensor) or out.dtype != torch.float16 or func not in (*_PRODUCTS, *_ELEMENTWISE):
            return out
        with torch._C.DisableTorchFunction():
            self.clipped |= not bool(out.isfinite().all())
            return out.nan_to_num(nan=0.0)


_ELEMENTWISE = (Tensor.add, Tensor.mul, Tensor.__add__, Tensor.__mul__, functional.silu)


def saturated(folder: Path, text: str) -> tuple[bool, Tensor]:
    """Whether anything was clipped in an fp16 forward that saturates, and its logits."""
    ids = _ids(folder, text)
    model, mode = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).eval(), _Saturating()
    with torch.no_grad(), mode:
        logits = model(ids).logits
    return mode.clipped, logits


def _ids(folder: Path, text: str) -> Tensor:
    return torch.tensor([AutoTokenizer.from_pretrained(folder)(text)["input_ids"]])


def leaves(folder: Path, text: str, value: str) -> tuple[bool, Tensor]:
    """Whether a value of this kind leaves fp16's range in a forward that stores it so, and the logits that come out."""
    ids = _ids(folder, text)
    if value in ("outputs", "outputs but scores"):
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).eval()(ids).logits
        return not bool(logits.isfinite().all()), logits
    model, mode = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), _Half(value)
    if value.endswith("squares"):
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = _half_norm(mode, module)
    if value == "residual":
        _cast_stream(mode, model)
    with torch.no_grad(), mode:
        logits = model(ids).logits
    return mode.left, logits
