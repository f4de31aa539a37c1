"""Hostile records, folders, checkpoints, command lines, engines and YAML files, each through the program with limits.

    python scripts/fuzz.py [--seed N] [--share 0.01] [--kind command] [--keep FOLDER]

A case is a fork of this process: 1 GB of memory beyond what it has, which no file here may use up, 10 seconds of a
processor, an exit code of 0 to 3, and no bug of ours. What breaks is written to the folder. The same seed gives the
same cases.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "qwen_precision" / "demo"
FIXTURES = ROOT / "tests" / "fixtures"
SECONDS, MEMORY = 10.0, 1 << 30
COUNTS = {"record": 10_000, "checkpoint": 3_000, "command": 1_000, "yaml": 500, "folder": 300, "engine": 200}
"""Cases of each kind in a whole run."""

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e308, float("nan"), float("inf"), "",
    "x", "nan", "\ud800", "\x1b[2J", "\ufffe", "é" * 300, "x" * 5000, [], [[]], [None], {}, {"a": {}}, [0] * 1000,
    "../../etc/passwd", "fp16", "Qwen3ForCausalLM", [1, "x", None],
]  # fmt: skip
PROBE = ["--dtype", "fp16", "--prompt", "hello", "--no-explain", "--fail-on", "never"]
FORMATS = ("table", "markdown", "json", "junit", "github", "html", "svg", "repro", "screen")


def changed(value: Any, dice: random.Random) -> Any:
    """The same JSON with one value in it, at any depth, replaced, removed, or put there twice."""
    if isinstance(value, dict) and value and dice.random() < 0.9:
        key = dice.choice(list(value))
        if dice.random() < 0.05:
            return {name: each for name, each in value.items() if name != key}
        if dice.random() < 0.03:
            return {**value, dice.choice(["x", "", "\ud800", key + "x"]): value[key]}
        return {**value, key: changed(value[key], dice)}
    if isinstance(value, list) and value and dice.random() < 0.9:
        place = dice.randrange(len(value))
        return [
            *value[:place],
            *([changed(value[place], dice)] * dice.choice([1, 1, 1, 0, 2, 50])),
            *value[place + 1 :],
        ]
    return dice.choice(VALUES)


def several(value: Any, dice: random.Random) -> Any:
    """Changed once, or a few times."""
    for _ in range(dice.choice([1, 1, 1, 2, 5])):
        value = changed(value, dice)
    return value


def torn(data: bytes, dice: random.Random) -> bytes:
    """Bytes cut, doubled, or with some of them overwritten."""
    place = dice.randrange(len(data) + 1)
    return dice.choice(
        [data[:place], data[:place] + dice.randbytes(dice.choice([1, 8, 64])) + data[place + 8 :], data + data[:place]]
    )


def records(folder: Path, dice: random.Random) -> list[str]:
    """A broken record, shown in one of the formats."""
    raw = dice.choice(sorted(FIXTURES.glob("*.json"))).read_bytes()
    text = torn(raw, dice) if dice.random() < 0.1 else json.dumps(several(json.loads(raw), dice)).encode()
    (folder / "case.json").write_bytes(text)
    return ["report", "case.json", "--format", dice.choice(FORMATS)]


def checkpoints(folder: Path, dice: random.Random) -> list[str]:
    """A checkpoint of which one small file, or the header of the weights, is broken."""
    model = folder / "model"
    shutil.copytree(DEMO, model)
    name = dice.choice(
        ["config.json"] * 2 + ["tokenizer_config.json", "tokenizer.json", "generation_config.json", "header", "index"]
    )
    path = model / name
    if name == "header":
        _header(model / "model.safetensors", dice)
    elif name == "index":
        (model / "model.safetensors").rename(model / "a.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(["model.norm.weight", "lm_head.weight"], "a.safetensors")}
        (model / "model.safetensors.index.json").write_text(json.dumps(several(index, dice)))
    elif name == "tokenizer.json" and dice.random() < 0.5:
        path.write_text(json.dumps({**json.loads(path.read_text()), **_steps(dice)}))
    elif dice.random() < 0.1:
        path.write_bytes(torn(path.read_bytes(), dice))
    else:
        path.write_text(json.dumps(several(json.loads(path.read_text()), dice)))
    if name == "generation_config.json" or dice.random() < 0.3:
        return ["generate", "model", "--max-new-tokens", "2", "--fail-on", "never"]
    return ["probe", "model", *PROBE, "--memory", dice.choice(["streamed", "resident"])]


STEPS: list[tuple[str, str, dict[str, Any]]] = [
    ("normalizer", "normalizers", {"type": "Replace", "pattern": {"String": "l"}, "content": "ll"}),
    ("normalizer", "normalizers", {"type": "Replace", "pattern": {"Regex": "(?=l)"}, "content": "l"}),
    ("normalizer", "normalizers", {"type": "Prepend", "prepend": "hello"}),
    ("normalizer", "normalizers", {"type": "NFKD"}),
    ("decoder", "decoders", {"type": "Replace", "pattern": {"String": "l"}, "content": "ll"}),
    ("pre_tokenizer", "pretokenizers", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}),
    (
        "pre_tokenizer",
        "pretokenizers",
        {"type": "Split", "pattern": {"Regex": "(l+l+)+[qz]"}, "behavior": "Isolated", "invert": False},
    ),
]


def _steps(dice: random.Random) -> dict[str, Any]:
    """A step of a tokenizer, many times over."""
    key, name, step = dice.choice(STEPS)
    return {key: {"type": "Sequence", name: [step] * dice.choice([1, 2, 12, 40, 70])}}


def _header(path: Path, dice: random.Random) -> None:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    if dice.random() < 0.2:
        path.write_bytes(torn(raw[: 8 + length], dice) + raw[8 + length :])
        return
    text = json.dumps(several(json.loads(raw[8 : 8 + length]), dice)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


WORDS = [
    "probe", "generate", "report", "demo", "--dtype", "fp16", "bf16,fp32", "--prompt", "hello", "", "-", "--prompts",
    "/dev/zero", "--memory", "streamed", "--config", "ci", "nothing.yaml", "-o", "x.html", "x.json", "x.nothing",
    "/dev/full", "/nowhere/x.json", "--format", "junit", "--full", "-q", "--fail-on", "risk", "--max-tokens", "-1",
    "0", "999999999999", "--guards", "off", "--on-failure", "rescale", "--sweep", "length", "--budget", "nan",
    "--help", "--version", "\x1b[2J", "é" * 200, "y" * 5000, "--no-such", "--device", "cuda:99", "--revision",
    "--rescue-to", ".", "--explain-cause", "--", "--text", "--dry-run",
]  # fmt: skip


def commands(folder: Path, dice: random.Random) -> list[str]:
    """Words of the command line in any order."""
    first = dice.choice([["probe", "demo"], ["generate", "demo", "--max-new-tokens", "2"], ["report", "case.json"], []])
    shutil.copyfile(FIXTURES / "demo-probe.json", folder / "case.json")
    words = dice.choices(WORDS, k=dice.randrange(6))
    # Controls and sweeps are sound and slow; what is tried here is what the words make of each other.
    return [*first, *words, *(["--prompt", "hi", "--dtype", "fp16", "--no-explain"] if first[:1] == ["probe"] else [])]


SCRAPS = [
    "a: &a [*a]", "<<: {a: 1}", "!!timestamp x", "!!binary x", "? [a]\n: b", "- text: hi\n- chat: hi",
    "dtypes: [fp16]", "budget: 1e999", "clamp: false", "watch: {flat: .nan}", "recover: {ladder: [fp32, fp32]}",
    "- hello", "- {name: a, batch: [a, b]}", '"\\ud800": 1', "\t", "[" * 3000, "%TAG ! x", "--- a\n--- b",
    "memory: streamed", "near_overflow: .inf", "- {rows: []}", "!!set {a}",
]  # fmt: skip


def yamls(folder: Path, dice: random.Random) -> list[str]:
    """A profile, guards or prompts that are YAML or nearly."""
    text = "\n".join(dice.choices(SCRAPS, k=dice.randrange(1, 4)))
    raw = torn(text.encode("utf-8"), dice) if dice.random() < 0.3 else text.encode("utf-8")
    (folder / "case.yaml").write_bytes(raw)
    return dice.choice(
        [
            ["probe", "demo", *PROBE, "--config", "case.yaml"],
            ["probe", "demo", "--prompts", "case.yaml", "--dtype", "fp16", "--no-explain", "--fail-on", "never"],
            ["generate", "demo", "--max-new-tokens", "2", "--guards", "case.yaml", "--fail-on", "never"],
        ]
    )


@cache
def _a_folder_of_records() -> Any:
    """A folder that the program wrote, to be copied; it lives as long as this process."""
    place = tempfile.TemporaryDirectory()
    folder = Path(place.name)
    (folder / "texts.txt").write_text("hello\nfoo\nbar\n")
    asked = ["probe", "demo", "--dtype", "fp16", "--no-explain", "--fail-on", "never", "--prompts", "texts.txt"]
    assert run([*asked, "--block", "2", "-o", "runs/"], folder) is None
    return place


def folders(folder: Path, dice: random.Random) -> list[str]:
    """A folder of records of which a plan, a summary or a record is broken, or holds a list of millions."""
    shutil.copytree(Path(_a_folder_of_records().name) / "runs", folder / "runs")
    path = dice.choice([each for each in sorted((folder / "runs").iterdir()) if each.suffix in (".json", ".summary")])
    data = json.loads(path.read_text())
    if dice.random() < 0.1:
        path.write_bytes(torn(path.read_bytes(), dice))
    elif dice.random() < 0.1:
        key = dice.choice(list(data))
        wide = "[" + ",".join([dice.choice(["{}", "[]", "1", '"x"'])] * dice.choice([100_000, 5_000_000])) + "]"
        path.write_text(json.dumps({**data, key: "WIDE"}).replace('"WIDE"', wide))
    else:
        path.write_text(json.dumps(several(data, dice)))
    return ["report", "runs", "--format", dice.choice(FORMATS), "--fail-on", "never"]


PATTERNS = [
    "[]", "['*']", "['!*']", "['*.down_proj', '!*.0.*']", "['*a*a*a*a*a*a*a*a*a*a*Q']", "['(.*.*.*.*.*.*)*Q$']",
    "['a{99999999999999999999}']", "[" + "'*'," * 500 + "]", "'" + "(" * 20_000 + "'", "null", "[[['*']]]", "['[!a]']",
]  # fmt: skip


def engines(folder: Path, dice: random.Random) -> list[str]:
    """A file of an engine, broken in its paths of modules, in another value, or torn."""
    rule = f"{{values: [outputs], because: x, source: 'https://x', version: '1', modules: {dice.choice(PATTERNS)}}}"
    text = f"runs: x\nrules: [{', '.join([rule] * dice.choice([1, 1, 2, 150]))}]\n"
    raw = torn(text.encode(), dice) if dice.random() < 0.3 else text.encode()
    (folder / "case.yaml").write_bytes(raw)
    shutil.copyfile(FIXTURES / "demo-probe.json", folder / "case.json")
    return ["report", "case.json", "--engine", "case.yaml", "--fail-on", "never"]


KINDS: dict[str, Callable[[Path, random.Random], list[str]]] = {
    "record": records, "checkpoint": checkpoints, "command": commands, "yaml": yamls, "folder": folders,
    "engine": engines,
}  # fmt: skip


def run(args: list[str], folder: Path) -> str | None:
    """Run the program in a child of this process; gives what it did wrong, or None."""
    number = os.fork()
    if number == 0:
        child(args, folder)
    end = time.monotonic() + 6 * SECONDS  # of the clock: a machine may have other things to do
    while time.monotonic() < end:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            return _wrong(args, os.waitstatus_to_exitcode(status), folder)
        time.sleep(0.005)
    os.kill(number, 9)
    os.waitpid(number, 0)
    return "hangs"


def child(args: list[str], folder: Path) -> None:
    """In a fork: run the program with limits, in a folder, and end with its exit code."""
    code = 99
    try:
        os.chdir(folder)
        for number, name in ((0, os.devnull), (1, "out.txt"), (2, "err.txt")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        now = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_CPU, (int(SECONDS), int(SECONDS)))
        resource.setrlimit(resource.RLIMIT_DATA, (now + MEMORY, now + MEMORY))
        tempfile.tempdir = str(folder)
        from qwen_precision.cli import main

        code = main(args)
        sys.stdout.flush()
    except KeyboardInterrupt:  # before the program's own handlers were there: as `qprec` does
        code = 3
    finally:
        os._exit(code)


OUT_OF_MEMORY = ("out of memory", "MemoryError", "allocate", "OutOfMemory")
"""In what is said where there was none left: no file here is larger than a few MB."""


def _wrong(args: list[str], code: int, folder: Path) -> str | None:
    err = (folder / "err.txt").read_text(encoding="utf-8", errors="replace")
    out = (folder / "out.txt").read_text(encoding="utf-8", errors="replace")
    if code == -signal.SIGXCPU:
        return f"takes longer than {SECONDS:g} seconds"
    if code not in (0, 1, 2, 3):
        return f"exit code {code}"
    if "Traceback" in err or "bug in qprec" in err:
        return "a bug: " + next((each for each in err.splitlines() if "bug in qprec" in each), "a traceback")
    if code == 3 and any(each in err for each in OUT_OF_MEMORY):
        return "uses up the memory: " + err.strip().splitlines()[-1]
    if code in (2, 3) and not out and not err:
        return f"exit code {code} without a word"
    name = args[args.index("--format") + 1] if args[:1] == ["report"] and args[:-1].count("--format") == 1 else ""
    try:
        if out and code < 2 and name in ("junit", "svg"):
            ElementTree.fromstring(out)
        elif out and code < 2 and name == "json":
            json.loads(out)
    except (ValueError, ElementTree.ParseError) as error:
        return f"{name} that does not parse: {error}"
    return None


def cases(share: float, seed: int, kinds: Sequence[str] = ()) -> Iterator[tuple[str, int]]:
    """Kind and number of every case; of all kinds where none is named."""
    for kind, count in COUNTS.items():
        if kinds and kind not in kinds:
            continue
        yield from ((kind, seed * 1_000_000 + number) for number in range(max(1, round(count * share))))


def warm() -> None:
    """Import once, in the parent, all that each case would import for seconds."""
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    import matplotlib.backends.backend_agg
    import matplotlib.backends.backend_svg
    import matplotlib.figure
    import torch
    import transformers.models.qwen3.modeling_qwen3

    import qwen_precision.diagnose
    import qwen_precision.generate

    assert qwen_precision.diagnose and qwen_precision.generate and transformers.models and matplotlib.figure
    torch.set_num_threads(1)


def fuzz(share: float, seed: int, keep: Path | None = None, kinds: Sequence[str] = ()) -> list[str]:
    """Run all cases; gives a line for each that broke."""
    warm()
    counts: Counter[str] = Counter()
    broken = []
    for kind, number in cases(share, seed, kinds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            args = KINDS[kind](folder, random.Random(f"{kind} {number}"))
            wrong = run(args, folder)
            counts[kind] += 1
            if wrong is not None:
                broken.append(f"{kind} {number}: {args!r:.200}: {wrong}")
                if keep is not None:
                    shutil.copytree(folder, keep / f"{kind}-{number}", dirs_exist_ok=True)
    print(
        ", ".join(f"{count:,} {kind}" for kind, count in counts.items()), f"seed {seed}, {len(broken)} broken", sep="; "
    )
    return broken


def main() -> int:
    """Exit code 1 if anything broke."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of a whole run")
    parser.add_argument("--keep", type=Path, help="folder for what breaks")
    parser.add_argument("--kind", action="append", choices=list(COUNTS), help="only these; repeatable")
    asked = parser.parse_args()
    broken = fuzz(asked.share, asked.seed, asked.keep, asked.kind or ())
    print("\n".join(broken))
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
