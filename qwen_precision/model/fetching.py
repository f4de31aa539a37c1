"""A checkpoint's files from a hub that may stall, lie or never end: a time limit on every answer, the hub's own listing
as the limit of every size, and no name asked for that a checkpoint does not need.
"""

import inspect
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from qwen_precision.errors import QprecError
from qwen_precision.model.index import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SMALL = (
    "config.json generation_config.json model.safetensors.index.json tokenizer.json tokenizer_config.json vocab.json "
    "vocab.txt merges.txt special_tokens_map.json added_tokens.json chat_template.jinja chat_template.json "
    "tokenizer.model tekken.json preprocessor_config.json processor_config.json adapter_config.json "
    "hf_quant_config.json quantize_config.json quant_config.json modules.json"
).split()
"""Files beside the weights that something reads."""

_HUB = "https://huggingface.co"
_ANSWER = 10.0  # seconds that the hub may be silent
_LISTING = 60.0  # seconds for the whole list
_MOST_FILES = 100_000
_MOST_LISTING = 64 << 20  # bytes: 100,000 files with hashes take half of it
_MOST_SMALL = 256 << 20  # bytes of a file beside the weights: Gemma's tokenizer.json, the largest known, has 33 MB
_SLOWEST = 10_000.0  # bytes a second of a file, over all of it: a hub may drip for ever and never be silent
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Listing:
    """What the hub says a checkpoint consists of."""

    commit: str
    sizes: dict[str, int]
    """Bytes by name, of files at the top; 0 where the hub gives none."""
    models: dict[str, int]
    """The same of GGUF files, in whatever folder."""


def host() -> str:
    """Of the hub, for messages."""
    return urlsplit(_endpoint() or _HUB).netloc


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def cached(source: str, revision: str | None) -> Path | None:
    """The folder in the local cache; None where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return None


def listing(source: str, revision: str | None) -> Listing:
    """Commit and files of a checkpoint; the library's own errors go through.

    Raises:
        QprecError: the hub takes too long, or what it lists cannot be.
    """
    key = (str(_endpoint()), source, revision)
    if _kept is not None and key in _kept:
        return _kept[key]
    late = f"{source}: {host()} takes longer than {_LISTING:g} seconds to list its files; try again later."
    try:
        found: Listing = _within(_LISTING, lambda: _listed(source, json.loads(_answer(source, revision))), late)
    except _NO_LISTING as error:
        raise QprecError(f"{host()} lists the files in a form that no hub has; check HF_ENDPOINT.") from error
    if _kept is not None:
        _kept[key] = found
    return found


_NO_LISTING = (TypeError, AttributeError, KeyError, RecursionError, json.JSONDecodeError, UnicodeDecodeError)
"""What another form raises: a list where an object should be."""


def _listed(source: str, told: Any) -> Listing:
    """What of the hub's answer is used, checked."""
    commit, siblings = told["sha"], told.get("siblings") or []
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise QprecError(f"{source}: {host()} names no commit (40 hexadecimal digits); check HF_ENDPOINT.")
    if len(siblings) > _MOST_FILES:
        raise QprecError(f"{source}: {host()} lists {len(siblings):,} files; that is no checkpoint.")
    names = {str(each["rfilename"]): each.get("size") for each in siblings}
    sizes = {name: size if isinstance(size, int) and size > 0 else 0 for name, size in names.items()}
    top = {name: size for name, size in sizes.items() if Path(name).name == name}
    return Listing(commit, top, {name: sizes[name] for name in sizes if _is_model(name)})


def _answer(source: str, revision: str | None) -> bytes:
    """The listing as the hub sends it, counted while it comes: ``HfApi.model_info`` reads whatever has no end.

    The library's session is asked, so that its token, proxies and errors are as for the files.
    """
    import huggingface_hub.utils as hub

    library: Any = hub  # what it exports differs from version to version; these it has had since 0.34
    library.validate_repo_id(source)
    at = f"/revision/{quote(revision, safe='')}" if revision else ""
    url = f"{_endpoint() or _HUB}/api/models/{source}{at}"
    session = library.get_session()
    asked: dict[str, Any] = {"headers": library.build_hf_headers(), "params": {"blobs": True}, "timeout": _ANSWER}
    if callable(session.stream):  # httpx; before huggingface_hub 1.0 it was requests
        with session.stream("GET", url, **asked) as response:
            body = _counted(source, response.iter_bytes())
        kept = {name: value for name, value in response.headers.items() if name.lower().startswith("x-")}
        whole = type(response)(response.status_code, headers=kept, content=body, request=response.request)
    else:
        with session.get(url, stream=True, **asked) as whole:
            body = _counted(source, whole.iter_content(1 << 16))
            whole._content = body  # what came is kept by hand where it was counted
    library.hf_raise_for_status(whole)
    return body


def _counted(source: str, pieces: Iterable[bytes]) -> bytes:
    body = bytearray()
    for piece in pieces:
        body += piece
        if len(body) > _MOST_LISTING:
            raise QprecError(f"{source}: {host()} lists its files in more than {_MOST_LISTING >> 20} MiB; refused.")
    return bytes(body)


_kept: dict[tuple[str, str, str | None], Listing] | None = None


@contextmanager
def asked_once() -> Iterator[None]:
    """While this is open, the hub is asked once for what it lists, however often that is looked at."""
    global _kept
    outer = _kept
    _kept = {} if outer is None else outer
    try:
        yield
    finally:
        _kept = outer


