"""Quantised weights: which tensors make up one weight, and an index with one entry a weight.

A scheme is a function in ``METHODS``: from ``quantization_config`` to the layout of a module's weight. config.json
tells the numbers (block, group, bits), the files tell which weights are quantised: what a scheme left alone
(``ignore``, ``modules_to_not_convert``) is there as a plain tensor. What comes out is an index with one entry a weight,
as if it had never been quantised; ``Packed`` in such an entry says how it is made.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from qwen_precision.errors import QprecError
from qwen_precision.model.compressed import compressed
from qwen_precision.model.index import Packed, TensorInfo
from qwen_precision.model.layout import Infos, Layout, Pick, Settings
from qwen_precision.model.schemes import awq, fp8, gptq, mxfp4

METHODS: dict[str, Callable[[Settings], Pick]] = {
    "fp8": fp8,
    "fbgemm_fp8": fp8,
    "compressed-tensors": compressed,
    "gptq": gptq,
    "awq": awq,
    "mxfp4": mxfp4,
}
"""By ``quant_method``: a scheme is a row here."""

_WRONG = "the file and its config.json do not belong together"


def unquantised(tensors: dict[str, TensorInfo], settings: Settings, folder: Path) -> dict[str, TensorInfo]:
    """The index with one entry a weight; what is not quantised stays as it is.

    Raises:
        QprecError: an unknown scheme, settings that it does not have, a part that is missing or of a wrong shape.
    """
    path, method = folder / "config.json", str(settings.get("quant_method") or "")
    if method not in METHODS:
        raise QprecError(
            f"{path}: the weights are quantised by {method or 'an unnamed method'!r}, which qprec does not read "
            f"(it reads {', '.join(METHODS)}); probe the checkpoint they were made from."
        )
    try:
        pick = METHODS[method](settings)
    except ValueError as error:
        raise QprecError(f"{path}: quantization_config ({method}) {error}.") from error
    found, parts = dict[str, TensorInfo](), set[str]()
    for name, info in tensors.items():
        layout = pick(name.rpartition(".")[0])
        if layout is None or info.dtype not in layout.types:
            continue
        module, _, leaf = name.rpartition(layout.glue)
        if leaf in layout.leaves[layout.main]:
            packed = _packed(tensors, module, layout, folder)
            parts |= {*packed.names.values(), *(f"{module}{layout.glue}{leaf}" for leaf in layout.drop)}
            found[f"{module}.weight" if layout.glue == "." else module] = _entry(packed, layout, folder)
    if not found:
        raise QprecError(
            f"{path}: quantization_config says {method}, but no tensor of the files is kept so; "
            "the two do not belong together."
        )
    return {**{name: info for name, info in tensors.items() if name not in parts}, **found}


def _packed(tensors: Infos, module: str, layout: Layout, folder: Path) -> Packed:
    """The parts of one weight."""
    names: dict[str, str] = {}
    for role, leaves in layout.leaves.items():
        spelled = [f"{module}{layout.glue}{leaf}" for leaf in leaves]
        there = [name for name in spelled if name in tensors]
        if there:
            names[role] = there[0]
        elif role not in layout.may:
            raise QprecError(
                f"{folder}: the tensor {spelled[0]} is in none of its files, and the weight of {module} is "
                f"{layout.what}; download the checkpoint again."
            )
    infos = {role: tensors[name] for role, name in names.items()}
    for role in layout.scales:
        if infos[role].dtype not in layout.kept:
            raise QprecError(
                f"{folder / infos[role].file}: {names[role]} is stored as {infos[role].dtype}, which is no format of "
                f"scales; {_WRONG}."
            )
    return Packed(layout.what, names, infos, layout.unpack, layout.scales, layout.turned, layout.block)


def _entry(packed: Packed, layout: Layout, folder: Path) -> TensorInfo:
    """One weight as if it were a tensor of its own."""
    main = packed.infos[layout.main]
    try:
        shape = layout.shape(packed.infos)
    except ValueError as error:
        raise QprecError(f"{folder / main.file}: {packed.names[layout.main]} {error}; {_WRONG}.") from error
    size = sum(info.size for info in packed.infos.values())
    return replace(main, dtype=layout.dtype, shape=shape, size=size, packed=packed)
