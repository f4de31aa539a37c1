"""Which bytes were measured: names, sizes and hashes of the files with weights, read only where that is cheap."""

import hashlib
from pathlib import Path

import pytest

from qwen_precision.model import files
from qwen_precision.model.files import weight_files
from qwen_precision.model.folder import open_checkpoint
from support.checkpoints import make_checkpoint
from support.runs import run_probe


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cached(tmp_path: Path, blob: str) -> Path:
    """A snapshot as the hub's cache keeps one: its weights are a link to a blob of this name."""
    cache = tmp_path / "models--owner--name"
    snapshot = make_checkpoint(cache / "snapshots" / "0123")
    (cache / "blobs").mkdir()
    weights = snapshot / "model.safetensors"
    weights.rename(cache / "blobs" / blob)
    weights.symlink_to(cache / "blobs" / blob)
    return snapshot


def test_every_shard_is_named_with_its_size_and_hash_in_probe_and_json(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", shard="100KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    found = run_probe(folder, ["abc"], dtypes=["bf16"]).model.files
    assert [(each.name, each.bytes, each.sha256) for each in found] == [
        (path.name, path.stat().st_size, digest(path)) for path in shards
    ]


@pytest.mark.parametrize(("room", "is_read"), [(0, True), (-1, False)])
def test_more_than_is_cheap_is_not_read(
    room: int, is_read: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "model", shard="100KB")
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    monkeypatch.setattr(files, "HASHED_BYTES", total + room)
    found = weight_files(open_checkpoint(folder, "x"))
    assert sum(each.bytes for each in found) == total
    assert all((each.sha256 is not None) == is_read for each in found)


def test_what_the_hub_s_cache_names_by_its_hash_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "HASHED_BYTES", 0)
    (found,) = weight_files(open_checkpoint(cached(tmp_path, "ab" * 32), "x"))
    assert found.name == "model.safetensors" and found.sha256 == "ab" * 32 and found.bytes > 0


def test_a_blob_that_is_named_otherwise_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files have a name of 40 digits in the cache, by git."""
    folder = cached(tmp_path, "ab" * 20)
    (found,) = weight_files(open_checkpoint(folder, "x"))
    assert found.sha256 == digest(folder / "model.safetensors")
    monkeypatch.setattr(files, "HASHED_BYTES", 0)
    assert weight_files(open_checkpoint(folder, "x"))[0].sha256 is None


def test_a_file_is_read_again_only_when_it_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe with control runs asks for the same hashes many times."""
    folder, read = make_checkpoint(tmp_path / "model"), list[Path]()
    monkeypatch.setattr(files, "sha256_of", lambda path: (read.append(path), digest(path))[1])
    first, again = (weight_files(open_checkpoint(folder, "x")) for _ in range(2))
    assert first == again and len(read) == 1
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    (changed,) = weight_files(open_checkpoint(folder, "x"))
    assert len(read) == 2 and changed.sha256 == digest(path) != first[0].sha256


def test_a_link_outside_a_cache_is_no_hash(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    (tmp_path / "blobs").mkdir()
    real = (folder / "model.safetensors").rename(tmp_path / "blobs" / ("ab" * 32))
    (folder / "model.safetensors").symlink_to(real)
    assert weight_files(open_checkpoint(folder, "x"))[0].sha256 == digest(real)
