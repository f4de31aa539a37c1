"""One fresh vLLM engine in a process of its own: rounds of prompts in, texts out. Run by ``test_live.py``."""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    asked = json.loads(sys.argv[1])
    llm = LLM(
        asked["model"],
        dtype=asked["dtype"],
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=4,
        worker_extension_cls="qwen_precision.vllm.WorkerExtension",
        logits_processors=["qwen_precision.vllm.logits:WatchLogits"],
    )
    if asked["record"]:
        llm.collective_rpc("qprec_start")
    extra = {"qprec": "watch"} if asked["ask"] else None
    params = SamplingParams(temperature=0, max_tokens=6, extra_args=extra)
    texts = [[each.outputs[0].text for each in llm.generate(prompts, params)] for prompts in asked["rounds"]]
    if asked["record"]:
        llm.collective_rpc("qprec_stop", args=(asked["record"],))
    Path(asked["to"]).write_text(json.dumps(texts), encoding="utf-8")
