"""A search for what triggers an overflow: every token as the first one, or texts.

They go through the whole model in fp32, thousands of tokens at once, every operation watched from the embedding to the
logits. Whatever comes within a factor of the dtype's largest number is then run in the dtype itself, which decides; so
is everything, where the dtype cannot hold a weight. The worst few of the rest are run in it too, each by itself.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qwen_precision.diagnose.again import outcomes, run_again
from qwen_precision.diagnose.walk import Walker, walker
from qwen_precision.dtypes import DTYPES
from qwen_precision.errors import QprecError
from qwen_precision.files import Unreadable, read_small, write_atomically
from qwen_precision.probe import Job
from qwen_precision.progress import Progress
from qwen_precision.record import WORST, Sweep, Swept, in_words, rounded, worst_first
from qwen_precision.settings import as_text, first_ids

AT_ONCE = 2048
"""Tokens that go through a layer together."""
_CONFIRMED = 8
"""Of those, run in the dtype itself, each by itself, where they were not yet."""
_NEAR = 2.0
"""What is within this of the dtype's largest number in fp32 is run in the dtype: it rounds, so it may go further."""
_MOST_STATE = 1 << 20  # bytes of an unfinished sweep's file: it holds the worst few


@dataclass
class _State:
    """What a sweep has found so far; kept beside the output, so that it can be taken up again."""

    key: str
    done: int = 0
    layers: int = 0
    over: int = 0
    worst: list[Swept] = field(default_factory=list)
    seconds: float = 0.0


