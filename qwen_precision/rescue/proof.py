"""The proof that a rescaled model is the same function: fp32 outputs that equal the original's bit for bit."""

import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PretrainedConfig

from qwen_precision.dtypes import REFERENCE
from qwen_precision.model import Checkpoint, Encoded, WeightCheck, WeightStore, build, move_buffers
from qwen_precision.probe import Collector, Shadow, Task
from qwen_precision.progress import Progress
from qwen_precision.qwen3 import Scale
from qwen_precision.record import Rescaling


def rescaled_config(config: PretrainedConfig, rescaling: Rescaling) -> PretrainedConfig:
    """The config of the rescaled model: another eps, and lm_head on its own where it was untied."""
    changed = copy.deepcopy(config)
    changed.rms_norm_eps = rescaling.new_eps
    if rescaling.untied:
        changed.tie_word_embeddings = False
    return changed


def rescaled_store(
    checkpoint: Checkpoint, rescaling: Rescaling, attention: str | None, device: torch.device, resident: bool
) -> tuple[torch.nn.Module, WeightStore]:
    """The rescaled model on the meta device, and where its weights come from."""
    changed = replace(checkpoint, config=rescaled_config(checkpoint.config, rescaling))
    model = build(changed.config, attention)
    move_buffers(model, device)
    return model, WeightStore(changed, model, device, resident, WeightCheck([]), Scale(rescaling))


@dataclass
class Finals:
    """What came out of a probe at the end: a ``task.FinalHook`` that keeps it."""

    states: dict[int, Tensor] = field(default_factory=dict)
    """By prompt: the reference's hidden states after the final norm."""
    answers: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """By dtype and prompt, of the last position, float32: ``[batch, vocabulary]`` logits, or the ``[batch, hidden]``
    final hidden states of a model that has no lm_head."""

    def __call__(self, dtype: str, prompt: int, states: Tensor, logits: Tensor | None) -> None:
        """Keep what is needed of one stream."""
        if dtype == REFERENCE:
            self.states[prompt] = states
        self.answers[dtype, prompt] = (states if logits is None else logits)[:, -1].float()


def prove(
    checkpoint: Checkpoint,
    rescaling: Rescaling,
    prompts: list[Encoded],
    before: Finals,
    attention: str | None,
    resident: bool,
    vocabulary_rows: int,
    progress: Progress,
) -> tuple[bool, int]:
    """Whether the rescaled model computes in fp32, bit for bit, what the original did; and at how many tokens.

    Args:
        prompts: those of the first pass.
        before: what came out of it.
        vocabulary_rows: see ``task.Task``; as in the first pass, for a product's bits depend on its shape.
    """
    device = prompts[0].ids.device
    model, store = rescaled_store(checkpoint, rescaling, attention, device, resident)
    after = Finals()
    plan = Task([REFERENCE], 1.0, vocabulary_rows)
    Shadow(model, store, prompts, plan, Collector(), progress, after).run()
    undo = 2.0**-rescaling.final_norm
    same = after.states.keys() == before.states.keys() and all(
        torch.equal(states * undo, before.states[prompt]) for prompt, states in after.states.items()
    )
    pairs = [(after.answers[key], before.answers[key]) for key in after.answers]
    return same and all(torch.equal(ours, theirs) for ours, theirs in pairs), sum(p.ids.numel() for p in prompts)
