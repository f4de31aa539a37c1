"""Rescaled weights for a generation that failed: measured on the tokens it failed at, planned, and loaded.

The measurement is a probe of those tokens, a layer at a time, so that nothing but one layer is ever held in fp32.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from qwen_precision.errors import QprecError
from qwen_precision.judge.needs import DTYPE
from qwen_precision.model.folder import Checkpoint
from qwen_precision.model.weightcheck import torch_dtype
from qwen_precision.probe.run import job_for, measure, with_plan
from qwen_precision.qwen3.rescaling import Rescaling
from qwen_precision.record.rescue import Rescue
from qwen_precision.record.run import Prompt, Row
from qwen_precision.rescue.plan import can_plan, rescaled_store
from qwen_precision.settings.config import ProbeSettings


class Rescaler:
    """Plans a rescaling from token ids, and loads the model with it.

    Args:
        checkpoint: a checked checkpoint of a model that can be rescaled (``rescue.unsupported`` says).
        device: asked for, in the user's words.
        attention: ``sdpa``, ``eager``, or None for what transformers would choose.
        margin: headroom that every operation shall have.
        tell: called with what is being done.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: str, attention: str | None, margin: float, tell: Callable[[str], None]
    ) -> None:
        self._checkpoint, self._device, self._attention, self._tell = checkpoint, device, attention, tell
        self._settings = ProbeSettings(
            dtypes=[DTYPE], device=device, attention=attention, memory="streamed", rescue_margin=margin
        )
        self.plan: Rescue | None = None
        """The last one made."""

    def rescaling(self, prefixes: Sequence[Sequence[int]], more: float = 1.0) -> Rescaling:
        """The powers with which these tokens are inside fp16, with so many times the margin.

        Raises:
            QprecError: no rescaling does that, or it cannot be measured.
        """
        rows = [Row(text="", ids=list(ids), tokens=["" for _ in ids], padding=0) for ids in prefixes]
        prompts = [Prompt(name=f"row {number}", rows=[row]) for number, row in enumerate(rows)]
        margin = min(1024.0, self._settings.rescue_margin * more)
        settings = self._settings.model_copy(update={"rescue_margin": margin})
        job = job_for(self._checkpoint, self._checkpoint.source, settings, prompts)
        tell = self._tell
        run = measure(job, lambda done, total, what: tell(f"measuring for the rescue: {what}"))
        if run.stopped is None and run.rescue is None and can_plan(run):
            run = with_plan(job, run, lambda done, total, what: tell(what))
        if run.stopped == "interrupted" or run.unfinished is not None:
            raise KeyboardInterrupt
        if run.rescue is None:
            raise QprecError(f"the rescue could not be measured: {run.stopped}")
        self.plan = run.rescue
        blocking = next((each for each in self.plan.stuck if each.fails), None)
        if blocking is not None:
            raise QprecError(f"no rescaling can help: {blocking.name} in {blocking.module}: {blocking.why}")
        return self.plan.rescaling

    def load(self, rescaling: Rescaling, device: torch.device) -> nn.Module:
        """The rescaled model in fp16; every number is rounded once, from the files' own.

        Raises:
            QprecError: a shard cannot be read.
        """
        self._tell(f"loading the rescaled weights in {DTYPE}")
        model, store = rescaled_store(self._checkpoint, rescaling, self._attention, device, resident=False)
        for name, parameter in list(model.named_parameters()):
            new = nn.Parameter(store.tensor(name).to(torch_dtype(DTYPE)), requires_grad=False)
            for module in model.modules():  # tied weights are one parameter that two modules hold
                for key, held in module._parameters.items():
                    if held is parameter:
                        module._parameters[key] = new
        return model.to(device)
