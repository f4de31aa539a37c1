"""Which expert is named where each has its own slice of one weight."""

import torch
from torch import nn

from qwen_precision.watcher.inspector import Inspector, storages
from qwen_precision.watcher.mode import Seen


def test_an_expert_is_counted_from_where_its_weight_begins_in_memory() -> None:
    """All weights may lie in one block: here one expert's worth of something else stands before them."""
    module = nn.Module()
    module.experts = nn.Parameter(torch.zeros(5, 3, 3)[1:], requires_grad=False)
    inspector = Inspector(torch.ones(1, 2, dtype=torch.bool), 1.0, storages(module))
    inspector.note_index((torch.zeros(2, 3), [torch.tensor([0])]))
    out = torch.full((1, 3), float("inf"), dtype=torch.float16)
    inspector(Seen("mlp.experts", "linear", 0, (torch.zeros(1, 3), module.experts[2]), out, None))
    assert [each.event.expert for each in inspector.found] == [2]
