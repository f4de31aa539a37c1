"""The checkpoint loaded by transformers, in the dtypes that are in use."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import transformers.modeling_utils
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qwen_precision.dtypes import DTYPES
from qwen_precision.errors import QprecError, in_one_line
from qwen_precision.model.folder import Checkpoint
from qwen_precision.model.machine import free_bytes
from qwen_precision.model.shards import unmapped
from qwen_precision.model.skeleton import NotLayerwise, build, model_class, outline
from qwen_precision.model.way import is_layerwise
from qwen_precision.model.weightcheck import WeightCheck
from qwen_precision.model.weights import WeightStore, check_formats, checked_tensor, read_tensor
from qwen_precision.qwen3 import HEAD
from qwen_precision.torch_dtypes import torch_dtype


class NoRoom(QprecError):
    """The weights in this dtype do not fit into the memory that is free."""


class Models:
    """The checkpoint in the dtypes that are in use; weights always come from its files, never from another dtype.

    Args:
        checkpoint: a checked checkpoint.
        device: where they compute.
        attention: ``sdpa``, ``eager``, or None for what transformers would choose.
        tell: called with what is being done.
        headless: a causal model whose files hold no lm_head is loaded all the same, and ``without_head`` set.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        attention: str | None,
        tell: Callable[[str], None] = lambda what: None,
        headless: bool = False,
    ) -> None:
        self._headless, self.without_head = headless, False
        self._checkpoint, self.device, self._attention, self._tell = checkpoint, device, attention, tell
        self._loaded: dict[str, Any] = {}
        self._numbers: dict[str, Tensor] = {}

    def check(self) -> None:
        """Whether a quantised checkpoint of a family that runs whole can be dequantised; nothing is read.

        Raises:
            NoRoom: its weights do not fit into the memory of the machine in float32.
            QprecError: a tensor is quantised in a way that config.json says nothing of, or is kept turned.
        """
        tensors = self._checkpoint.tensors
        if self._checkpoint.quantised is None:
            return
        check_formats(self._checkpoint, (name for name, info in tensors.items() if info.dtype not in _COUNTS))
        self._check_turned()
        packed = (name for name, info in tensors.items() if info.packed is not None and name not in self._numbers)
        need, free = sum(tensors[name].given_out for name in packed), free_bytes(torch.device("cpu"))
        if need > free:
            raise NoRoom(
                f"{self._checkpoint.folder}: its weights need {need / 2**30:.1f} GiB once they are dequantised, "
                f"{free / 2**30:.1f} GiB are free; this family runs only as a whole: take a machine with more memory"
            )

    def look(self, name: str, check: WeightCheck) -> None:
        """Read one tensor of the files for the static check; what it was dequantised to is kept for all dtypes.

        Raises:
            QprecError: its file is damaged.
        """
        tensor = checked_tensor(self._checkpoint, name, check, name)
        if self._checkpoint.tensors[name].packed is not None:
            self._numbers[name] = tensor

    def get(self, weights: str) -> Any:
        """The model in a dtype (by its name), or with weights that were added (by theirs), for evaluation.

        Raises:
            NoRoom: it does not fit beside what is there.
            QprecError: a file is damaged, or a tensor is missing.
        """
        if weights not in self._loaded:
            self._make_room(weights)
            self._tell(f"loading the weights in {weights}")
            self._loaded[weights] = self._load(weights)
        return self._loaded[weights]

    def called(self, weights: str) -> Any:
        """What of the model is run: all, or what comes before an lm_head that its files do not hold; as ``get``."""
        model = self.get(weights)
        return model.base_model if self.without_head else model

    def _make_room(self, dtype: str) -> None:
        need, free = self._checkpoint.parameters * DTYPES[dtype].bytes, free_bytes(self.device)
        if need > free:
            raise NoRoom(f"{dtype} needs {need / 2**30:.1f} GiB on {self.device}, {free / 2**30:.1f} GiB are free")

    def add(self, weights: str, dtype: str, load: Callable[[], nn.Module]) -> None:
        """Weights of another making, for ``get`` by their name; nothing is done where they are there already.

        Args:
            weights: their name.
            dtype: the format they are in.
            load: gives the model with them, on the device.

        Raises:
            NoRoom: they do not fit beside what is there.
        """
        if weights not in self._loaded:
            self._make_room(dtype)
            self._loaded[weights] = load()

    def release(self, weights: str) -> None:
        """Give the memory back, whoever else still holds the module: its weights go to the meta device."""
        self._numbers.clear()
        model = self._loaded.pop(weights, None)
        if model is not None:
            model.to("meta")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _load(self, dtype: str) -> nn.Module:
        read, folder = self._checkpoint.only_read is not None, self._checkpoint.folder
        if read and is_layerwise(self._checkpoint.config):
            with suppress(NotLayerwise):
                return self._dequantised(dtype)
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            with unmapped(transformers.modeling_utils):
                loaded = self._from_files(dtype, read)
        except (MemoryError, torch.OutOfMemoryError, QprecError):
            raise
        except Exception as error:  # transformers and safetensors raise whatever a broken file leads to
            check_formats(self._checkpoint, self._checkpoint.tensors)  # 4.56 stops at an integer, in its own words
            raise QprecError(f"{folder}: transformers cannot load the weights: {in_one_line(error)}") from error
        model, told = loaded
        # Before transformers 5 names alone, then with both shapes.
        mismatched = sorted(each if isinstance(each, str) else each[0] for each in told["mismatched_keys"])
        self._check_loaded(model, sorted(told["missing_keys"]), mismatched)
        placed: nn.Module = model.to(self.device).eval()
        return placed

    def _from_files(self, dtype: str, read: bool) -> Any:
        """What ``from_pretrained`` gives, with what it says of its loading."""
        # As if the files held these numbers: transformers finds each its place, as for a plain checkpoint.
        given = {"state_dict": self._state()} if read else {}
        load = partial(
            self._class().from_pretrained,
            None if read else self._checkpoint.folder,
            config=self._checkpoint.config,
            dtype=getattr(torch, DTYPES[dtype].torch_name),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **({"attn_implementation": self._attention} if self._attention else {}),
            **given,
        )
        try:
            return load()
        except RuntimeError as error:
            if not any(words in str(error) for words in ("ignore_mismatched_sizes", "size mismatch")):
                raise
            # Which tensors have another shape is only told then; asked for at once, 4.56 fails on sound files (bamba).
            return load(ignore_mismatched_sizes=True)

    def _check_loaded(self, model: nn.Module, missing: list[str], mismatched: list[str]) -> None:
        """Every parameter was in the files, in its shape, as numbers that can be cast."""
        folder = self._checkpoint.folder
        if mismatched:
            name = mismatched[0]
            held = self._checkpoint.tensors.get(name)  # not there where transformers calls it otherwise
            found = f"has shape {list(held.shape)}" if held is not None else "is made of tensors of other shapes"
            raise QprecError(
                f"{folder}: {name} {found}, config.json asks for {list(model.state_dict()[name].shape)}; the two do "
                "not belong together."
            )
        if missing == [HEAD] and self._checkpoint.bare:
            if not self._headless:
                raise QprecError(_BARE.format(folder=folder))
            self.without_head, missing = True, []
        check_formats(self._checkpoint, (name for name in model.state_dict() if name in self._checkpoint.tensors))
        if missing:
            raise QprecError(
                f"{folder}: the tensor {missing[0]} is in none of its files; "
                "the checkpoint is incomplete or its config.json is another model's."
            )

    def _state(self) -> dict[str, Tensor]:
        """Every tensor under its name in the files, a quantised weight in float32."""
        self.check()
        held, checkpoint = self._numbers, self._checkpoint
        return {name: held[name] if name in held else read_tensor(checkpoint, name) for name in checkpoint.tensors}

    def _check_turned(self) -> None:
        """A Conv1D keeps its matrix ``[inputs, outputs]``, and no scheme says which way round it was quantised."""
        model = outline(self._checkpoint.config, self._attention)
        turned = tuple(f"{path}.weight" for path, module in model.named_modules() if type(module).__name__ == "Conv1D")
        for name, info in self._checkpoint.tensors.items():
            if info.packed is not None and any(name == path or path.endswith(f".{name}") for path in turned):
                raise QprecError(
                    f"{self._checkpoint.folder}: {name} is quantised, and {type(model).__name__} keeps it turned "
                    "(Conv1D), of which quantised weights are not read; probe the checkpoint it was made from."
                )

    def _class(self) -> Any:
        """What transformers would load; of a family that is run layer by layer, the causal model."""
        config = self._checkpoint.config
        return AutoModelForCausalLM if is_layerwise(config) else model_class(config)

    def _dequantised(self, dtype: str) -> nn.Module:
        """As a probe reads it: transformers would run each scheme's own kernels, where it has them for this machine."""
        if self._checkpoint.bare:
            raise QprecError(_BARE.format(folder=self._checkpoint.folder))
        model = build(self._checkpoint.config, self._attention)
        store = WeightStore(self._checkpoint, model, self.device, resident=False, check=WeightCheck([]))
        return filled(model, store, torch_dtype(dtype)).to(self.device)


_COUNTS = frozenset(("I64", "BOOL"))
"""Formats, by safetensors' name, of positions and counters that some models keep beside their weights."""

_BARE = (
    "{folder}: has no lm_head (a bare model, as embedding models are), so there is no next token to generate; "
    "`qprec probe` runs it without one."
)


def filled(model: nn.Module, store: WeightStore, dtype: torch.dtype) -> nn.Module:
    """A model that was built without weights, with those of a store, each cast to ``dtype`` once.

    Raises:
        QprecError: a shard cannot be read.
    """
    for name, parameter in list(model.named_parameters()):
        new = nn.Parameter(store.tensor(name).to(dtype), requires_grad=False)
        for module in model.modules():  # tied weights are one parameter that two modules hold
            for key, held in module._parameters.items():
                if held is parameter:
                    module._parameters[key] = new
    return model
