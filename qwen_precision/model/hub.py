"""From what the user typed to a folder on this machine: ``demo``, a local folder, or a download from the hub.

Only safetensors, JSON and tokenizer files are fetched, or one GGUF model; pickles and code are not asked for.
"""

import difflib
import http
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from qwen_precision.errors import QprecError, UsageError
from qwen_precision.files import is_whole
from qwen_precision.model.fetching import (
    SINGLE,
    SMALL,
    asked_once,
    cached,
    fetched,
    fetched_model,
    host,
    listing_from_hub,
    names,
)
from qwen_precision.model.foreign import file_in_words
from qwen_precision.model.gguffile import is_gguf
from qwen_precision.model.ggufheader import first_part, parts_of
from qwen_precision.progress import Progress, silent

DEMO = Path(__file__).parent.parent / "demo"
"""The checkpoint that ships in the package."""


def locate(source: str, revision: str | None = None, progress: Progress = silent) -> tuple[Path, str | None]:
    """The folder (or GGUF file) of a checkpoint and, for one from the hub, its commit.

    While a hub is waited for, ``progress`` says which.

    A folder that exists wins over a hub id of the same spelling; ``./demo`` is a folder, ``demo`` the demo.

    Raises:
        QprecError: nothing of that name here or on the hub, no access, no network.
    """
    if source == "demo" and not revision:
        return DEMO, None
    if not source:
        raise UsageError("MODEL: is empty; give a hub id (owner/name), a checkpoint folder or `demo`.")
    path, on_hub = Path(source).expanduser(), _file_on_hub(source)
    there = os.path.exists(path)  # pathlib's raises where a name is too long
    if revision and (there or (_looks_local(source) and not on_hub)):
        raise UsageError(f"--revision {revision}: only a model on the hub has revisions; {source} is a folder.")
    if there:
        if not path.is_dir() and not is_gguf(path):
            raise QprecError(f"{source}: {file_in_words(path)}.")
        if path.is_dir() and not is_whole(source):
            raise QprecError(f"{source}: the folder's name is not UTF-8, which tokenizers cannot open; rename it.")
        return path, None
    if "://" in source or source.startswith(("huggingface.co/", "hf.co/")):
        raise UsageError(f"{source}: is a web address; give the id alone{_meant(source)}.")
    if on_hub:
        progress(0, 0, f"waiting for {host()}")
        with asked_once():
            return _download_gguf(on_hub, revision)
    if is_gguf(path):
        raise QprecError(f"{source}: no such file.")
    if _looks_local(source):
        expected = "give a checkpoint folder, a hub id (owner/name) or `demo`"
        raise QprecError(f"{source}: no such folder; {expected}{_meant(source)}")
    progress(0, 0, f"waiting for {host()}")
    with asked_once():
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
    on_hub = _file_on_hub(source)
    local = source == "demo" or os.path.exists(Path(source).expanduser())
    if local or (_looks_local(source) and not on_hub):
        return True
    folder = cached(on_hub.id if on_hub else source, revision)
    if folder is None:
        return False
    if on_hub:
        return all((folder / part).is_file() for part in on_hub.parts)
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.gguf"))


class HubFile(NamedTuple):
    """A GGUF model in a repository on the hub."""

    id: str
    """Of the repository (owner/name)."""
    parts: list[str]
    """Its files there; the first is the one to open."""

    @property
    def source(self) -> str:
        """What a user types to name it."""
        return f"{self.id}/{self.parts[0]}"


def gguf_on_hub(source: str, revision: str | None = None) -> HubFile | None:
    """The GGUF model that is meant: of a repository without other weights, its only one; None where it is not GGUF.

    Raises:
        QprecError: it holds several, or not the one that was named; and as ``locate`` does.
    """
    named = _file_on_hub(source)
    with _sentences(source, revision):
        there = names(named.id if named else source, revision)
    models = sorted({first_part(Path(name)).as_posix() for name in there if is_gguf(Path(name))})
    if named and named.parts[0] not in models:
        raise QprecError(f"{source}: no such file here, and none in {named.id} on the hub{_choice(named.id, models)}.")
    if named or not models or any(name.endswith(".safetensors") and "/" not in name for name in there):
        return named
    if len(models) > 1:
        raise QprecError(f"{source}: holds {len(models)} GGUF files and no safetensors{_choice(source, models)}.")
    return HubFile(source, _all_parts(models[0]))


def _choice(repository: str, models: Sequence[str]) -> str:
    """Names of GGUF files to take instead, as the end of a sentence."""
    few = [f"{repository}/{name}" for name in models[:6]] + (["…"] if len(models) > 6 else [])
    return f"; give one of them: {', '.join(few)}" if few else ""


def _file_on_hub(source: str) -> HubFile | None:
    """A GGUF file in a repository, where that is what was spelled (owner/name/file.gguf); it need not exist."""
    pieces = source.split("/")
    if not is_gguf(Path(source)) or len(pieces) < 3 or source.startswith((".", "/", "~")):
        return None
    return HubFile("/".join(pieces[:2]), _all_parts("/".join(pieces[2:])))


def _all_parts(name: str) -> list[str]:
    return [Path(name).with_name(part).as_posix() for part in parts_of(Path(name).name)]


def without_weights(source: str, revision: str | None = None) -> Path:
    """A folder with all of a checkpoint on the hub but its weights.

    Raises:
        QprecError: as ``locate`` does.
    """
    with _sentences(source, revision):
        folder = fetched(source, revision, weights=False)
    return _something(source, folder)


def download_bytes(source: str, revision: str | None = None) -> tuple[int, int]:
    """Bytes that a download of a checkpoint would take, in all and of its weights; nothing is fetched.

    Raises:
        QprecError: as ``locate`` does.
    """
    on_hub = _file_on_hub(source)
    with _sentences(source, revision):
        found = listing_from_hub(on_hub.id if on_hub else source, revision)
    weights = {name: size for name, size in found.sizes.items() if name.endswith(".safetensors")}
    if on_hub or (found.models and not weights):
        gguf = gguf_on_hub(source, revision)
        return (size := sum(found.models.get(part, 0) for part in gguf.parts) if gguf else 0), size
    if SINGLE in weights:
        weights = {SINGLE: weights[SINGLE]}
    small = sum(size for name, size in found.sizes.items() if name in SMALL)
    return small + sum(weights.values()), sum(weights.values())


def _looks_local(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") != 1 or source.endswith("/")


def _download(source: str, revision: str | None) -> tuple[Path, str | None]:
    with _sentences(source, revision):
        folder = fetched(source, revision)
    if folder is None or not any(folder.glob("*.safetensors")):
        gguf = gguf_on_hub(source, revision)
        if gguf:
            return _download_gguf(gguf, revision)
    found = _something(source, folder)
    return found, found.name


def _something(source: str, folder: Path | None) -> Path:
    if folder is None:
        raise QprecError(f"{source}: {host()} lists no file of a checkpoint; is this the right id?")
    return folder


def _download_gguf(file: HubFile, revision: str | None) -> tuple[Path, str | None]:
    """All parts of a GGUF model, and nothing else."""
    with _sentences(file.source, revision):
        folder = fetched_model(file.id, revision, file.parts)
    if folder is None or not (folder / file.parts[0]).is_file():
        gguf_on_hub(file.source, revision)  # says what is there
        raise QprecError(f"{file.source}: {host()} lists it, and does not give all of it; try again later.")
    return folder / file.parts[0], folder.name


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
