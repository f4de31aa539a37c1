"""SIGKILL, SIGTERM and SIGINT at random moments of every command: old files stay whole, the next run leaves no litter.

    python scripts/kill.py [--seed N] [--count 1000] [--ranks 50]

Each case is a fork of this process that is killed after a random share of the time the command takes, or (one of so
many) a process of its own, whose imports and end are met too. Then: what stood there before is whole or replaced whole;
the exit code of a signal that can be caught is 0 to 3; the same command again ends as it would have, with nothing
hidden beside its output; a folder that is no finished export does not load.

Of two ranks that measure into one folder, one is killed (SIGKILL): what they had measured is whole and is not measured
again, and once both commands were given again the merged report is that of two ranks that nobody killed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import cache
from pathlib import Path

import fuzz

from qwen_precision.__main__ import listen
from qwen_precision.render import FORMATS
from qwen_precision.report import view

COMMANDS: dict[str, list[str]] = {
    "probe": ["probe", "demo", *fuzz.PROBE, "-o", "run.json"],
    "rescue": ["probe", "demo", *fuzz.PROBE, "-o", "run.json", "--rescue-to", "safe", "--force"],
    "generate": ["generate", "demo", "--max-new-tokens", "8", "--fail-on", "never", "-o", "run.json"],
    "sweep": ["probe", "demo", *fuzz.PROBE, "-o", "run.json", "--sweep", "first-token", "--sweep-limit", "40"],
    **{
        suffix: ["report", "demo.json", "--fail-on", "never", "--force", "-o", f"out{suffix}"]
        for suffix in (".txt", ".md", ".html", ".json", ".xml", ".svg", ".png", ".py", ".zip")
    },
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
FRESH = 8
"""One of so many cases is no fork, but the program as a shell starts it."""


def begun(args: list[str], folder: Path) -> int:
    """The program in a process of its own, from the moment on in which it listens: before, no signal is Python's."""
    words = [sys.executable, "-m", "qwen_precision", *args]
    program = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    quiet = subprocess.DEVNULL
    child = subprocess.Popen(words, cwd=folder, env=program, stdin=quiet, stdout=quiet, stderr=quiet).pid
    while not _listens(child):
        time.sleep(0.002)
    return child


def _listens(child: int) -> bool:
    """Whether SIGTERM has a handler there, or nobody is there any more."""
    told = dict(line.split(":", 1) for line in Path(f"/proc/{child}/status").read_text().splitlines())
    return told["State"].split()[0] == "Z" or bool(int(told["SigCgt"], 16) >> (signal.SIGTERM - 1) & 1)


def started(args: list[str], folder: Path) -> int:
    """The child that runs a command."""
    child = os.fork()
    if child == 0:
        fuzz.child(args, folder)
    return child


def ended(child: int) -> int:
    """Its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wrong_files(folder: Path) -> str | None:
    """What of the files is not whole."""
    for path in folder.glob("run.json"):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            return f"{path.name} is not whole: {error}"
    for made in folder.glob(".qprec-partial-*"):
        if (made / "config.json").exists() and not (made / "model.safetensors").exists():
            return f"{made.name} looks like a model and is none"
    return None


def case(name: str, number: int, after: float, folder: Path, code: int, fresh: bool) -> str | None:
    """Kill a command after so many seconds, then run it again; gives what went wrong."""
    args = COMMANDS[name]
    shutil.copyfile(fuzz.FIXTURES / "demo-probe.json", folder / "demo.json")
    child = (begun if fresh else started)(args, folder)
    time.sleep(after)
    os.kill(child, number)
    first = ended(child)
    if first not in (0, 1, 2, 3) and not number == -first == signal.SIGKILL:
        return f"exit code {first}"
    wrong = wrong_files(folder)
    if wrong is not None:
        return wrong
    again = ended(started(args, folder))
    if again != code:
        return f"exit code {again} the second time, {code} expected"
    litter = [each for each in os.listdir(folder) if each.startswith(".qprec") or each.endswith(".sweep")]
    return f"left behind: {litter}" if litter else wrong_files(folder)


PROMPTS = ["The capital of France is", "Hello", "def f(x):", "1, 2, 3, 4", "import os", "上海"]
RANKS = ["probe", "demo", "--dtype", "fp16", "--no-explain", "--prompts", "corpus.txt", "--block", "1", "-o", "runs/"]


def merged(folder: Path) -> object:
    """The report of a folder's records, without the times at which it was made."""
    shown = FORMATS["json"].render(view([folder / "runs"], "never", None, False, []))
    found = json.loads(str(shown).replace(str(folder), ""))
    for each in [found, *found["reports"]]:
        (each.get("logits") or {}).get("cost", {}).pop("seconds", None)
    return json.dumps(found, sort_keys=True)


