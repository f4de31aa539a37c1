"""A rescue from a probe's run: the plan, and the proof that the rescaled model is the same function.

The proof is a second fp32 pass over the same prompts with every tensor times its factor: final hidden states and
logits must equal the first pass's bit for bit. How it is written to disk is ``export.py``'s work.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PretrainedConfig

from qwen_precision.dtypes import REFERENCE
from qwen_precision.judge.checks import judge
from qwen_precision.judge.findings import Limits
from qwen_precision.judge.needs import DTYPE
from qwen_precision.model.folder import Checkpoint
from qwen_precision.model.skeleton import build, move_buffers
from qwen_precision.model.weightcheck import WeightCheck
from qwen_precision.model.weights import WeightStore, read_tensor
from qwen_precision.probe.collect import Collector
from qwen_precision.probe.plan import Encoded, Plan
from qwen_precision.probe.shadow import Shadow
from qwen_precision.qwen3.rescaling import EMBEDDING, HEAD, Rescaling, Scale, powers_of
from qwen_precision.record.rescue import Rescue
from qwen_precision.record.run import Run
from qwen_precision.rescue.bits import WeightBits
from qwen_precision.rescue.planner import Planner, Shape

Progress = Callable[[int, int, str], None]

FAMILIES = ("qwen3", "qwen3_moe")
"""``model_type`` of the models whose operations the tables of ``rescaling.py`` describe."""


def wanted(run: Run, limits: Limits) -> bool:
    """Whether a whole probe says that fp16 fails or is at risk."""
    return can_plan(run) and judge(run, limits).verdict[DTYPE] in ("fail", "risk")


def can_plan(run: Run) -> bool:
    """Whether there is enough to plan from: fp16 and the reference, on all prompts."""
    return run.stopped is None and run.reference and DTYPE in run.dtypes


def plan_rescue(
    run: Run, checkpoint: Checkpoint, margin: float, progress: Progress = lambda done, total, what: None
) -> Rescue:
    """The plan that brings every operation inside fp16; reads the weights that it would change once.

    Raises:
        QprecError: a shard cannot be read.
    """
    config = checkpoint.config
    eps, reason = float(getattr(config, "rms_norm_eps", 0.0)), unsupported(checkpoint)
    if reason is not None:
        nothing = Rescaling(stream=0, final_norm=0, untied=False, eps=eps, layers=[])
        return Rescue(margin=margin, unsupported=reason, rescaling=nothing, losses=[], stuck=[], fp32_modules=[],
                      gate_channels=0, exported=None)  # fmt: skip
    shape = Shape(
        tied=bool(getattr(config, "tie_word_embeddings", False)), eps=eps,
        gate_channels=int(getattr(config, "moe_intermediate_size", 0) or 0),
    )  # fmt: skip
    return Planner(
        run, margin, shape, checkpoint.tensors, lambda name: WeightBits(read_tensor(checkpoint, name)), progress
    ).plan()


def unsupported(checkpoint: Checkpoint) -> str | None:
    """Why a checkpoint cannot be rescaled whatever its numbers are, or None."""
    kind = getattr(checkpoint.config, "model_type", "")
    if kind not in FAMILIES:
        return f"only Qwen3 models ({', '.join(FAMILIES)}) can be rescaled, this is {kind!r}"
    unknown = [name for name in checkpoint.tensors if powers_of(name) is None and not name.endswith("inv_freq")]
    if unknown:
        return f"the tensor {unknown[0]} is not one that qprec knows how to rescale"
    if getattr(checkpoint.config, "tie_word_embeddings", False) and HEAD in checkpoint.tensors:
        embedding = next(name for name in checkpoint.tensors if name.endswith(EMBEDDING))
        if not torch.equal(read_tensor(checkpoint, HEAD), read_tensor(checkpoint, embedding)):
            return "config.json ties lm_head to the embedding, but the files hold another lm_head; which one counts?"
    return None


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
    """What came out of a probe at the end: a ``plan.FinalHook`` that keeps it."""

    states: dict[int, Tensor] = field(default_factory=dict)
    """By prompt: the reference's hidden states after the final norm."""
    logits: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """By dtype and prompt: ``[batch, vocabulary]`` of the last position, float32."""

    def __call__(self, dtype: str, prompt: int, states: Tensor, logits: Tensor | None) -> None:
        """Keep what is needed of one stream."""
        if dtype == REFERENCE:
            self.states[prompt] = states
        if logits is not None:
            self.logits[dtype, prompt] = logits[:, -1].float()


def prove(
    checkpoint: Checkpoint, rescaling: Rescaling, prompts: list[Encoded], before: Finals, attention: str | None,
    resident: bool, vocabulary_rows: int, progress: Progress,
) -> tuple[bool, int]:  # fmt: skip
    """Whether the rescaled model computes in fp32, bit for bit, what the original did; and at how many tokens.

    Args:
        prompts: those of the first pass.
        before: what came out of it.
        vocabulary_rows: see ``plan.Plan``; as in the first pass, for a product's bits depend on its shape.
    """
    device = prompts[0].ids.device
    model, store = rescaled_store(checkpoint, rescaling, attention, device, resident)
    after = Finals()
    plan = Plan([REFERENCE], 1.0, vocabulary_rows)
    Shadow(model, store, prompts, plan, Collector(), progress, after).run()
    undo = 2.0**-rescaling.final_norm
    same = after.states.keys() == before.states.keys() and all(
        torch.equal(states * undo, before.states[prompt]) for prompt, states in after.states.items()
    )
    pairs = [(after.logits[key], before.logits[key]) for key in after.logits]
    return same and all(torch.equal(ours, theirs) for ours, theirs in pairs), sum(p.ids.numel() for p in prompts)