def _is_model(name: str) -> bool:
    """A GGUF file below the repository, and not beside it."""
    return name.endswith(".gguf") and not name.startswith("/") and ".." not in name.split("/")


def names(source: str, revision: str | None) -> list[str]:
    """Names of what a checkpoint can be made of; without a hub, of what is in the cache.

    Raises:
        QprecError: as ``listing`` does; the library's own errors go through.
    """
    found = _listing_or_cache(source, revision)
    if isinstance(found, Path):
        return [each.relative_to(found).as_posix() for each in found.rglob("*")]
    return [*found.sizes, *(name for name in found.models if name not in found.sizes)]


def _listing_or_cache(source: str, revision: str | None) -> Listing | Path:
    """The hub's listing; where nothing answers, the folder in the cache."""
    try:
        return listing(source, revision)
    except Exception as error:
        if not _unreachable(error):
            raise
        there = cached(source, revision)
        if there is None:
            raise _nobody(source, error) from error
        return there


def listing_from_hub(source: str, revision: str | None) -> Listing:
    """The hub's listing, where no cache can stand for it.

    Raises:
        QprecError: as ``listing`` does, or nothing answers; the library's own errors go through.
    """
    try:
        return listing(source, revision)
    except Exception as error:
        if not _unreachable(error):
            raise
        raise _nobody(source, error) from error


def _nobody(source: str, error: Exception) -> QprecError:
    return QprecError(
        f"{source}: is not in the local cache, and {host()} cannot be reached ({type(error).__name__}); check "
        "the network, or give a folder that holds the checkpoint."
    )


def fetched(source: str, revision: str | None, weights: bool = True) -> Path | None:
    """The folder of a checkpoint in the cache, with what it needs from the hub; without a hub, as it is in the cache.

    None where the hub lists no file of a checkpoint.

    Raises:
        QprecError: as ``listing`` does, or a file is longer than the listing says; the library's own errors go through.
    """
    found = _listing_or_cache(source, revision)
    if isinstance(found, Path):
        return found
    folder = None
    # The first by the name that was asked for: the cache then knows which commit that is, also without a network.
    asked = revision or "main"
    for name in (each for each in SMALL if each in found.sizes):
        folder, asked = _file(source, found, name, asked).parent, found.commit
    for name in _weights(folder, found) if weights else []:
        folder = _file(source, found, name, asked).parent
    return folder


def fetched_model(source: str, revision: str | None, parts: list[str]) -> Path | None:
    """The folder of the cache that a GGUF model's files stand below; None where the hub does not list them all.

    Raises:
        QprecError: as for ``fetched``.
    """
    found = _listing_or_cache(source, revision)
    if isinstance(found, Path):
        return found
    if not all(part in found.models for part in parts):
        return None
    asked, folder = revision or "main", None
    for part in parts:
        path, asked = _file(source, found, part, asked), found.commit
        folder = path.parents[part.count("/")]
    return folder


def _unreachable(error: BaseException) -> bool:
    """Whether nothing answered: offline, no network, a time limit."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if getattr(error, "response", None) is not None:
        return False
    client = type(error).__module__.split(".")[0] in {"httpx", "httpx2", "httpcore", "httpcore2", "requests"}
    return client or isinstance(error, (OfflineModeIsEnabled, ConnectionError, TimeoutError))


def _weights(folder: Path | None, found: Listing) -> list[str]:
    """The single file where there is one, as transformers takes it; else the shards that the index names."""
    if SINGLE in found.sizes:
        return [SINGLE]
    if folder is None or INDEX not in found.sizes:
        return []
    named = read_json(folder / INDEX, "").get("weight_map")
    shards = {str(each) for each in named.values()} if isinstance(named, dict) else set()
    return sorted(shards & found.sizes.keys())


def _file(source: str, found: Listing, name: str, revision: str) -> Path:
    from huggingface_hub import hf_hub_download

    limit = found.models.get(name) or found.sizes.get(name) or (_MOST_SMALL if name in SMALL else 0)
    if name in SMALL and limit > _MOST_SMALL:
        raise QprecError(f"{source}: {host()} lists {name} with {limit:,} bytes; that is no such file. Refused.")
    takes = "tqdm_class" in inspect.signature(hf_hub_download).parameters
    asked: dict[str, Any] = {"revision": revision, "endpoint": _endpoint(), "etag_timeout": _ANSWER}
    if takes and limit:
        asked["tqdm_class"] = _counting(f"{source}: {name}", limit)
    seconds = _LISTING + limit / _SLOWEST
    late = f"{source}: {host()} takes longer than {seconds:,.0f} seconds to send {name}; run the same command to go on."
    return Path(_within(seconds, lambda: hf_hub_download(source, name, **asked), late))


def _counting(what: str, limit: int) -> type[Any]:
    """A progress bar that ends a download which is longer than it may be."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Counting(tqdm):
        """Counts what came."""

        came = 0

        def update(self, n: float | None = 1) -> bool | None:
            """Some more bytes came."""
            self.came += int(n or 0)
            if self.came > limit:
                raise QprecError(f"{what}: {host()} sends more than the {limit:,} bytes that it lists; refused.")
            shown: bool | None = super().update(n)
            return shown

    return Counting


def _within(seconds: float, call: Callable[[], Any], late: str) -> Any:
    """What a call gives, if it does in time; an answer that drips in would be waited for without end."""
    result: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True, name="qprec-hub")
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not result:
        raise QprecError(late)
    return result[0]
