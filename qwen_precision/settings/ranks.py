"""Whose share of a list of work this process takes: by ``--shard``, or by the variables that a launcher sets.

Nothing is asked of anybody: the same variables always give the same share. What is set together multiplies, from the
outside in: ``--shard 2/8`` on one machine under a launcher of 4 ranks is 4 of 32 shares.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from qwen_precision.errors import UsageError

_RULE = "--shard, then a Slurm array, then RANK and WORLD_SIZE or, without these, SLURM_PROCID and SLURM_NTASKS"


@dataclass(frozen=True)
class Rank:
    """One of several processes that share a list."""

    number: int = 0
    """From 0."""
    of: int = 1
    local: int | None = None
    """Of those on its machine; it picks the card."""
    told_by: tuple[str, ...] = ()
    """Where the numbers are from, outermost first."""
    launched: bool = False
    """Whether torchrun (or accelerate) runs it, which ends all ranks as soon as one ends with anything but 0."""

    @property
    def said(self) -> str:
        """In words."""
        return f"share {self.number + 1} of {self.of} ({', then '.join(self.told_by)})" if self.told_by else "all of it"


def rank_of(shard: str | None, environment: Mapping[str, str]) -> Rank:
    """The rank of this process.

    Args:
        shard: of ``--shard``, like ``2/8``, counted from 1.
        environment: the variables.

    Raises:
        UsageError: numbers that cannot be a rank; the option or variable is named.
    """
    sources = [_shard(shard), _array(environment), _launched(environment) or _step(environment)]
    number, of, told = 0, 1, []
    for each in sources:
        if each is not None:
            mine, size, by = each
            number, of = number * size + mine, of * size
            told.append(by)
    local = next((environment[name] for name in ("LOCAL_RANK", "SLURM_LOCALID") if environment.get(name)), None)
    return Rank(
        number,
        of,
        _number("LOCAL_RANK or SLURM_LOCALID", local) if local is not None else None,
        tuple(told),
        "TORCHELASTIC_RUN_ID" in environment,
    )


_Source = tuple[int, int, str] | None
"""Number from 0, how many, and how it was told."""


def _shard(asked: str | None) -> _Source:
    if asked is None:
        return None
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", asked)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(f"--shard {asked}: expected I/N, I from 1 to N, like 2/8.")
    return int(found[1]) - 1, int(found[2]), f"--shard {asked}"


def _array(environment: Mapping[str, str]) -> _Source:
    """A Slurm array; its ids need not begin at 0, and may have gaps of one width."""
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")
    if not environment.get(names[0]):
        return None
    if not environment.get(names[1]):
        raise UsageError(f"{names[0]} is set and {names[1]} is not: set both, or give --shard I/N.")
    task, count = (_number(name, environment[name]) for name in names)
    first = _number("SLURM_ARRAY_TASK_MIN", environment.get("SLURM_ARRAY_TASK_MIN") or "0")
    step = _number("SLURM_ARRAY_TASK_STEP", environment.get("SLURM_ARRAY_TASK_STEP") or "1")
    place, rest = divmod(task - first, max(1, step))
    if rest or not 0 <= place < count:
        raise UsageError(
            f"SLURM_ARRAY_TASK_ID {task}: is none of {count} ids from {first} in steps of {step}; use an array without "
            f"gaps, like --array=0-{max(count, 1) - 1}, or give --shard I/N."
        )
    return place, count, f"Slurm array task {task} of {count}"


def _launched(environment: Mapping[str, str]) -> _Source:
    return _pair(environment, "RANK", "WORLD_SIZE", "RANK")


def _step(environment: Mapping[str, str]) -> _Source:
    """A task of `srun`. The script of a job itself has the variables too, and is no task of it."""
    if environment.get("SLURM_JOB_ID") and not environment.get("SLURM_STEP_ID"):
        return None
    size = "SLURM_STEP_NUM_TASKS" if environment.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"  # of the step, always
    return _pair(environment, "SLURM_PROCID", size, "Slurm task")


def _pair(environment: Mapping[str, str], mine: str, size: str, word: str) -> _Source:
    if not environment.get(mine) and (word != "RANK" or not environment.get(size)):
        return None  # SLURM_NTASKS alone is a job's, not a task's
    if not environment.get(mine) or not environment.get(size):
        one, other = (mine, size) if environment.get(mine) else (size, mine)
        raise UsageError(f"{one} is set and {other} is not: set both, or neither.")
    number, of = (_number(name, environment[name]) for name in (mine, size))
    if number >= of:
        raise UsageError(f"{mine} {number} and {size} {of}: a rank is below the number of ranks; {_RULE} are read.")
    return number, of, f"{word} {number} of {of}"


def _number(name: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text):
        raise UsageError(f"{name}: {text[:40]!r} is no number; {_RULE} are read.")
    return int(text)
