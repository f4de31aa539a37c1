"""From what the user typed to a folder on this machine: ``demo``, a local folder, or a download from the hub.

Only safetensors, JSON and tokenizer files are fetched; pickles and code are not asked for.
"""

import os
from pathlib import Path

from qwen_precision.errors import QprecError, UsageError
from qwen_precision.model.foreign import file_in_words
from qwen_precision.model.gguffile import is_gguf

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
    path = Path(source).expanduser()
    if revision and (path.exists() or _looks_local(source)):
        raise UsageError(f"--revision {revision}: only a model on the hub has revisions; {source} is a folder.")
    if path.exists():
        if not path.is_dir() and not is_gguf(path):
            raise QprecError(f"{source}: {file_in_words(path)}.")
        return path, None
    if is_gguf(path):
        raise QprecError(f"{source}: no such file.")
    if _looks_local(source):
        raise QprecError(f"{source}: no such folder; give a checkpoint folder, a hub id (owner/name) or `demo`.")
    return _download(source, revision)


def _looks_local(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") != 1 or source.endswith("/")


def _download(source: str, revision: str | None) -> tuple[Path, str | None]:
    # Imported here: a local probe needs no HTTP client.
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import snapshot_download

    endpoint = os.environ.get("HF_ENDPOINT") or None
    at = f" at revision {revision}" if revision else ""
    try:
        folder = snapshot_download(
            source, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, endpoint=endpoint
        )
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
    return Path(folder), Path(folder).name
