"""The checkpoint loaded by transformers, in the dtypes that are in use."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from qwen_precision.dtypes import DTYPES
from qwen_precision.errors import QprecError, in_one_line
from qwen_precision.model.folder import Checkpoint
from qwen_precision.model.machine import free_bytes
from qwen_precision.model.skeleton import build, is_layerwise, model_class, outline
from qwen_precision.model.weightcheck import WeightCheck
from qwen_precision.model.weights import WeightStore, check_formats
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
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        attention: str | None,
        tell: Callable[[str], None] = lambda what: None,
    ) -> None:
        self._checkpoint, self.device, self._attention, self._tell = checkpoint, device, attention, tell
        self._loaded: dict[str, Any] = {}

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
        model = self._loaded.pop(weights, None)
        if model is not None:
            model.to("meta")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _load(self, dtype: str) -> nn.Module:
        if self._checkpoint.only_read is not None:
            return (self._dequantised if is_layerwise(self._checkpoint.config) else self._given)(dtype)
        folder = self._checkpoint.folder
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            loaded: Any = self._class().from_pretrained(
                folder,
                dtype=getattr(torch, DTYPES[dtype].torch_name),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **({"attn_implementation": self._attention} if self._attention else {}),
            )
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # transformers and safetensors raise whatever a broken file leads to
            check_formats(self._checkpoint, self._checkpoint.tensors)  # 4.56 stops at an integer, in its own words
            raise QprecError(f"{folder}: transformers cannot load the weights: {in_one_line(error)}") from error
        model, told = loaded
        missing = sorted(told["missing_keys"])
        if missing == [HEAD] and self._checkpoint.bare:
            raise QprecError(_BARE.format(folder=folder))
        check_formats(self._checkpoint, (name for name in model.state_dict() if name in self._checkpoint.tensors))
        if missing:
            raise QprecError(
                f"{folder}: the tensor {missing[0]} is in none of its files; "
                "the checkpoint is incomplete or its config.json is another model's."
            )
        placed: nn.Module = model.to(self.device).eval()
        return placed

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

    def _given(self, dtype: str) -> nn.Module:
        """A model of a family that is not built here: by transformers, from tensors instead of files."""
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        made, cast = self._class(), torch_dtype(dtype)
        model = outline(self._checkpoint.config, self._attention)
        store = WeightStore(self._checkpoint, model, torch.device("cpu"), resident=False, check=WeightCheck([]))
        tensors = {name: store.tensor(name).to(cast) for name, _ in model.named_parameters()}
        try:
            loaded: nn.Module = made.from_pretrained(
                None,
                config=self._checkpoint.config,
                state_dict=tensors,
                dtype=cast,
                **({"attn_implementation": self._attention} if self._attention else {}),
            )
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # as above
            folder = self._checkpoint.folder
            raise QprecError(f"{folder}: transformers cannot load the weights: {in_one_line(error)}") from error
        return loaded.to(self.device).eval()


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
