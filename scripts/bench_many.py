"""What many records and many ranks cost: listing, merging, and two ranks on two cores. Parts of ``bench.py``."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from qwen_precision.blocks import Folder, Plan
from qwen_precision.blocks.summary import SUFFIX, Summary, _ends
from qwen_precision.settings import DIGITS

BLOCKS = 10_000
PROMPTS = 16
"""Of a block: a record of 36 layers has 1 MB then."""
LISTED = 100_000
RUNS = 3
_COMMAND = """
import sys
from qwen_precision.cli import main
code = main(sys.argv[1:])
"""
_PEAK = """
with open("/proc/self/status") as file:  # what getrusage tells is that of the parent, if that was larger
    sys.stderr.write("peak " + next(line.split()[1] for line in file if line.startswith("VmHWM")))
sys.exit(code)
"""


_LISTED = """
import sys
from qwen_precision.blocks import plan_for
from qwen_precision.settings import Corpus, load_settings
plan = plan_for(["Qwen/Qwen3-8B"], None, load_settings(None, {}), Corpus(None, sys.argv[1]))
print(len(plan.share(2, 8)), len(plan.text()))
code = 0
"""
"""What a command with a folder does before it looks for a checkpoint."""


def commanded(words: list[str], folder: Path, code: str = _COMMAND) -> tuple[float, float]:
    """Seconds of a whole command in a process of its own, and its peak memory in MB."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code + _PEAK, *words], cwd=folder, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stderr)
    return seconds, int(done.stderr.rpartition("peak ")[2]) * 1024 / 1e6


def shaped(folder: Path, layers: int, hidden: int = 64) -> Path:
    """A checkpoint with as many operations as a large one, and small tensors."""
    import torch
    import transformers
    from make_checkpoint import DEMO

    if not (folder / "tokenizer.json").exists():
        heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
        torch.manual_seed(0)
        model: Any = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=512, **sizes, **heads))
        model.to(torch.bfloat16).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(DEMO / name, folder / name)
    return folder


def corpus(path: Path, count: int) -> Path:
    """JSONL of chat turns, about 150 bytes each."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            turn = {"role": "user", "content": f"What is the capital of France? {number} " * 3}
            file.write(json.dumps({"name": f"p{number}", "messages": [turn]}) + "\n")
    return path


def listing(base: Path) -> None:
    """100,000 prompts listed and planned for eight ranks: the whole process."""
    corpus(base / "listed.jsonl", LISTED)
    seconds, peak = min(commanded(["listed.jsonl"], base, _LISTED) for _ in range(3))
    print(f"\n{LISTED:,} prompts listed and planned: {seconds:.1f} s, {peak:.0f} MB")


def merging(base: Path) -> None:
    """10,000 blocks of a model with an 8B's operations, merged: the whole command.

    One block is measured, and the others are it under other names with other headrooms; every record is a file of its
    own and of full size.
    """
    model, runs = shaped(base / "8B-shaped", 36), base / "merged"
    shutil.rmtree(runs, ignore_errors=True)
    corpus(base / "merged.jsonl", PROMPTS)
    words = ["probe", str(model), "--prompts", "merged.jsonl", "-o", "merged/", "--block", str(PROMPTS), "-q"]
    commanded(words, base)
    size = copied(Folder(runs), BLOCKS)
    for name in ("json", "table", "html"):
        seconds, peak = commanded(["report", "merged/", "-o", f"out-{name}", "-f", name, "--force"], base)
        print(
            f"\n{BLOCKS:,} blocks of {PROMPTS} prompts ({size / 1e9:.1f} GB) as {name}: {seconds:.1f} s, {peak:.0f} MB"
        )
    shutil.rmtree(runs)


def copied(folder: Folder, count: int) -> int:
    """So many records and summaries from the one that is there, with its plan; gives their bytes."""
    (record,) = folder.records()
    ((kept,), _) = folder.plans()
    plan = kept.plan
    summary = Summary.model_validate_json(record.with_suffix(SUFFIX).read_text())
    text, dice = record.read_text(encoding="utf-8"), random.Random(0)
    (folder.path / plan.name).unlink()
    blocks = []
    for number in range(count):
        digest, first = f"{number:032x}", number * PROMPTS
        keys = [f"{dice.randrange(16**DIGITS):0{DIGITS}x}" for _ in range(PROMPTS)]
        told = {"digest": digest, "first": first, "hashes": "".join(keys)}
        block = summary.block.model_copy(update=told)
        changed = text.replace(summary.block.hashes, block.hashes)
        for old, new in zip(summary.block.keys, keys, strict=True):
            changed = changed.replace(old, new)
        data = changed.replace('"name":"p', f'"name":"b{number}p').replace(summary.block.digest, digest).encode()
        path = folder.record(f"{number:024x}")
        path.write_bytes(data)
        path.with_suffix(SUFFIX).write_text(_another(summary, data, block, dice).model_dump_json())
        blocks.append(block)
    record.unlink()
    record.with_suffix(SUFFIX).unlink()
    folder.keep(Plan(**{**plan.model_dump(), "blocks": blocks, "prompts": count * PROMPTS}))
    return count * len(text)


def _another(summary: Summary, data: bytes, block: Any, dice: random.Random) -> Summary:
    """A summary with headrooms of its own, of a record of its own."""
    factor = dice.uniform(0.5, 2.0)
    rows = {
        dtype: [row.model_copy(update={"room": row.room and row.room * factor}) for row in each]
        for dtype, each in summary.rows.items()
    }
    standing = [(key, score * dice.uniform(0.5, 2.0), prompt) for key, score, prompt in summary.standing]
    told = {"size": len(data), "ends": _ends(data[: 16 << 10], data[-(16 << 10) :]), "block": block, "rows": rows}
    names = [f"b{block.first // PROMPTS}{name}" for name in summary.names]
    hashes = [int(key, 16) for key in block.keys]
    return summary.model_copy(update={**told, "names": names, "prompts": hashes, "standing": standing})


def ranks(base: Path) -> None:
    """64 blocks on a tiny model: one rank, and two at once, one thread each; loading counts."""
    model = shaped(base / "tiny", 12)
    corpus(base / "ranks.jsonl", 64 * 8)
    program = [sys.executable, "-m", "qwen_precision", "probe", str(model), "-q"]
    words = [*program, "--prompts", "ranks.jsonl", "--block", "8"]
    found: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for _ in range(RUNS):
        for count, measured in found.items():
            shutil.rmtree(base / "ranks", ignore_errors=True)
            shards = [[*words, "-o", "ranks/", "--shard", f"{n}/{count}"] for n in range(1, count + 1)]
            measured.append(together(shards, base))
    walls, alone = zip(*found[1], strict=True)
    both, most = zip(*found[2], strict=True)
    wall, processor = min(both) / min(walls), min(most) / min(alone)
    print(f"\n64 blocks: one rank {min(walls):.1f} s, two {min(both):.1f} s, {wall:.2f}x; in seconds of a processor")
    print(f"{min(alone):.1f} and at most {min(most):.1f} each, {processor:.2f}x")


def together(commands: list[list[str]], folder: Path) -> tuple[float, float]:
    """Wall seconds of commands that run beside each other, one thread each, and the most that one of them computed."""
    started, most = time.perf_counter(), 0.0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for child in [subprocess.Popen(each, cwd=folder, env=environment) for each in commands]:
        used = os.wait4(child.pid, 0)[2]
        most = max(most, used.ru_utime + used.ru_stime)
    return time.perf_counter() - started, most


PARTS = {"listing": listing, "merging": merging, "ranks": ranks}
