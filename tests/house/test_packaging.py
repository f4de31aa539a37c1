"""A wheel built from the tree carries the demo and the profiles, and works from any folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support.checkpoints import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files in a folder of their own, beside this environment's dependencies."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = out.glob("qprec-*.whl")
    zipfile.ZipFile(wheel).extractall(out / "site")
    return out / "site"


def test_the_wheel_holds_the_demo_the_profiles_and_the_licence(installed: Path) -> None:
    names = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert "qwen_precision/demo/model.safetensors" in names and "qwen_precision/demo/tokenizer.json" in names
    assert {"qwen_precision/configs/default.yaml", "qwen_precision/configs/prompts/default.yaml"} <= names
    assert "qwen_precision/configs/engines/vllm.yaml" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "qwen_precision/py.typed" in names  # else no type checker looks at our annotations
    assert not [name for name in names if name.startswith("tests")]


def test_the_installed_program_probes_the_demo_from_any_folder(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    where = subprocess.run(
        [sys.executable, "-c", "import qwen_precision; print(qwen_precision.__file__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert str(installed) in where
    done = subprocess.run(
        [sys.executable, "-m", "qwen_precision", "probe", "demo", "--config", "default", "--dtype", "fp16"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "layer 3, down_proj output" in done.stdout
    assert (tmp_path / "qprec-run.json").is_file()


def test_the_demo_is_small_and_holds_no_code() -> None:
    demo = ROOT / "qwen_precision" / "demo"
    assert sum(path.stat().st_size for path in demo.iterdir()) < 2_000_000
    assert {path.suffix for path in demo.iterdir()} == {".json", ".jinja", ".safetensors"}
