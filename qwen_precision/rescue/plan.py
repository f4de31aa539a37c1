"""A rescue from a probe's run: the plan, and the proof that the rescaled model is the same function.

The proof is a second fp32 pass over the same prompts with every tensor times its factor: final hidden states and
logits must equal the first pass's bit for bit. How it is written to disk is ``export.py``'s work.
"""

import torch
from pydantic import ValidationError

from qwen_precision.dtypes import RESCUED
from qwen_precision.errors import QprecError
from qwen_precision.judge import Columns, Limits, Report, beyond
from qwen_precision.model import Checkpoint, is_layerwise, read_tensor
from qwen_precision.progress import Progress, silent
from qwen_precision.qwen3 import EMBEDDING, HEAD, has_qk_norm, powers_of, why_not
from qwen_precision.record import MOST_POWER, Rescaling, Rescue, Run
from qwen_precision.rescue.bits import WeightBits
from qwen_precision.rescue.planner import Planner, Shape

_UNMOVED = ("unseen-failure", "unwatched")
"""Findings whose origin is not an operation of a single forward: no factor is known to move it."""


def wanted(report: Report) -> bool:
    """Whether a whole probe says that fp16 fails or is at risk, by what a single forward shows: factors move that."""
    mine = [finding for finding in report.findings if finding.dtype == RESCUED and finding.severity != "info"]
    return can_plan(report.run) and any(finding.kind not in _UNMOVED for finding in mine)


def can_plan(run: Run) -> bool:
    """Whether there is enough to plan from: fp16 and the reference, on all prompts."""
    return run.stopped is None and run.reference and RESCUED in run.dtypes


def with_plan(run: Run, checkpoint: Checkpoint, margin: float, progress: Progress) -> Run:
    """The run with the plan of a rescue; without one, and with the reason, if it was interrupted or a shard broke."""
    try:
        plan = plan_rescue(run, checkpoint, margin, progress)
    except KeyboardInterrupt:
        return run.model_copy(update={"unfinished": "interrupted while the rescue was planned"})
    except QprecError as error:
        return run.model_copy(update={"unfinished": f"the rescue could not be planned: {error}"})
    return run.model_copy(update={"rescue": plan})


def plan_rescue(run: Run, checkpoint: Checkpoint, margin: float, progress: Progress = silent) -> Rescue:
    """The plan that brings every operation inside fp16; reads the weights that it would change once.

    Raises:
        QprecError: a shard cannot be read.
    """
    config, reason = checkpoint.config, unsupported(checkpoint)
    if reason is not None:
        return _no_rescue(run, margin, reason)
    channels = getattr(config, "moe_intermediate_size", 0)
    shape = Shape(
        tied=bool(getattr(config, "tie_word_embeddings", False)) and not checkpoint.bare,
        qk_norm=has_qk_norm(checkpoint.tensors),
        eps=float(getattr(config, "rms_norm_eps", None) or 0.0),
        gate_channels=channels if isinstance(channels, int) else 0,
    )
    tensors = [name for name in checkpoint.tensors if not (checkpoint.bare and name == HEAD)]
    planner = Planner(run, margin, shape, tensors, lambda name: WeightBits(read_tensor(checkpoint, name)), progress)
    try:
        return planner.plan()
    except ValidationError:  # the record's own bound, of which there is one
        return _no_rescue(run, margin, f"it takes powers of two beyond 2^{MOST_POWER}, which float32 does not hold")


def _no_rescue(run: Run, margin: float, why: str) -> Rescue:
    """What is said of a model that is not rescaled: why, and what would have to stay in fp32 instead."""
    return Rescue(
        margin=margin,
        unsupported=why,
        rescaling=Rescaling(stream=0, qk_norm=False, final_norm=0, untied=False, eps=0.0, layers=[]),
        losses=[],
        stuck=[],
        fp32_modules=beyond(Columns(run, Limits())),
        gate_channels=0,
        exported=None,
    )


def unsupported(checkpoint: Checkpoint) -> str | None:
    """Why a checkpoint cannot be rescaled whatever its numbers are, or None."""
    kind = getattr(checkpoint.config, "model_type", "")
    reason = why_not(kind)
    if reason is not None:
        return reason
    if not is_layerwise(checkpoint.config):
        return f"only causal and bare models can be rescaled, this is {(checkpoint.config.architectures or [kind])[0]}"
    if checkpoint.only_read is not None:
        return f"{checkpoint.only_read}; rescale the checkpoint they were made from"
    normed = has_qk_norm(checkpoint.tensors)
    unknown = [name for name in checkpoint.tensors if powers_of(name, normed) is None and not name.endswith("inv_freq")]
    if unknown:
        return f"the tensor {unknown[0]} is not one that qprec knows how to rescale"
    tied = getattr(checkpoint.config, "tie_word_embeddings", False) and not checkpoint.bare
    if tied and HEAD in checkpoint.tensors:
        embedding = next(name for name in checkpoint.tensors if name.endswith(EMBEDDING))
        if not torch.equal(read_tensor(checkpoint, HEAD), read_tensor(checkpoint, embedding)):
            return "config.json ties lm_head to the embedding, but the files hold another lm_head; which one counts?"
    return None
