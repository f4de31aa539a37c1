"""Disks that are really full or read-only: a sentence, the answer, the old file, and nothing beside it."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwen_precision.cli import main
from qwen_precision.files import unwritable
from qwen_precision.rescue import export

pytestmark = pytest.mark.usefixtures("scratch")

Capture = pytest.CaptureFixture[str]
PROBE = ["probe", "demo", "--dtype", "fp16", "--prompt", "hello", "--no-explain", "--fail-on", "never", "--force"]
OLD = b'{"schema":4}'
ROOT = Path(__file__).parent.parent.parent

COMMANDS = {
    "probe": [*PROBE, "-o", "disk/run.json"],
    "page": [*PROBE, "-o", "disk/run.html"],
    "generate": ["generate", "demo", "--max-new-tokens", "2", "--fail-on", "never", "--force", "-o", "disk/run.json"],
    "report": ["report", str(ROOT / "tests/fixtures/demo-probe.json"), "--force", "-o", "disk/run.html"],
    "picture": ["report", str(ROOT / "tests/fixtures/demo-probe.json"), "--force", "-o", "disk/run.png"],
    "bundle": ["report", str(ROOT / "tests/fixtures/demo-probe.json"), "--force", "-o", "disk/run.zip"],
}


def _mount(*words: str) -> bool:
    return subprocess.run(["mount", *words], capture_output=True, check=False).returncode == 0


Disk = Callable[[int], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Makes ``disk`` a file system of its own, of so many KiB, with an old file of every name in it."""
    place = tmp_path / "disk"
    place.mkdir()

    def make(kibibytes: int) -> Path:
        try:
            mounted = _mount("-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(place))
        except OSError:
            mounted = False
        if not mounted:
            pytest.skip("mounting a file system takes root")
        for suffix in (".json", ".html", ".png", ".zip"):
            (place / f"run{suffix}").write_bytes(OLD)
        return place

    yield make
    subprocess.run(["umount", str(place)], capture_output=True, check=False)


def same_as_before(place: Path, *more: str) -> bool:
    """Whether the old files are there, and nothing else but what is named."""
    old = all(path.read_bytes() == OLD for path in place.glob("run.*"))
    return old and sorted(os.listdir(place)) == sorted(["run.json", "run.html", "run.png", "run.zip", *more])


@pytest.mark.parametrize("name", COMMANDS)
def test_on_a_full_disk_the_old_file_stays(name: str, disk: Disk, capsys: Capture) -> None:
    place = disk(16)  # the old files fill it
    assert main(COMMANDS[name]) == 3
    told = capsys.readouterr()
    assert told.err.count("qprec: ") == 1 and "No space left on device" in told.err and "Traceback" not in told.err
    assert name in ("report", "picture", "bundle") or told.out.strip()
    assert same_as_before(place)


@pytest.mark.parametrize("name", ["probe", "page", "generate"])
def test_a_run_that_could_not_be_saved_is_in_no_command(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Found out when it was measured: the disk was fine before."""
    Path("disk").mkdir()
    before: list[object] = []

    def full(run: object, place: Path) -> None:
        before.append(place)
        raise unwritable(str(place), OSError(errno.ENOSPC, "No space left on device"))

    monkeypatch.setattr("qwen_precision.cli.outcome.write", full)
    assert main(COMMANDS[name]) == 3 and before
    page = Path("disk/run.html").read_text() if name == "page" else ""
    told = capsys.readouterr().out
    assert "FAIL" in told or "RISK" in told
    assert "disk/run.json" not in told and "disk/run.json" not in page


def test_where_no_new_file_can_be_made_nothing_is_measured(capsys: Capture) -> None:
    """Root may write in /proc, by its permissions, and no file can be made there."""
    if not os.access("/proc", os.W_OK):
        pytest.skip("takes root, and a /proc")
    for name in ("probe", "generate", "report"):
        assert main([*COMMANDS[name][:-1], "/proc/run.html"]) == 3
        told = capsys.readouterr()
        assert told.out == "" and told.err.count("\n") == 1 and "-o /proc/run" in told.err
        assert "cannot be written" in told.err


@pytest.mark.parametrize("name", COMMANDS)
def test_on_a_read_only_disk_it_is_said_before_anything_is_measured(name: str, disk: Disk, capsys: Capture) -> None:
    place = disk(4000)
    assert _mount("-o", "remount,ro", str(place))
    assert main(COMMANDS[name]) == 3
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("qprec: -o disk/run") == 1 and "cannot be written" in told.err
    assert same_as_before(place)


RESCUE = [*PROBE, "-o", "run.json", "--rescue-to", "disk/safe"]


@pytest.mark.parametrize("foreseen", [True, False])
def test_an_export_that_has_no_room_leaves_nothing_and_the_run_is_saved(
    foreseen: bool, disk: Disk, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    if not foreseen:  # somebody else fills the disk while it is written
        monkeypatch.setattr(export, "_SPARE", -(10**9))
    place = disk(300)
    assert main(RESCUE) == 3
    told = capsys.readouterr()
    assert ("MiB are needed" if foreseen else "No space left on device") in told.out + told.err
    assert "Traceback" not in told.err and "bug" not in told.err
    assert same_as_before(place) and Path("run.json").stat().st_size > 1000


def test_an_export_that_has_no_room_leaves_the_one_before_it(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(export, "_SPARE", -(10**9))
    place = disk(2400)  # room for one
    assert main(RESCUE) == 0
    before = {path.name: path.read_bytes() for path in (place / "safe").iterdir()}
    assert main(RESCUE) == 3
    assert {path.name: path.read_bytes() for path in (place / "safe").iterdir()} == before
    assert same_as_before(place, "safe")


def test_an_export_into_a_read_only_folder_is_refused_at_once(disk: Disk, capsys: Capture) -> None:
    place = disk(4000)
    assert _mount("-o", "remount,ro", str(place))
    assert main(RESCUE) == 3
    told = capsys.readouterr()
    assert told.out == "" and "disk/safe: cannot be written" in told.err and "; choose another place." in told.err
    assert same_as_before(place) and not Path("run.json").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_that_may_not_grow_so_large_is_a_sentence_and_the_old_one_stays(name: str) -> None:
    """No mounting is needed for this one."""
    Path("disk").mkdir()
    for suffix in (".json", ".html", ".png", ".zip"):
        Path(f"disk/run{suffix}").write_bytes(OLD)
    words = ["bash", "-c", 'ulimit -f 1; exec "$@"', "-", sys.executable, "-m", "qwen_precision", *COMMANDS[name]]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 3 and "File too large" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert same_as_before(Path("disk"))
