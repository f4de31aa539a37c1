"""What vLLM mixes into its workers (``worker_extension_cls``): start and stop, over ``collective_rpc``."""

import json
import os
from pathlib import Path
from typing import Any

from qwen_precision.dtypes import DTYPES
from qwen_precision.errors import QprecError
from qwen_precision.files import check_writable
from qwen_precision.model import locate, open_checkpoint
from qwen_precision.record import save, to_json
from qwen_precision.torch_dtypes import short_name
from qwen_precision.vllm.live import Live, Worker, engine_version
from qwen_precision.vllm.names import own_file, replica


class WorkerExtension:
    """Watches every operation of the model in each worker; what the engine answers does not change by a bit.

    It looks closely at every operation, because an engine cannot run a forward again: it is slow while it watches, and
    nothing of it is left when it has stopped.
    """

    _qprec: Live | None = None

    def qprec_start(self) -> None:
        """Begin to watch.

        Raises:
            QprecError: vLLM compiled the model, its runner is not the V1 one or lacks what the one of vLLM 0.32 has,
                its checkpoint is nothing that qprec reads, or it is being watched already.
        """
        if self._qprec is not None:
            raise QprecError("qprec_start: this worker is being watched already; call qprec_stop first.")
        try:
            self._qprec = _live(self)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise QprecError(
                f"qprec_start: this vLLM ({engine_version()}) is not as 0.32 is ({type(error).__name__}: {error}), so "
                "nothing is watched; watch its logits alone (--logits-processors)."
            ) from error

    def qprec_stop(self, path: str | None = None) -> dict[str, Any]:
        """End it; where the record cannot be written it is not ended, and may be stopped again with another path.

        Args:
            path: where to save the record, which `qprec report` shows; of several workers each has its own
                (``names.own_file``). None to save nothing.

        Returns:
            The record, in plain JSON values.

        Raises:
            QprecError: qprec_start was not called, no request ran since, or the path cannot be written.
        """
        live = self._qprec
        if live is None:
            raise QprecError("qprec_stop: this worker is not being watched; call qprec_start first.")
        if path is not None:
            check_writable(Path(path), label="qprec_stop")  # before anything ends: a long watch is not lost to a typo
        run = live.run()
        if path is not None and run.passes:
            save(run, self._file(Path(path)))
        self._qprec = None
        live.close()
        if not run.passes:
            why = f"{run.stopped}, and no request ran before" if run.stopped else "no request ran since qprec_start"
            raise QprecError(f"qprec_stop: {why}, so nothing was measured.")
        plain: dict[str, Any] = json.loads(to_json(run))
        return plain

    def _file(self, path: Path) -> Path:
        worker: Any = self
        return own_file(path, worker.vllm_config.parallel_config, int(worker.rank), os.getpid())


def _live(worker: Any) -> Live:
    runner, config = worker.model_runner, worker.vllm_config
    refuse_what_has_no_places(runner, config)
    source = str(config.model_config.model)
    folder, commit = locate(source, config.model_config.revision)
    checkpoint = open_checkpoint(folder, source, commit)
    dtype = short_name(config.model_config.dtype)
    if dtype not in DTYPES:
        raise QprecError(f"qprec_start: vLLM runs this model in {dtype}, which is none of {', '.join(DTYPES)}.")
    parallel = config.parallel_config
    told = Worker(checkpoint, source, dtype, int(worker.rank), int(parallel.world_size), replica(parallel))
    return Live(runner, runner.get_model(), told)


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
