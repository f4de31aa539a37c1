"""One fresh vLLM engine in a process of its own: rounds of prompts in, texts out. Run by ``fresh.py``."""

import json
import os
import sys
from itertools import count, cycle
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}

if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    if asked["workers"] > 1:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # there may be fewer cores than workers
    from vllm import LLM, SamplingParams

    llm = LLM(
        asked["model"],
        dtype=asked["dtype"],
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=4,
        tensor_parallel_size=asked["workers"],
        worker_extension_cls="qwen_precision.vllm.WorkerExtension",
        logits_processors=["qwen_precision.vllm.logits:WatchLogits"],
    )
    if asked["fault"]:
        from qwen_precision.watcher import Watcher

        sound, left = Watcher._read, count(asked["fault"], -1)

        def read(self: Watcher, *args: Any) -> None:
            sound(self, *args)
            if not next(left):
                raise MemoryError("planted")

        Watcher._read = read  # type: ignore[method-assign]
    if asked["record"]:
        llm.collective_rpc("qprec_start")

    def params(ask: str | None) -> SamplingParams:
        return SamplingParams(
            temperature=0, max_tokens=asked["tokens"], extra_args={"qprec": ask} if ask is not None else None
        )

    texts = []
    for prompts in asked["rounds"]:
        wishes = [params(ask) for _, ask in zip(prompts, cycle(asked["asks"]), strict=False)]
        texts.append([each.outputs[0].text for each in llm.generate(prompts, wishes)])
    if asked["record"]:
        llm.collective_rpc("qprec_stop", args=(asked["record"],))
    Path(asked["to"]).write_text(json.dumps(texts), encoding="utf-8")