def first_tokens(
    job: Job,
    dtype: str,
    limit: int | None,
    texts: Sequence[str],
    state_file: Path | None,
    progress: Progress,
    announce: Callable[[str], None],
    part: tuple[int, int] = (0, 1),
) -> Sweep:
    """Every id of the vocabulary (or ``limit`` of them, evenly spread) as the first token; or these texts.

    ``part`` is which of how many equal parts of them is tried here.

    Raises:
        KeyboardInterrupt: it was interrupted; what was done is in ``state_file`` and is taken up by the same call.
    """
    everything = _rows(job, limit, texts)
    begin, end = (len(everything) * (part[0] + more) // part[1] for more in (0, 1))
    rows = everything[begin:end]
    walk = walker(job, dtype)
    state = _taken_up(state_file, _key(job, dtype, rows), announce)
    state.layers = walk.depth
    started, before = time.perf_counter(), state.seconds
    chunks = [list(range(at, min(at + AT_ONCE, len(rows)))) for at in range(state.done, len(rows), AT_ONCE)]
    for numbers in chunks:
        progress(numbers[0], len(rows), f"sweeping first tokens: {numbers[0]:,} of {len(rows):,}")
        _chunk(walk, job, dtype, [rows[n] for n in numbers], state)
        state.done = numbers[-1] + 1
        state.seconds = before + time.perf_counter() - started
        if numbers[0] == 0 and len(rows) > AT_ONCE:
            left = state.seconds / len(numbers) * (len(rows) - state.done)
            announce(f"sweeping {len(rows):,} first tokens through the whole model: about {left:.0f} s more")
        if state_file is not None:
            write_atomically(state_file, json.dumps(in_words(_plain(state))))
    worst = _confirmed(job, dtype, state, progress)
    if state_file is not None:
        state_file.unlink(missing_ok=True)
    return Sweep(
        kind="first-token",
        dtype=dtype,
        tried=state.done,
        total=len(everything),
        layers=state.layers,
        over=state.over,
        worst=worst,
        prompt=None,
        shortest_failing=None,
        longest_clean=None,
        seconds=round(state.seconds, 3),
    )


def _rows(job: Job, limit: int | None, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of everything that is tried, shortest first so that equal lengths go together."""
    if texts:
        cut = min(filter(None, (job.settings.max_tokens, job.checkpoint.context)), default=None)
        rows = [first_ids(text, job.checkpoint.tokenizer, True, cut)[:cut] for text in texts]
        return sorted((row for row in rows if row), key=len)
    vocabulary = int(job.checkpoint.text_config.vocab_size)
    count = vocabulary if limit is None else min(limit, vocabulary)
    return [[number * vocabulary // count] for number in range(count)]


def _key(job: Job, dtype: str, rows: list[list[int]]) -> str:
    """What must be the same for a sweep to be taken up again."""
    files = [(name, info.file, info.start, info.size) for name, info in job.checkpoint.tensors.items()]
    stamps = [(file, (job.checkpoint.folder / file).stat().st_mtime_ns) for file in sorted({each[1] for each in files})]
    told = repr(
        (
            "all operations",
            files,
            stamps,
            dtype,
            job.settings.attention,
            job.settings.arithmetic,
            len(rows),
            hashlib.sha256(repr(rows).encode()).digest(),
        )
    )
    return hashlib.sha256(told.encode()).hexdigest()


def held_state(path: Path | None) -> _State | None:
    """The state of an unfinished sweep, if there is one.

    Raises:
        QprecError: the file is there and is not a sweep's state: it is not written over.
    """
    if path is None:
        return None
    try:
        data = json.loads(read_small(path, _MOST_STATE))
        worst = [Swept.model_validate(each) for each in data["worst"]]
        return _State(
            data["key"], int(data["done"]), int(data["layers"]), int(data["over"]), worst, float(data["seconds"])
        )
    except FileNotFoundError:
        return None
    except (Unreadable, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise QprecError(f"{path}: is not the state of a sweep, which would be kept there; remove it.") from error


def _taken_up(path: Path | None, key: str, announce: Callable[[str], None]) -> _State:
    """The state of an earlier sweep of the same, or a new one."""
    state = held_state(path)
    if state is None or state.key != key:
        return _State(key)  # of another checkpoint, or another sweep
    announce(f"taking up the sweep in {path}: {state.done:,} are done")
    return state


def _plain(state: _State) -> dict[str, Any]:
    return {**vars(state), "worst": [each.model_dump() for each in state.worst]}


def _chunk(walk: Walker, job: Job, dtype: str, rows: list[list[int]], state: _State) -> None:
    """Some of them: run them by lengths, count what fails in the dtype, keep the worst."""
    lots: dict[int, list[list[int]]] = {}
    for row in rows:
        lots.setdefault(len(row), []).append(row)
    for length, equal in lots.items():
        size = max(1, AT_ONCE // length)
        for start in range(0, len(equal), size):
            _lot(walk, job, dtype, equal[start : start + size], state)
    state.worst = sorted(state.worst, key=worst_first)[:WORST]


def _lot(walk: Walker, job: Job, dtype: str, rows: list[list[int]], state: _State) -> None:
    """Sequences of one length."""
    found = walk.peaks(torch.tensor(rows))
    near = found.value * _NEAR > DTYPES[dtype].max
    if any(weight.overflow.get(dtype) for weight in job.check.weights()):
        near = torch.ones_like(near)  # an infinite weight makes an infinity of whatever it is multiplied with
    fails: dict[int, bool] = {}
    tried = [int(place) for place in near.nonzero()]
    if tried:
        outcome = torch.isinf(walk.peaks(torch.tensor([rows[place] for place in tried]), dtype).value)
        fails = dict(zip(tried, outcome.tolist(), strict=True))
    state.over += sum(fails.values())
    ranked = sorted(range(len(rows)), key=lambda place: (not fails.get(place), -float(found.value[place])))
    for place in ranked[:WORST]:
        state.worst.append(
            Swept(
                ids=rows[place],
                text=_text(job, rows[place]),
                magnitude=rounded(float(found.value[place])),
                layer=found.layer[place],
                name=found.name[place],
                channel=int(found.channel[place]),
                fails=fails.get(place),
            )
        )


def _text(job: Job, ids: list[int]) -> str:
    tokenizer = job.checkpoint.tokenizer
    return as_text(ids[0], tokenizer) if len(ids) == 1 else str(tokenizer.decode(ids))[:200]


def _confirmed(job: Job, dtype: str, state: _State, progress: Progress) -> list[Swept]:
    """The worst few that were not near enough to be run in the dtype, run in it after all."""
    asked = [place for place, each in enumerate(state.worst[:_CONFIRMED]) if each.fails is None]
    clean = outcomes(run_again(job, dtype, [state.worst[place].ids for place in asked], progress)) if asked else {}
    worst = list(state.worst)
    for number, place in enumerate(asked):
        if number in clean:
            worst[place] = worst[place].model_copy(update={"fails": not clean[number]})
            state.over += not clean[number]
    return sorted(worst, key=worst_first)
