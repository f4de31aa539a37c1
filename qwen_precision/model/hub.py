"""From what the user typed to a folder on this machine: ``demo``, a local folder, or a download from the hub.

Only safetensors, JSON and tokenizer files are fetched; pickles and code are not asked for.
"""

import difflib
import http
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from qwen_precision.errors import QprecError, UsageError
from qwen_precision.model.fetching import SINGLE, SMALL, cached, fetched, host, listing
from qwen_precision.model.foreign import file_in_words
from qwen_precision.model.gguffile import is_gguf

DEMO = Path(__file__).parent.parent / "demo"
"""The checkpoint that ships in the package."""


def locate(source: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder (or GGUF file) of a checkpoint and, for one from the hub, its commit.

    A folder that exists wins over a hub id of the same spelling; ``./demo`` is a folder, ``demo`` the demo.

    Raises:
        QprecError: nothing of that name here or on the hub, no access, no network.
    """
    if source == "demo" and not revision:
        return DEMO, None
    if not source:
        raise UsageError("MODEL: is empty; give a hub id (owner/name), a checkpoint folder or `demo`.")
    path = Path(source).expanduser()
    there = os.path.exists(path)  # pathlib's raises where a name is too long
    if revision and (there or _looks_local(source)):
        raise UsageError(f"--revision {revision}: only a model on the hub has revisions; {source} is a folder.")
    if there:
        if not path.is_dir() and not is_gguf(path):
            raise QprecError(f"{source}: {file_in_words(path)}.")
        return path, None
    if "://" in source or source.startswith(("huggingface.co/", "hf.co/")):
        raise UsageError(f"{source}: is a web address; give the id alone{_meant(source)}.")
    if is_gguf(path):
        raise QprecError(f"{source}: no such file.")
    if _looks_local(source):
        expected = "give a checkpoint folder, a hub id (owner/name) or `demo`"
        raise QprecError(f"{source}: no such folder; {expected}{_meant(source)}")
    return _download(source, revision)


def _meant(source: str) -> str:
    """What was probably meant, as the end of a sentence: the id in an address, a name that differs a little."""
    path = urlsplit(source).path if "://" in source else source.partition("/")[2]
    parts = [part for part in path.split("/") if part]
    if "://" in source or source.startswith(("huggingface.co/", "hf.co/")):
        return f": {'/'.join(parts[:2])}" if len(parts) >= 2 else " (owner/name)"
    if re.fullmatch(r"qwen[\w.-]+", source, re.IGNORECASE):
        return f"; did you mean Qwen/{source}?"
    place = Path(source).expanduser()
    try:
        near = [each.name for each in place.parent.iterdir() if each.is_dir()]
    except OSError:
        near = []
    here = source.removesuffix(place.name)
    words = difflib.get_close_matches(place.name, [*near, *([] if here else ["demo"])], 1, 0.7)
    return f"; did you mean {here}{words[0]}?" if words else "."


def is_here(source: str, revision: str | None = None) -> bool:
    """Whether nothing has to be downloaded: a folder, the demo, or a whole checkpoint in the hub's cache."""
    if source == "demo" or os.path.exists(Path(source).expanduser()) or _looks_local(source):
        return True
    folder = cached(source, revision)
    return folder is not None and any(folder.glob("*.safetensors"))


def without_weights(source: str, revision: str | None = None) -> Path:
    """A folder with all of a checkpoint on the hub but its weights.

    Raises:
        QprecError: as ``locate`` does.
    """
    with _sentences(source, revision):
        return fetched(source, revision, weights=False)


def download_bytes(source: str, revision: str | None = None) -> tuple[int, int]:
    """Bytes that a download of a checkpoint would take, in all and of its weights; nothing is fetched.

    Raises:
        QprecError: as ``locate`` does.
    """
    with _sentences(source, revision):
        found = listing(source, revision)
    weights = {name: size for name, size in found.sizes.items() if name.endswith(".safetensors")}
    if SINGLE in weights:
        weights = {SINGLE: weights[SINGLE]}
    small = sum(size for name, size in found.sizes.items() if name in SMALL)
    return small + sum(weights.values()), sum(weights.values())


def _looks_local(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") != 1 or source.endswith("/")


def _download(source: str, revision: str | None) -> tuple[Path, str | None]:
    with _sentences(source, revision):
        folder = fetched(source, revision)
    return folder, folder.name


@contextmanager
def _sentences(source: str, revision: str | None) -> Iterator[None]:
    """The hub library's errors as sentences."""
    from huggingface_hub import errors as hub_errors

    at = f" at revision {revision}" if revision else ""
    try:
        yield
    except hub_errors.GatedRepoError as error:
        raise QprecError(
            f"{source}: is gated; accept its terms on its hub page, then set HF_TOKEN or run `hf auth login`."
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise QprecError(f"{source}: no such model on the hub (or it is private: set HF_TOKEN).") from error
    except hub_errors.RevisionNotFoundError as error:
        raise QprecError(f"{source}: has no revision {revision}; see its list of branches and commits.") from error
    except hub_errors.HFValidationError as error:
        raise QprecError(f"{source}: is neither a folder here nor a hub id (owner/name).") from error
    except (hub_errors.OfflineModeIsEnabled, hub_errors.LocalEntryNotFoundError) as error:
        _check_answer(source, error)
        raise QprecError(
            f"{source}{at}: is not in the local cache and the hub cannot be reached; "
            "check the network, or give a folder that holds the checkpoint."
        ) from error
    except (hub_errors.HfHubHTTPError, OSError, ValueError) as error:
        _check_answer(source, error)
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise QprecError(f"{source}{at}: the download failed ({first}); run the same command to go on.") from error
    except Exception as error:
        # The HTTP client's own errors (a connection cut mid-way) belong to no common base across versions.
        if type(error).__module__.split(".")[0] not in {"httpx", "httpx2", "httpcore", "httpcore2", "requests"}:
            raise
        raise QprecError(
            f"{source}{at}: the download from {host()} was interrupted ({type(error).__name__}); run the same command "
            "to go on."
        ) from error


def _check_answer(source: str, error: BaseException) -> None:
    """A hub that answers can be reached: what it says is called what it is.

    Raises:
        QprecError: there was an answer, which is its status.
    """
    met: BaseException | None = error
    while met is not None:
        status = getattr(getattr(met, "response", None), "status_code", None)
        if isinstance(status, int) and status != 404:
            known = http.HTTPStatus(status).phrase if status in set(http.HTTPStatus) else "no known status"
            todo = _ANSWERS.get(status, "try again later")
            raise QprecError(f"{source}: {host()} answers {status} ({known}); {todo}.") from error
        met = met.__cause__ or met.__context__


_ANSWERS = {
    401: "set HF_TOKEN or run `hf auth login`",
    403: "set HF_TOKEN to a token that may read it",
    429: "wait a while, or set HF_TOKEN",
}
"""What to do about an answer."""
