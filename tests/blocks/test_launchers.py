"""Under the launchers that people have: torchrun on one machine and on two, Slurm's variables, the files to copy."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen_precision.blocks import Folder, reports
from qwen_precision.cli import main
from qwen_precision.record import joined
from qwen_precision.record.file import load
from support.checkpoints import ROOT
from support.folders import all_readings, measured, readings, records, write_texts

pytestmark = pytest.mark.usefixtures("scratch")

WORDS = ("--dtype", "fp16", "--no-explain", "--block", "1")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    """One in which the program is found by its name, as after an installation, and no launcher's variables are."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    program = programs / "qprec"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qwen_precision "$@"\n')
    program.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "RANK", "WORLD_SIZE"))}
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def probe(corpus: Path, model: str = "demo") -> list[str]:
    return ["-m", "qwen_precision", "probe", model, *WORDS, "--prompts", str(corpus), "-o", "runs/"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_texts(tmp_path)


@pytest.fixture
def alone(corpus: Path) -> dict[tuple[Any, ...], Any]:
    """What one process reads of all prompts."""
    main(["probe", "demo", *WORDS[:3], "--prompts", str(corpus), "-o", "one.json", "-q"])
    return readings(load(Path("one.json")))


def test_two_ranks_under_torchrun_read_what_one_process_does(
    corpus: Path, alone: dict[tuple[Any, ...], Any], tmp_path: Path
) -> None:
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *probe(corpus)]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"share {n} of 2 (RANK {n - 1} of 2): 3 blocks measured" in done.stderr for n in (1, 2))
    assert all_readings(Path("runs")) == alone


def test_two_ranks_read_a_moe_streamed_and_sweep_as_one_process_does(
    corpus: Path, healthy_moe: Path, tmp_path: Path
) -> None:
    more = ["--memory", "streamed", "--sweep", "first-token", "--sweep-limit", "32"]
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *probe(corpus), str(healthy_moe), *more]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for model in ("demo", str(healthy_moe)):
        main(["probe", model, *WORDS[:3], "--prompts", str(corpus), *more, "-o", "one.json", "-q"])
        one = load(Path("one.json"))
        assert all_readings(Path("runs"), model) == readings(one)
        both = joined([run for run in records(Path("runs"), model) if run.sweep is not None]).sweep
        assert both is not None and one.sweep is not None
        ours, theirs = (
            (each.tried, each.total, each.over, [(s.ids, s.name, s.channel) for s in each.worst])
            for each in (both, one.sweep)
        )
        assert ours == theirs
        # An expert's product has as many rows as tokens came to it, and their number decides how a kernel sums: 1e-5 is
        # more than fp32 loses over so few terms.
        sizes = [[float(s.magnitude) for s in each.worst] for each in (both, one.sweep)]
        assert sizes[0] == pytest.approx(sizes[1], rel=1e-5)


