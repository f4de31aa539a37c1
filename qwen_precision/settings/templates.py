"""A chat template is a program from a stranger: it runs in a child of this process, with a limit to time and memory.

transformers' sandbox keeps it from files and from Python's insides, and from nothing else: two loops never end, one
product of a string takes all memory, one power of two numbers cannot be interrupted.
"""

import json
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from qwen_precision.errors import QprecError, in_one_line

SECONDS = 5.0
"""That a template may take; real ones take some milliseconds."""
_TOO_LONG = f"takes longer than {SECONDS:g} seconds"
_endless: set[str] = set()
"""Templates that did: none is waited for twice."""
_MEMORY = 512 << 20  # bytes beyond what this process has
_OUTPUT = 16 << 20  # bytes that it may write
_PARALLEL = "TOKENIZERS_PARALLELISM"


class TemplateFault(QprecError):
    """Why a template gives no text, as a part of a sentence."""


def has_template(tokenizer: Any) -> bool:
    """Whether a chat turn can be given."""
    return bool(getattr(tokenizer, "chat_template", None))


def in_template(turns: list[dict[str, str]], tokenizer: Any, answer: bool) -> str:
    """Turns of a chat as the text that a model takes.

    Args:
        turns: each with ``role`` and ``content``.
        tokenizer: of the checkpoint, with its template.
        answer: whether it ends where the model's answer begins.

    Raises:
        TemplateFault: the template fails, or takes too much time, memory or text.
    """
    if not hasattr(os, "fork"):
        return _render(turns, tokenizer, answer)
    template = str(tokenizer.chat_template)
    if template in _endless:
        raise TemplateFault(_TOO_LONG)
    reading, writing = os.pipe()
    with _in_silence():
        child = os.fork()
    if child == 0:
        _answer(writing, turns, tokenizer, answer)
    os.close(writing)
    try:
        told = _told(reading)
    except TimeoutError as error:
        _endless.add(template)
        raise TemplateFault(_TOO_LONG) from error
    finally:
        os.close(reading)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if not told:
        raise TemplateFault(f"takes more than {_MEMORY >> 20} MiB of memory")
    text, why = json.loads(told)
    if why is not None:
        raise TemplateFault(why)
    return str(text)


@contextmanager
def _in_silence() -> Iterator[None]:
    """Around a fork, of which Python warns because of threads, and tokenizers before 0.23 unless this variable is set:
    the child starts no thread, takes no lock and tokenises nothing."""
    unset = _PARALLEL not in os.environ
    if unset:
        os.environ[_PARALLEL] = "false"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        if unset:
            os.environ.pop(_PARALLEL, None)


def _render(turns: list[dict[str, str]], tokenizer: Any, answer: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(turns, add_generation_prompt=answer, tokenize=False))
    except MemoryError as error:
        raise TemplateFault(f"takes more than {_MEMORY >> 20} MiB of memory") from error
    except Exception as error:  # jinja raises what it likes
        raise TemplateFault(f"fails ({in_one_line(error)})") from error


def _answer(writing: int, turns: list[dict[str, str]], tokenizer: Any, answer: bool) -> None:
    """In the child: render, write, end; nothing of the parent is flushed, closed or cleaned up a second time."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _limit_memory()
        try:
            told: tuple[str | None, str | None] = (_render(turns, tokenizer, answer), None)
        except TemplateFault as error:
            told = (None, str(error))
        with open(writing, "wb") as file:
            file.write(json.dumps(told).encode())
    finally:
        os._exit(0)


def _limit_memory() -> None:
    if sys.platform != "linux":
        return
    import resource

    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[5]) * resource.getpagesize()
    with suppress(ValueError, OSError):  # a lower limit is there already
        resource.setrlimit(resource.RLIMIT_DATA, (now + _MEMORY, now + _MEMORY))


def _told(reading: int) -> bytes:
    """All that the child writes."""
    end, size = time.monotonic() + SECONDS, 0
    parts: list[bytes] = []
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            raise TimeoutError
        part = os.read(reading, 1 << 20)
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
        if size > _OUTPUT:
            raise TemplateFault(f"gives more than {_OUTPUT >> 20} MiB of text")
