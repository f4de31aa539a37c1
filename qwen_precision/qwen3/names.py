"""Paths of modules and tensors, taken apart: which decoder layer, which expert."""

import re

_LAYER = re.compile(r"^(?:.*?\.)?(?:layers?|h|blocks?)\.(\d+)(?:\.(.*))?$")
_EXPERT = re.compile(r"\.experts\.(\d+)(?:\.|$)")


def layer_of(module: str) -> int | None:
    """The decoder layer a module path lies in, or None outside the layers; T5 numbers parts of a layer once more."""
    found = _LAYER.match(module)
    return int(found.group(1)) if found else None


def expert_of(name: str) -> int | None:
    """The expert that a tensor or module belongs to, or None."""
    found = _EXPERT.search(name)
    return int(found.group(1)) if found else None


def placed(layer: int | None, name: str) -> str:
    """An operation and its layer, if it lies in one: ``layer 3, down_proj output``."""
    return f"layer {layer}, {name}" if layer is not None else name
