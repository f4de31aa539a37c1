"""What vLLM mixes into its workers (``worker_extension_cls``): start and stop, over ``collective_rpc``."""

import json
from pathlib import Path
from typing import Any

from qwen_precision.dtypes import DTYPES
from qwen_precision.errors import QprecError
from qwen_precision.model import locate, open_checkpoint
from qwen_precision.record import save, to_json
from qwen_precision.torch_dtypes import short_name
from qwen_precision.vllm.live import Live, Worker


class WorkerExtension:
    """Watches every operation of the model in each worker; what the engine answers does not change by a bit.

    It looks closely at every operation, because an engine cannot run a forward again: it is slow while it watches, and
    nothing of it is left when it has stopped.
    """

    _qprec: Live | None = None

    def qprec_start(self) -> None:
        """Begin to watch.

        Raises:
            QprecError: vLLM compiled the model, its runner is not the V1 one, its checkpoint is nothing that qprec
                reads, or it is being watched already.
        """
        if self._qprec is not None:
            raise QprecError("qprec_start: this worker is being watched already; call qprec_stop first.")
        worker: Any = self
        runner, config = worker.model_runner, worker.vllm_config
        refuse_what_has_no_places(runner, config)
        source = str(config.model_config.model)
        folder, commit = locate(source, config.model_config.revision)
        checkpoint = open_checkpoint(folder, source, commit)
        dtype = short_name(config.model_config.dtype)
        if dtype not in DTYPES:
            raise QprecError(f"qprec_start: vLLM runs this model in {dtype}, which is none of {', '.join(DTYPES)}.")
        ranks = int(config.parallel_config.world_size)
        self._qprec = Live(runner, runner.get_model(), Worker(checkpoint, source, dtype, int(worker.rank), ranks))

    def qprec_stop(self, path: str | None = None) -> dict[str, Any]:
        """End it.

        Args:
            path: where to save the record, which `qprec report` shows; of several workers each has its own, with
                ``.rank1`` and so on before the suffix for all but the first. None to save nothing.

        Returns:
            The record, in plain JSON values.

        Raises:
            QprecError: qprec_start was not called, or no request ran since.
        """
        if self._qprec is None:
            raise QprecError("qprec_stop: this worker is not being watched; call qprec_start first.")
        live, self._qprec = self._qprec, None
        run = live.stop()
        if not run.passes:
            raise QprecError("qprec_stop: no request ran since qprec_start, so nothing was measured.")
        if path is not None:
            rank = int(getattr(self, "rank", 0))
            whole = Path(path)
            save(run, whole if not rank else whole.with_name(f"{whole.stem}.rank{rank}{whole.suffix}"))
        plain: dict[str, Any] = json.loads(to_json(run))
        return plain


def refuse_what_has_no_places(runner: Any, config: Any) -> None:
    """Raise a QprecError where operations could not be told apart, or requests from each other."""
    mode = getattr(config.compilation_config.mode, "value", config.compilation_config.mode)
    if mode:
        raise QprecError(
            "qprec_start: vLLM compiled this model, so its operations have no names or places; start it with "
            "enforce_eager=True (--enforce-eager)."
        )
    if not hasattr(runner, "query_start_loc") or not hasattr(getattr(runner, "input_batch", None), "token_ids_cpu"):
        raise QprecError(
            f"qprec_start: {type(runner).__module__}.{type(runner).__name__} is a model runner that qprec does not "
            "know; start vLLM with VLLM_USE_V2_MODEL_RUNNER=0."
        )
