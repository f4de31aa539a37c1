"""From what the user typed to a folder on this machine: ``demo``, a local folder, or a download from the hub.

Only safetensors, JSON and tokenizer files are fetched, or one GGUF model; pickles and code are not asked for.
"""

import difflib
import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from qwen_precision.errors import QprecError, UsageError
from qwen_precision.model.foreign import file_in_words
from qwen_precision.model.gguffile import is_gguf
from qwen_precision.model.ggufheader import first_part, parts_of

DEMO = Path(__file__).parent.parent / "demo"
"""The checkpoint that ships in the package."""

_WANTED = ["*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer.model"]
_UNWANTED = ["original/*", "*/*"]


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
    path, there = Path(source).expanduser(), _file_on_hub(source)
    if revision and (path.exists() or (_looks_local(source) and not there)):
        raise UsageError(f"--revision {revision}: only a model on the hub has revisions; {source} is a folder.")
    if path.exists():
        if not path.is_dir() and not is_gguf(path):
            raise QprecError(f"{source}: {file_in_words(path)}.")
        return path, None
    if "://" in source or source.startswith(("huggingface.co/", "hf.co/")):
        raise UsageError(f"{source}: is a web address; give the id alone{_meant(source)}.")
    if there:
        return _download_gguf(there, revision)
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
    there = _file_on_hub(source)
    if source == "demo" or Path(source).expanduser().exists() or (_looks_local(source) and not there):
        return True
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, wanted = (there.id, [glob.escape(part) for part in there.parts]) if there else (source, _WANTED)
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=wanted, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return False
    if there:
        return all((folder / part).is_file() for part in there.parts)
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
        there = _names_on_hub(named.id if named else source, revision)
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


def _names_on_hub(repository: str, revision: str | None) -> list[str]:
    """Names of all files of a repository; in offline mode, of those that were fetched before."""
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=[], local_files_only=True))
        return [each.relative_to(folder).as_posix() for each in folder.rglob("*")]
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None).list_repo_files(repository, revision=revision)


def without_weights(source: str, revision: str | None = None) -> Path:
    """A folder with all of a checkpoint on the hub but its weights.

    Raises:
        QprecError: as ``locate`` does.
    """
    with _sentences(source, revision):
        return _snapshot(source, revision, [each for each in _WANTED if each != "*.safetensors"], _UNWANTED)


def download_bytes(source: str, revision: str | None = None) -> tuple[int, int]:
    """Bytes that a download of a checkpoint would take, in all and of its weights; nothing is fetched.

    Raises:
        QprecError: as ``locate`` does.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    gguf = gguf_on_hub(source, revision)
    with _sentences(source, revision):
        found = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None).model_info(
            gguf.id if gguf else source, revision=revision, files_metadata=True
        )
    files = {each.rfilename: each.size or 0 for each in found.siblings or []}
    if gguf:
        return (size := sum(files.get(part, 0) for part in gguf.parts)), size
    wanted = list(filter_repo_objects(files, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    return sum(files[name] for name in wanted), sum(files[n] for n in wanted if n.endswith(".safetensors"))


def _looks_local(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") != 1 or source.endswith("/")


def _download(source: str, revision: str | None) -> tuple[Path, str | None]:
    with _sentences(source, revision):
        folder = _snapshot(source, revision, _WANTED, _UNWANTED)
    if not any(folder.glob("*.safetensors")):
        gguf = gguf_on_hub(source, revision)
        if gguf:
            return _download_gguf(gguf, revision)
    return folder, folder.name


def _download_gguf(file: HubFile, revision: str | None) -> tuple[Path, str | None]:
    """All parts of a GGUF model, and nothing else."""
    with _sentences(file.source, revision):
        folder = _snapshot(file.id, revision, [glob.escape(part) for part in file.parts])
    if not (folder / file.parts[0]).is_file():
        gguf_on_hub(file.source, revision)  # says what is there
    return folder / file.parts[0], folder.name


def _snapshot(repository: str, revision: str | None, wanted: list[str], unwanted: list[str] | None = None) -> Path:
    # Imported here: a local probe needs no HTTP client.
    from huggingface_hub import snapshot_download

    endpoint = os.environ.get("HF_ENDPOINT") or None
    return Path(
        snapshot_download(
            repository, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted, endpoint=endpoint
        )
    )


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
        raise QprecError(
            f"{source}{at}: is not in the local cache and the hub cannot be reached; "
            "check the network, or give a folder that holds the checkpoint."
        ) from error
    except (hub_errors.HfHubHTTPError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise QprecError(f"{source}{at}: the download failed ({first}); run the same command to go on.") from error
    except Exception as error:
        # The HTTP client's own errors (a connection cut mid-way) belong to no common base across versions.
        if type(error).__module__.split(".")[0] not in {"httpx", "httpx2", "httpcore", "httpcore2", "requests"}:
            raise
        raise QprecError(
            f"{source}{at}: the download was interrupted ({type(error).__name__}); run the same command to go on."
        ) from error