def test_two_nodes_of_torchrun_are_two_ranks(corpus: Path, alone: dict[tuple[Any, ...], Any], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    shared = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", place]
    nodes = [
        subprocess.Popen(
            [*TORCHRUN, *shared, "--rdzv-id", "7", "--local-addr", "127.0.0.1", *probe(corpus)],
            env=environment(tmp_path),
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    told = [node.communicate()[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told
    assert all_readings(Path("runs")) == alone


def test_jobs_launches_the_ranks_of_this_machine_and_shows_what_they_found(corpus: Path, tmp_path: Path) -> None:
    command = [sys.executable, *probe(corpus), "--jobs", "2"]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "fp16      FAIL   5 of 6 prompts fail" in done.stdout and len(records(Path("runs"))) == 6


def test_a_rank_that_is_killed_costs_its_block_and_the_same_command_finishes(corpus: Path, tmp_path: Path) -> None:
    """The parent says who died; nothing half is left; nothing that was there is measured again."""
    command = [sys.executable, *probe(corpus), "--jobs", "2"]
    parent = subprocess.Popen(command, env=environment(tmp_path), stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not (ready := Folder(Path("runs")).records() if Path("runs").is_dir() else []) and time.monotonic() < end:
        time.sleep(0.05)
    assert ready and parent.stderr is not None
    for rank in _ranks(parent.pid):
        os.kill(rank, signal.SIGKILL)
        break
    said = parent.stderr.read()
    code = parent.wait()
    there = {path: path.read_bytes() for path in Folder(Path("runs")).records()}
    assert code == 3 and "signal 9" in said, said
    assert subprocess.run(command, env=environment(tmp_path), capture_output=True).returncode == 1
    assert {path: path.read_bytes() for path in there} == there and len(records(Path("runs"))) == 6
    assert not [name for name in os.listdir("runs") if name.startswith(".qprec-partial")]


def _ranks(parent: int) -> Iterator[int]:
    """Processes of a launcher's launcher."""
    import psutil

    for child in psutil.Process(parent).children():
        yield from (rank.pid for rank in child.children() if "qwen_precision" in " ".join(rank.cmdline()))


MANY = 400  # blocks of a few tenths of a second: some are there when the first is, and never all


@pytest.mark.parametrize(
    ("numbers", "code", "said"),
    [
        ([signal.SIGTERM], 3, 2),
        ([signal.SIGINT, signal.SIGTERM], 3, 1),
        ([signal.SIGKILL], -signal.SIGKILL, 0),
    ],
)
def test_no_rank_outlives_the_command_and_one_process_alone_speaks_of_a_signal(
    numbers: list[signal.Signals], code: int, said: int, tmp_path: Path
) -> None:
    corpus = write_texts(tmp_path, [f"text {number}" for number in range(MANY)])
    command = [sys.executable, *probe(corpus), "--jobs", "2"]
    with subprocess.Popen(command, env=environment(tmp_path), stderr=subprocess.PIPE, text=True) as started:
        while started.poll() is None and not (Path("runs").is_dir() and Folder(Path("runs")).records()):
            time.sleep(0.02)
        for number in numbers:
            started.send_signal(number)
        _, told = started.communicate()  # it lasts as long as any process has the pipe
    assert started.returncode == code and told.count("interrupted") == said, told
    assert ("interrupted: finishing" in told) == bool(said) and "Traceback" not in told, told
    assert 0 < len(records(Path("runs"))) < MANY


def test_the_array_script_gives_every_task_its_share(corpus: Path, tmp_path: Path) -> None:
    script = ROOT / "configs" / "slurm" / "qprec.sbatch"
    assert re.findall(r"^#SBATCH --array=(\S+)", script.read_text(), flags=re.MULTILINE) == ["0-7"]
    job = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_CPUS_PER_TASK": "1"}
    array = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_MAX": "5"}
    for task in (4, 5):
        told = environment(tmp_path, **job, **array, SLURM_ARRAY_TASK_ID=str(task), PROMPTS=str(corpus), OUT="runs")
        done = subprocess.run(["bash", script, "demo", *WORDS], env=told, capture_output=True, text=True)
        assert done.returncode == 0 and "3 blocks measured" in done.stderr, done.stderr
    assert len(records(Path("runs"))) == 6


def test_the_workflow_of_a_matrix_measures_and_merges(corpus: Path, tmp_path: Path) -> None:
    jobs = yaml.safe_load((ROOT / "configs" / "ci" / "qprec-many.yml").read_text())["jobs"]
    shards = jobs["probe"]["strategy"]["matrix"]["shard"]
    (measure,) = [step for step in jobs["probe"]["steps"] if step.get("name") == "Probe"]
    (merge,) = [step for step in jobs["report"]["steps"] if step.get("name") == "Report"]
    assert measure["env"]["SHARD"] == f"${{{{ matrix.shard }}}}/{len(shards)}"
    told = environment(tmp_path, MODELS="demo", PROMPTS=str(corpus))
    for shard in shards[:1]:  # the others are the same command
        more = {**told, "SHARD": f"{shard}/{len(shards)}"}
        assert subprocess.run(["bash", "-ec", measure["run"]], env=more, capture_output=True).returncode == 0
    for shard in shards[1:]:
        words = ("demo", "--prompts", str(corpus), "--shard", f"{shard}/{len(shards)}")
        assert measured(Path("runs"), *words) == 0
    done = subprocess.run(["bash", "-ec", merge["run"]], env=told, capture_output=True, text=True)
    assert done.returncode == 1 and "::error" in done.stdout and "not seen" not in done.stdout
    assert Path("qprec.html").is_file() and Path("qprec.xml").is_file()
    (report,) = reports(Folder(Path("runs")))
    assert report.corpus is not None and report.corpus.missing_blocks == 0
