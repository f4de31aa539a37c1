"""vLLM watched from inside, while it serves: its workers' operations, and the logits of requests that ask for it.

    llm = LLM(model, dtype="float16", enforce_eager=True, worker_extension_cls="qwen_precision.vllm.WorkerExtension")
    llm.collective_rpc("qprec_start")
    llm.generate(…)
    llm.collective_rpc("qprec_stop", args=("run.json",))     # then: qprec report run.json

Other folders import the names below, from here. Nothing here imports vLLM but ``logits.py``, which vLLM alone loads.
May import: record, qwen3, settings, judge, model, watcher, probe, blocks, render, rescue, report.
"""

from qwen_precision.vllm.extension import WorkerExtension

__all__ = ["WorkerExtension"]
