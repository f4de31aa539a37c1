"""The hub path, against a small loopback server that speaks the hub's API."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from qwen_precision.cli.app import main
from qwen_precision.model.fetching import host
from qwen_precision.model.hub import download_bytes, locate
from support.checkpoints import DEMO
from support.gguffiles import write_gguf

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHERS = [f"another-{number}.safetensors" for number in range(300)] + [f"more-{number}.json" for number in range(300)]
LISTINGS = {
    "null": "null",
    "deep": "[" * 5000 + "]" * 5000,
    "text": '"text"',
    "no JSON": "<html>",
    "siblings": json.dumps({"id": "owner/good", "sha": COMMIT, "siblings": 5}),
    "no commit": json.dumps({"id": "owner/good", "sha": "../../etc", "siblings": []}),
    "nothing": json.dumps({"id": "owner/good", "sha": COMMIT, "siblings": []}),
}


class Hub(BaseHTTPRequestHandler):
    """owner/good is the demo, a test may add folders; the others fail in the ways the hub fails."""

    folders: ClassVar[dict[str, Path]] = {}
    requested: ClassVar[list[str]] = []
    cut_weights = False
    lie: ClassVar[str | None] = None
    """How it fails, for owner/good."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        type(self).requested.append(path)
        if self.lie is not None and self._lies(path, self.lie, body):
            return
        if "owner/gated" in path:
            # As on the hub: the listing is public, the files are not.
            self._list(body) if path.startswith("/api/") else self._error(403, "GatedRepo", body)
        elif (repository := next((name for name in self.folders if name in path), None)) is None:
            self._error(404, "RepoNotFound", body)
        elif path.startswith("/api/") and not path.endswith(("/revision/main", f"/revision/{COMMIT}", repository)):
            self._list(body, repository) if "/tree/" in path else self._error(404, "RevisionNotFound", body)
        elif path.startswith("/api/"):
            self._list(body, repository)
        else:
            self._file(self.folders[repository], path.split("/resolve/")[1].partition("/")[2], body)

    def _lies(self, path: str, how: str, body: bool) -> bool:
        listing, weights = path.startswith("/api/"), path.endswith(".safetensors")
        if how == "stall" and listing:
            time.sleep(3)
        elif (how == "drip" and listing) or (how == "dripping file" and weights and body):
            self._drip()
        elif how == "reset" and listing:
            self.connection.shutdown(socket.SHUT_RDWR)
        elif how in LISTINGS and listing:
            self._send(200, LISTINGS[how].encode(), body)
        elif how.isdigit():
            self._send(int(how), b"no", body)
        elif how == "long" and listing:
            self._endless()
        elif how == "round" and listing:
            self._send(302, b"", body, {"Location": self.path})
        elif how == "elsewhere" and listing:
            self._send(302, b"", body, {"Location": "file:///etc/passwd"})
        elif how == "moved" and weights:
            self._send(302, b"", body, {"Location": self.path, "ETag": '"12345678"', "X-Repo-Commit": COMMIT})
        elif how == "endless" and weights and body:
            self._endless()
        elif how == "sizes" and weights:
            self._send(200, b"x" * 100, body, {"ETag": '"12345678"', "X-Repo-Commit": COMMIT})
        else:
            return False
        self.close_connection = True
        return True

    def _drip(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        with suppress(OSError):
            for _ in range(30):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)

    def _endless(self) -> None:
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        with suppress(OSError):
            for _ in range(1000):
                self.wfile.write(bytes(1 << 20))
            type(self).requested.append("all of it")

    def _list(self, body: bool, repository: str = "owner/good") -> None:
        folder = self.folders[repository]
        names = [each.relative_to(folder).as_posix() for each in sorted(folder.rglob("*")) if each.is_file()]
        names += ["pytorch_model.bin", "modeling_evil.py"]
        if "/tree/" in self.path:
            listing = [{"type": "file", "path": n, "size": 1, "oid": "0" * 40} for n in names]
            self._send(200, json.dumps(listing).encode(), body)
            return
        others = OTHERS if repository == "owner/good" else []
        info = {
            "id": repository,
            "modelId": repository,
            "sha": COMMIT,
            "private": False,
            "siblings": [{"rfilename": name, "size": self._size(folder / name)} for name in names + others],
        }
        self._send(200, json.dumps(info).encode(), body)

    def _size(self, path: Path) -> int:
        if self.lie == "huge config" and path.name == "config.json":
            return 1 << 40
        return path.stat().st_size if path.is_file() else 1

    def _file(self, folder: Path, name: str, body: bool) -> None:
        data = (folder / name).read_bytes() if (folder / name).is_file() else b"not asked for"
        named = f"{hash(name) & 0xFFFFFFFF:08x}" * (8 if self.lie == "hash" else 1)
        headers = {"ETag": f'"{named}"', "X-Repo-Commit": COMMIT}
        if body and self.cut_weights and name.endswith(".safetensors"):
            self._send(200, data, body, headers, cut=len(data) // 2)
        else:
            self._send(200, data, body, headers)

    def _error(self, status: int, code: str, body: bool) -> None:
        self._send(status, b'{"error": "no"}', body, {"X-Error-Code": code, "X-Error-Message": code})

    def _send(
        self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        """Silence."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    Hub.requested, Hub.cut_weights, Hub.lie, Hub.folders = [], False, None, {"owner/good": DEMO}
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.chdir(tmp_path)
    yield Hub
    server.shutdown()
    server.server_close()


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err.strip().splitlines()[-1]


def test_a_hub_id_is_downloaded_and_probed_and_its_commit_recorded(hub: type[Hub], tmp_path: Path) -> None:
    assert main(["probe", "owner/good", "--dtype", "fp16"]) == 1
    model = json.loads((tmp_path / "qprec-run.json").read_text())["model"]
    assert model["source"] == "owner/good" and model["revision"] == COMMIT


def test_only_safetensors_json_and_tokenizer_files_are_fetched(hub: type[Hub]) -> None:
    main(["probe", "owner/good", "--dtype", "bf16"])
    files = {path.rsplit("/", 1)[-1] for path in hub.requested if "/resolve/" in path}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= files
    assert not {name for name in files if name.endswith((".bin", ".py"))}


def test_a_model_that_is_not_there_is_named(hub: type[Hub], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "owner/missing"]) == 3
    line = sentence(capsys)
    assert "owner/missing" in line and "no such model" in line


def test_a_gated_model_says_how_to_get_access(hub: type[Hub], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "owner/gated"]) == 3
    line = sentence(capsys)
    assert "owner/gated" in line and "gated" in line and "HF_TOKEN" in line


def test_a_missing_revision_is_named(hub: type[Hub], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "owner/good", "--revision", "nonesuch"]) == 3
    line = sentence(capsys)
    assert "owner/good" in line and "nonesuch" in line


def test_an_interrupted_download_says_so_and_the_same_command_goes_on(
    hub: type[Hub], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its retries
    hub.cut_weights = True
    assert main(["probe", "owner/good"]) == 3
    line = sentence(capsys)
    assert "owner/good" in line and "same command" in line
    hub.cut_weights = False
    assert main(["probe", "owner/good", "--dtype", "bf16"]) == 0


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["-o", "runs/"]])
def test_without_a_network_the_sentence_says_what_to_do(
    more: list[str], hub: type[Hub], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert main(["probe", "owner/good", *more]) == 3
    line = sentence(capsys)
    assert "owner/good" in line and "cannot be reached" in line and "folder" in line


def test_offline_mode_takes_what_is_in_the_cache(
    hub: type[Hub], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    assert main(["probe", "owner/good", "--dtype", "bf16"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main(["probe", "owner/good", "--dtype", "bf16"]) == 0
    capsys.readouterr()
    assert main(["probe", "owner/other"]) == 3
    assert "owner/other" in sentence(capsys)


def test_a_folder_wins_over_a_hub_id_of_the_same_name(hub: type[Hub], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(DEMO, tmp_path / "owner" / "good")
    assert main(["probe", "owner/good", "--dtype", "bf16"]) == 0
    assert hub.requested == []


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("stall", "cannot be reached"),
        ("long", "lists its files in more than 1 MiB"),
        ("round", ""),
        ("elsewhere", ""),
        ("moved", ""),
        ("drip", "takes longer than 2 seconds to list its files"),
        ("dripping file", "seconds to send model.safetensors"),
        ("huge config", "lists config.json with 1,099,511,627,776 bytes"),
        ("reset", "cannot be reached"),
        *((name, "") for name in LISTINGS),
        ("403", "answers 403 (Forbidden)"),
        ("429", "answers 429 (Too Many Requests)"),
        ("500", "answers 500 (Internal Server Error)"),
        ("endless", "sends more than the"),
        ("sizes", ""),
    ],
)
def test_a_hub_that_lies_or_stalls_gets_one_sentence_with_its_name(
    how: str, words: str, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qwen_precision.model import fetching

    sleep = time.sleep
    monkeypatch.setattr("time.sleep", lambda seconds: sleep(min(seconds, 3)))
    monkeypatch.setattr(fetching, "_ANSWER", 1.0)
    monkeypatch.setattr(fetching, "_LISTING", 2.0)
    monkeypatch.setattr(fetching, "_SLOWEST", 1e12)
    monkeypatch.setattr(fetching, "_MOST_LISTING", 1 << 20)
    hub.lie = how
    assert main(["probe", "owner/good", "--dtype", "bf16"]) == 3
    line = sentence(capsys)
    assert line.startswith("qprec: ") and words in line and "bug" not in line
    assert "127.0.0.1" in line or "owner/good" in line or "model.safetensors" in line
    assert "all of it" not in hub.requested


def test_files_that_no_checkpoint_needs_are_not_asked_for(hub: type[Hub]) -> None:
    assert main(["probe", "owner/good", "--dtype", "bf16"]) == 0
    assert not [path for path in hub.requested if "another-" in path or "more-" in path]


def test_a_hash_that_is_not_the_files_changes_nothing_of_what_is_measured(hub: type[Hub], tmp_path: Path) -> None:
    hub.lie = "hash"
    assert main(["probe", "owner/good", "--dtype", "fp16", "--no-explain"]) == 1
    assert json.loads((tmp_path / "qprec-run.json").read_text())["model"]["revision"] == COMMIT


@pytest.mark.parametrize(
    "verb", [["probe", "--dtype", "bf16"], ["generate", "--dtype", "bf16"], ["probe", "--dry-run"]]
)
def test_the_hub_is_asked_for_its_list_once(verb: list[str], hub: type[Hub]) -> None:
    assert main([*verb, "owner/good"]) == 0
    assert sum(path.startswith("/api/") for path in hub.requested) == 1


@pytest.mark.parametrize("source", ["owner/one", "owner/many/tiny-Q8_0.gguf"])
@pytest.mark.parametrize("more", [["--dtype", "bf16"], ["--dry-run"]])
def test_of_a_gguf_too_it_is_asked_for_its_list_once(ggufs: type[Hub], source: str, more: list[str]) -> None:
    assert main(["probe", source, *more]) == 0
    assert sum(path.startswith("/api/") for path in ggufs.requested) == 1


def test_which_hub_is_waited_for_is_said_while_it_is(hub: type[Hub]) -> None:
    told: list[str] = []
    locate("owner/good", None, lambda done, total, what: told.append(f"{what}, {len(hub.requested)}"))
    assert told == [f"waiting for {host()}, 0"] and "127.0.0.1" in host()


def fetched(hub: type[Hub]) -> set[str]:
    """Names of the files that were downloaded."""
    return {path.split("/resolve/")[1].partition("/")[2] for path in hub.requested if "/resolve/" in path}


@pytest.fixture
def ggufs(hub: type[Hub], tmp_path: Path) -> type[Hub]:
    """owner/one holds one GGUF model, owner/many several, one of them split and in a folder."""
    many = tmp_path / "repositories" / "many"
    (many / "BF16").mkdir(parents=True)
    (many.parent / "one").mkdir()
    one = write_gguf(many.parent / "one" / "tiny-Q8_0.gguf")
    (one.parent / "config.json").write_text("{}")
    for name in (
        "tiny-Q4_K_M.gguf",
        "tiny-Q8_0.gguf",
        "BF16/tiny-00001-of-00002.gguf",
        "BF16/tiny-00002-of-00002.gguf",
    ):
        (many / name).write_bytes(one.read_bytes())
    hub.folders.update({"owner/one": one.parent, "owner/many": many})
    return hub


@pytest.mark.parametrize("source", ["owner/one", "owner/many/tiny-Q8_0.gguf"])
def test_a_gguf_on_the_hub_is_downloaded_alone_and_probed_and_its_commit_recorded(
    ggufs: type[Hub], tmp_path: Path, source: str
) -> None:
    assert main(["probe", source, "--dtype", "bf16"]) == 0
    model = json.loads((tmp_path / "qprec-run.json").read_text())["model"]
    assert model["source"] == source and model["revision"] == COMMIT
    assert [each["name"] for each in model["files"]] == ["tiny-Q8_0.gguf"]
    assert {name for name in fetched(ggufs) if name.endswith(".gguf")} == {"tiny-Q8_0.gguf"}


def test_all_parts_of_a_split_gguf_are_downloaded_whichever_is_named(
    ggufs: type[Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["probe", "owner/many/BF16/tiny-00002-of-00002.gguf", "--dtype", "bf16"])
    assert fetched(ggufs) == {"BF16/tiny-00001-of-00002.gguf", "BF16/tiny-00002-of-00002.gguf"}


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
@pytest.mark.parametrize("source", ["owner/many", "owner/many/tiny-Q2_K.gguf"])
def test_of_several_ggufs_one_has_to_be_named_and_the_sentence_names_them(
    ggufs: type[Hub], capsys: pytest.CaptureFixture[str], source: str, more: list[str]
) -> None:
    assert main(["probe", source, *more]) == 3
    line = sentence(capsys)
    assert source in line
    assert "owner/many/tiny-Q8_0.gguf" in line and "owner/many/BF16/tiny-00001-of-00002.gguf" in line
    assert "00002-of" not in line.replace("00001-of-00002", "") and not any(n.endswith(".gguf") for n in fetched(ggufs))


@pytest.mark.parametrize("source", ["owner/one", "owner/many/tiny-Q8_0.gguf"])
def test_a_dry_run_of_a_gguf_on_the_hub_says_its_size_and_fetches_nothing(
    ggufs: type[Hub], capsys: pytest.CaptureFixture[str], source: str
) -> None:
    assert main(["probe", source, "--dry-run"]) == 0
    assert "GB" in capsys.readouterr().out
    size = (ggufs.folders["owner/many"] / "tiny-Q8_0.gguf").stat().st_size
    assert download_bytes(source) == (size, size) and not fetched(ggufs)


def test_a_path_to_a_gguf_that_is_neither_here_nor_on_the_hub_says_both(
    hub: type[Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", "models/mine/q8.gguf"]) == 3
    line = sentence(capsys)
    assert "models/mine/q8.gguf" in line and "no such" in line and "hub" in line


@pytest.mark.parametrize("source", ["owner/one", "owner/many/tiny-Q8_0.gguf"])
def test_a_gguf_in_the_cache_is_run_offline(ggufs: type[Hub], monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    from huggingface_hub import constants

    assert main(["probe", source, "--dtype", "bf16"]) == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main(["probe", source, "--dtype", "bf16", "--force"]) == 0
    assert main(["probe", source, "--dry-run"]) == 0
