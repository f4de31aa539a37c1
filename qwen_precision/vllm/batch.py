"""A forward of an engine: the tokens of several requests behind each other, without an axis for the requests."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qwen_precision.watcher import Inspector, Seen


@dataclass(frozen=True)
class Request:
    """What of a request one forward runs."""

    id: str
    """As vLLM calls it."""
    ids: list[int]
    """All its token ids so far, those of this forward last."""
    start: int
    """Position of the first token that this forward runs; what stands before it is in the cache."""


def batch_of(runner: Any, tokens: Tensor | None) -> list[Request]:
    """The requests of the forward that is about to run, in the order in which their tokens lie.

    Args:
        runner: vLLM's model runner (the V1 interface).
        tokens: ``[tokens]`` ids the model is given, or None where it is given embeddings; with asynchronous scheduling
            the runner's own list does not hold the newest ones yet.
    """
    batch, starts = runner.input_batch, runner.query_start_loc.np
    given = tokens.tolist() if tokens is not None else []
    requests = []
    for number, name in enumerate(batch.req_ids):
        first, last = int(starts[number]), int(starts[number + 1])
        start = int(batch.num_computed_tokens_cpu[number])
        known = batch.token_ids_cpu[number, : start + last - first].tolist()
        ids = [*known[:start], *given[first:last]] if len(given) >= last else known
        requests.append(Request(str(name), [max(0, each) for each in ids], start))
    return requests


Spoilt = set[tuple[str, str]]
"""Attention (by path) in which a request had something not finite in an earlier forward, and so has it in its cache."""


@dataclass
class FlatInspector(Inspector):
    """Looks at operations of such a forward closely, the first time: an engine cannot run one again.

    Args:
        requests: by name, in the order of the rows.
        spoilt: what earlier forwards left; added to.
    """

    requests: list[str] = field(default_factory=list)
    spoilt: Spoilt = field(default_factory=set)

    def _clean(self, seen: Seen) -> Tensor:
        """As for any operation; attention also reads the request's other tokens, and its cache, no argument."""
        clean = super()._clean(seen)
        if "attention" not in seen.op or self.places is None or seen.out.shape[:1] != (len(self.places),):
            return clean
        axes = [1] * (seen.out.dim() - 1)
        by_token = clean.expand(len(self.places), *axes).flatten().clone()
        bad = self.bad(seen.out).flatten(1).any(dim=1)
        owners = self._owners(torch.arange(len(self.places), device=seen.out.device))
        for row, request in enumerate(self.requests):
            mine, key = owners == row, (seen.path, request)
            by_token[mine] = bool(by_token[mine].all()) and key not in self.spoilt
            if bool(bad[mine].any()):
                self.spoilt.add(key)
        return by_token.view(-1, *axes)