def ranks(after: float | None, victim: int, folder: Path) -> tuple[dict[str, bytes], list[int]]:
    """Two ranks into one folder, of which one is killed after so many seconds; gives the records, and exit codes."""
    (folder / "corpus.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    children = [started([*RANKS, "--shard", f"{number}/2"], folder) for number in (1, 2)]
    if after is not None:
        time.sleep(after)
        os.kill(children[victim], signal.SIGKILL)
    codes = [ended(child) for child in children]
    places = sorted((folder / "runs").glob("*.json")) if (folder / "runs").is_dir() else []
    return {path.name: path.read_bytes() for path in places if not path.name.startswith("plan-")}, codes


def rank_case(after: float, victim: int, folder: Path, whole: object) -> str | None:
    """Kill a rank, then give both commands again; gives what went wrong."""
    there, codes = ranks(after, victim, folder)
    if codes[1 - victim] != 0:
        return f"the other rank ended with {codes[1 - victim]}"
    for name, data in there.items():
        try:
            json.loads(data)
        except ValueError:
            return f"{name} is not whole"
    now, codes = ranks(None, victim, folder)
    if codes != [0, 0]:
        return f"exit codes {codes} the second time"
    again = [name for name, data in there.items() if now.get(name) != data]
    if again:
        return f"measured again: {again}"
    litter = [name for name in os.listdir(folder / "runs") if name.startswith(".qprec-partial")]
    if litter:
        return f"left behind: {litter}"
    return None if merged(folder) == whole else "another merged report"


def killed_ranks(count: int, dice: random.Random) -> list[str]:
    """So many cases; gives what went wrong in each."""
    with tempfile.TemporaryDirectory() as made:
        begin = time.monotonic()
        ranks(None, 0, Path(made))
        takes, whole = time.monotonic() - begin, merged(Path(made))
    wrong = []
    for _ in range(count):
        after, victim = dice.random() * takes * 1.1, dice.randrange(2)
        with tempfile.TemporaryDirectory() as made:
            told = rank_case(after, victim, Path(made), whole)
        if told is not None:
            wrong.append(f"rank {victim}, SIGKILL after {after:.2f} s of {takes:.2f}: {told}")
    return wrong


@cache
def measured(name: str, fresh: bool) -> tuple[float, int]:
    """Seconds and exit code of a command that nobody kills."""
    with tempfile.TemporaryDirectory() as made:
        shutil.copyfile(fuzz.FIXTURES / "demo-probe.json", Path(made) / "demo.json")
        begin = time.monotonic()
        code = ended((begun if fresh else started)(COMMANDS[name], Path(made)))
        return time.monotonic() - begin, code


def main() -> int:
    """Exit code 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=50)
    asked = parser.parse_args()
    fuzz.warm()
    listen()  # a fork is met by a signal before it is the program, too
    dice = random.Random(asked.seed)
    counts: Counter[str] = Counter()
    wrong = []
    for index in range(asked.count):
        name = list(COMMANDS)[index % len(COMMANDS)]
        fresh = index % FRESH == 0
        seconds, code = measured(name, fresh)
        number, after = dice.choice(SIGNALS), dice.random() * seconds * 1.1
        with tempfile.TemporaryDirectory() as made:
            told = case(name, number, after, Path(made), code, fresh)
        counts[f"{number.name} in a new process" if fresh else number.name] += 1
        if told is not None:
            wrong.append(f"{name}, {number.name} after {after:.2f} s{' of a new process' * fresh}: {told}")
    wrong += killed_ranks(asked.ranks, dice)
    counts["ranks killed"] += asked.ranks
    print(", ".join(f"{count:,} {name}" for name, count in counts.items()), f"seed {asked.seed}; {len(wrong)} wrong")
    print("\n".join(wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
