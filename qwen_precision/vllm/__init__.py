"""vLLM watched from inside, while it serves: its workers' operations, and the logits of requests that ask for it.

    llm = LLM(model, dtype="float16", enforce_eager=True, worker_extension_cls="qwen_precision.vllm.WorkerExtension")
    llm.collective_rpc("qprec_start")
    llm.generate(…)
    llm.collective_rpc("qprec_stop", args=("run.json",))     # then: qprec report run.json

Other folders import the names below, from here. Nothing here imports vLLM but ``logits.py``, which vLLM alone loads.
May import: record, qwen3, settings, judge, model, watcher, probe, blocks, render, rescue, report.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_precision.vllm.extension import WorkerExtension

__all__ = ["WorkerExtension"]


def __getattr__(name: str) -> Any:
    # Installed, the logits processor is loaded by every vLLM of the environment, through here: it shall cost nothing.
    if name == "WorkerExtension":
        from qwen_precision.vllm.extension import WorkerExtension

        return WorkerExtension
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
