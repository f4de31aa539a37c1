"""Rescaled weights for a generation that failed: measured on the tokens it failed at, planned, and loaded.

The measurement is a probe of those tokens, a layer at a time, so that nothing but one layer is ever held in fp32.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import nn

from qwen_precision.dtypes import RESCUED
from qwen_precision.errors import QprecError
from qwen_precision.model import Checkpoint, Models, filled
from qwen_precision.probe import job_for, measure
from qwen_precision.record import Prompt, Rescaling, Rescue, Row
from qwen_precision.rescue import can_plan, rescaled_store, with_plan
from qwen_precision.settings import ProbeSettings
from qwen_precision.torch_dtypes import torch_dtype


class Rescaler:
    """Plans a rescaling from token ids, and loads the model with it.

    Args:
        models: where the rescaled models are kept.
        checkpoint: a checked checkpoint of a model that can be rescaled (``rescue.unsupported`` says).
        device: asked for, in the user's words.
        attention: ``sdpa``, ``eager``, or None for what transformers would choose.
        margin: headroom that every operation shall have.
        tell: called with what is being done.
    """

    def __init__(
        self,
        models: Models,
        checkpoint: Checkpoint,
        device: str,
        attention: str | None,
        margin: float,
        tell: Callable[[str], None],
    ) -> None:
        self._models, self._rescalings = models, dict[str, Rescaling]()
        self._checkpoint, self._device, self._attention, self._tell = checkpoint, device, attention, tell
        self._settings = ProbeSettings(
            dtypes=[RESCUED], device=device, attention=attention, memory="streamed", rescue_margin=margin
        )
        self.plan: Rescue | None = None
        """The last one made."""

    def rescale(self, prefixes: Sequence[Sequence[int]], tried: Collection[str], more: float) -> tuple[str, Rescaling]:
        """Rescaled weights with which these tokens stay inside fp16; gives their name among the models.

        Args:
            prefixes: token ids, without padding.
            tried: names of weights with which they failed.
            more: times the margin that is usual.

        Raises:
            NoRoom: they do not fit beside what is there.
            QprecError: no rescaling helps.
        """
        rescaling = self.rescaling(prefixes, more)
        name = next((name for name, held in self._rescalings.items() if held == rescaling), None)
        if name in tried or rescaling.changes_nothing:
            raise QprecError(f"{RESCUED} fails although every operation of these tokens is in range when measured")
        if name is None:
            name = f"{RESCUED} rescaled" + (f" {len(self._rescalings) + 1}" if self._rescalings else "")
            self._rescalings[name] = rescaling
        device = self._models.device
        self._models.add(name, RESCUED, lambda: self.load(rescaling, device))
        return name, rescaling

    def rescaling(self, prefixes: Sequence[Sequence[int]], more: float = 1.0) -> Rescaling:
        """The powers with which these tokens are inside fp16, with so many times the margin.

        Raises:
            QprecError: no rescaling does that, or it cannot be measured.
        """
        rows = [Row(text="", ids=list(ids), tokens=["" for _ in ids], padding=0) for ids in prefixes]
        prompts = [Prompt(name=f"row {number}", rows=[row], failed=None) for number, row in enumerate(rows)]
        margin = min(1024.0, self._settings.rescue_margin * more)
        settings = self._settings.model_copy(update={"rescue_margin": margin})
        job = job_for(self._checkpoint, self._checkpoint.source, settings, prompts)
        tell = self._tell
        run = measure(job, lambda done, total, what: tell(f"measuring for the rescue: {what}"))
        if can_plan(run):
            run = with_plan(run, self._checkpoint, margin, lambda done, total, what: tell(what))
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
        self._tell(f"loading the rescaled weights in {RESCUED}")
        model, store = rescaled_store(self._checkpoint, rescaling, self._attention, device, resident=False)
        return filled(model, store, torch_dtype(RESCUED)).to(device)
