"""Shards that change under the reader: by position and counted, never mapped; a sentence, never SIGBUS."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_precision.cli import main
from qwen_precision.errors import QprecError
from qwen_precision.model import shards
from qwen_precision.model.index import read_header
from qwen_precision.model.shards import read_rows

pytestmark = pytest.mark.usefixtures("scratch")

Capture = pytest.CaptureFixture[str]
NUMBERS = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8,
    torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


def test_every_format_is_read_as_safetensors_reads_it_whole_and_by_rows(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(24).reshape(4, 6).to(dtype) for dtype in NUMBERS}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    expected, infos = load_file(tmp_path / "model.safetensors"), read_header(tmp_path / "model.safetensors")
    for name, info in infos.items():
        held = read_rows(tmp_path, info, slice(None))
        assert held.dtype == expected[name].dtype and held.shape == expected[name].shape, name
        assert torch.equal(held.view(torch.uint8) if held.ndim else held, _bits(expected[name])), name
        if info.shape:
            assert torch.equal(_bits(read_rows(tmp_path, info, slice(1, 3))), _bits(expected[name][1:3])), name


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.ndim else tensor


def test_what_is_read_starts_where_torchs_own_memory_does(demo_folder: Path) -> None:
    infos = read_header(demo_folder / "model.safetensors")
    assert any(info.start % 64 for info in infos.values())
    assert all(read_rows(demo_folder, info, slice(None)).data_ptr() % 64 == 0 for info in infos.values())


def test_memory_is_read_into_again_once_nothing_is_in_it_and_not_before() -> None:
    memory, size = shards.Memory(), shards._WORTH
    first, second = memory.take(size), memory.take(size)
    assert first.data_ptr() % 64 == 0 and first.data_ptr() != second.data_ptr()
    place, part = first.data_ptr(), first.view(torch.float32)[5:]
    del first
    assert memory.take(size).data_ptr() != place, "a view still shows it"
    del part
    assert memory.take(size).data_ptr() == place


def _shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _swap(path: Path) -> None:
    path.with_suffix(".new").write_bytes(bytes(path.stat().st_size))
    os.replace(path.with_suffix(".new"), path)


def _remove(path: Path) -> None:
    path.unlink()


COMMANDS = {
    "probe": ["probe", "model", "--dtype", "fp16", "--prompt", "hello", "--memory", "resident"],
    "streamed": ["probe", "model", "--dtype", "fp16", "--prompt", "hello", "--memory", "streamed"],
    "sweep": ["probe", "model", "--dtype", "fp16", "--prompt", "hello", "--sweep", "first-token"],
    "rescue": ["probe", "model", "--dtype", "fp16", "--prompt", "hello", "--rescue-to", "safe"],
    "generate": ["generate", "model", "--max-new-tokens", "2"],
}


@pytest.mark.parametrize("change", [_shrink, _swap, _remove])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_shard_that_changes_while_it_is_read_is_named_in_a_sentence(
    command: str, change: Callable[[Path], None], broken: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    count, original = [0], shards.read_rows

    def read(folder: Path, info: Any, rows: slice, memory: Any = None) -> torch.Tensor:
        count[0] += 1
        if count[0] == 5:
            change(broken / "model.safetensors")
        return original(folder, info, rows, memory)

    for name in ("shards", "weights"):
        monkeypatch.setattr(f"qwen_precision.model.{name}.read_rows", read)
    assert main([*COMMANDS[command], "-o", "run.json"]) == 3
    told = capsys.readouterr()
    assert "model.safetensors" in told.out + told.err and "bug" not in told.err
    assert not Path("safe").exists()


def test_a_shard_that_shrinks_during_one_read_ends_in_a_sentence(demo_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((demo_folder / "model.safetensors").read_bytes())
    info = max(read_header(path).values(), key=lambda each: each.start)
    ends = r"model\.safetensors: cannot be read \(it ends before its header says\)"
    with pytest.raises(QprecError, match=ends), shards.opened(tmp_path, info) as file:
        os.truncate(path, info.start + 8)
        shards.fill(file, info.start, memoryview(bytearray(info.size)))


def test_no_weights_are_mapped_while_a_model_is_loaded_or_probed(broken: Path) -> None:
    """In a process of its own: what is mapped is in its maps, and the demo's file is in no other test's."""
    code = (
        "import sys, torch\n"
        "from qwen_precision.model import Models, WeightStore, WeightCheck, build, open_checkpoint\n"
        "from pathlib import Path\n"
        "checkpoint = open_checkpoint(Path(sys.argv[1]), 'model')\n"
        "model = build(checkpoint.config, None)\n"
        "store = WeightStore(checkpoint, model, torch.device('cpu'), True, WeightCheck([]))\n"
        "held = [store.tensor(name) for name, _ in model.named_parameters()]\n"
        "loaded = Models(checkpoint, torch.device('cpu'), None).get('bf16')\n"
        "print('model.safetensors' in Path('/proc/self/maps').read_text())\n"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("this system has no /proc")
    done = subprocess.run([sys.executable, "-c", code, str(broken)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def _header(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    "edit",
    [
        lambda h: h[DOWN].update(data_offsets=[-8, h[DOWN]["data_offsets"][1]]),
        lambda h: h[DOWN].update(data_offsets=h[DOWN]["data_offsets"][::-1]),
        lambda h: h[DOWN].update(data_offsets=[0, 10**30]),
        lambda h: h[DOWN].update(data_offsets=[0.0, 8.0]),
        lambda h: h[DOWN].update(data_offsets=[0]),
        lambda h: h[DOWN].update(data_offsets=[0, h[DOWN]["data_offsets"][1] - h[DOWN]["data_offsets"][0]]),
        lambda h: h[DOWN]["data_offsets"].__setitem__(1, h[DOWN]["data_offsets"][1] - 4),
        lambda h: h[DOWN].update(shape=[2**63, 2]),
        lambda h: h[DOWN].update(shape=[2**62, 2**62]),
        lambda h: h[DOWN].update(shape=[-96, -256]),
        lambda h: h[DOWN].update(shape=[96.0, 256]),
        lambda h: h[DOWN].update(shape=[True, 256]),
        lambda h: h[DOWN].update(shape=None),
        lambda h: h[DOWN].update(dtype="F32"),
        lambda h: h.update({DOWN: []}),
        lambda h: h.pop(DOWN),
    ],
)
@pytest.mark.parametrize("command", ["probe", "generate"])
def test_a_header_that_cannot_be_true_is_found_before_anything_is_read(
    command: str, edit: Callable[[dict[str, Any]], Any], broken: Path, capsys: Capture
) -> None:
    _header(broken / "model.safetensors", edit)
    assert main([*COMMANDS[command], "-o", "run.json"]) == 3
    told = capsys.readouterr()
    assert told.out == "" and not Path("run.json").exists()
    assert len(told.err.splitlines()) == 1 and "model.safetensors: " in told.err and "download it again" in told.err
