"""An engine without vLLM: tokens of all requests behind each other, a cache that is no argument, a runner that knows.

Channel 0 of a token's embedding is ``size`` of its id; the first layer's ``down_proj`` multiplies it by 1,000, so an
id whose size is above 65.504 overflows there in float16, and in no other place.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qwen_precision.vllm import WorkerExtension
from support.checkpoints import DEMO

BAD = 300
"""The id that overflows."""


class Norm(nn.Module):
    """As vLLM's own: adds to the stream first, then norms, in float32."""

    def forward(self, update: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        whole = update.float() + stream.float()
        stream = whole.to(update.dtype)
        root = torch.rsqrt(whole.pow(2).mean(dim=-1, keepdim=True) + 1e-6)
        return (whole * root).to(update.dtype), stream


class Attention(nn.Module):
    """The mean of all tokens of a request so far; those of earlier forwards are in the cache."""

    def __init__(self, engine: "Engine", layer: int) -> None:
        super().__init__()
        self.engine, self.layer = [engine], layer

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        torch.ops.qprec_pretend.attention_with_output(x, out, self.layer)
        return out


class Layer(nn.Module):
    def __init__(self, engine: "Engine", number: int, rotary: nn.Module) -> None:
        super().__init__()
        self.down_proj = nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            self.down_proj.weight.copy_(torch.eye(4) * (1000 if not number else 1))
        self.rotary_emb, self.attn, self.input_layernorm = rotary, Attention(engine, number), Norm()

    def forward(self, x: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        x, stream = self.input_layernorm(self.down_proj(x), stream)
        return self.attn(self.rotary_emb(x)), stream


class Engine(nn.Module):
    """The model, its runner and its cache."""

    def __init__(self) -> None:
        super().__init__()
        rotary = nn.ReLU()
        self.layers = nn.ModuleList(Layer(self, number, rotary) for number in range(2))
        self.half()
        self.cache: dict[tuple[int, int], list[Tensor]] = {}
        self.slots: list[int] = []
        self.runner = SimpleNamespace(
            input_batch=SimpleNamespace(req_ids=[], token_ids_cpu=np.zeros((4, 16), int)),
            query_start_loc=SimpleNamespace(np=np.zeros(5, int)),
            get_model=lambda: self,
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.ones((len(input_ids), 4)).half()
        x[:, 0] = torch.where(input_ids == BAD, 100, 1)
        stream = torch.zeros_like(x)
        for layer in self.layers:
            x, stream = layer(x, stream)
        return x

    def run(self, requests: dict[str, tuple[int, list[int]]], slots: dict[str, int] | None = None) -> Tensor:
        """One forward: by request, how many of its ids are in the cache already, and all its ids."""
        batch, ids, owners = self.runner.input_batch, [], []
        batch.req_ids = list(requests)
        batch.num_computed_tokens_cpu = np.array([start for start, _ in requests.values()])
        for number, (name, (start, own)) in enumerate(requests.items()):
            batch.token_ids_cpu[number, : len(own)] = own
            ids += own[start:]
            owners += [(slots or {}).get(name, number)] * len(own[start:])
            self.runner.query_start_loc.np[number + 1] = len(ids)
        self.slots = owners
        CURRENT[:] = [self]
        with torch.inference_mode():
            answer: Tensor = self(input_ids=torch.tensor(ids))
        return answer


CURRENT: list[Engine] = []


def attention(x: Tensor, output: Tensor, layer: int) -> None:
    [engine] = CURRENT
    for place, slot in enumerate(engine.slots):
        kept = engine.cache.setdefault((layer, slot), [])
        kept.append(x[place].clone())
        output[place] = torch.stack(kept).float().mean(dim=0).to(x.dtype)


LIBRARY = torch.library.Library("qprec_pretend", "DEF")
LIBRARY.define("attention_with_output(Tensor x, Tensor(a!) output, int layer) -> ()")
LIBRARY.impl("attention_with_output", attention, "CPU")


class Worker(WorkerExtension):
    """As vLLM mixes it in: what a worker has beside it."""

    def __init__(self, engine: Engine, mode: int = 0, rank: int = 0) -> None:
        self.model_runner: Any = engine.runner
        self.rank = rank
        self.vllm_config: Any = SimpleNamespace(
            compilation_config=SimpleNamespace(mode=mode),
            model_config=SimpleNamespace(model=str(DEMO), revision=None, dtype=torch.float16),
            parallel_config=SimpleNamespace(world_size=2),
        )
