"""``import qwen_precision`` is light, and shows what there is to call."""

import subprocess
import sys

import pytest


def told(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("program", ["", "dir(qwen_precision)", "help(qwen_precision)", "import qwen_precision.judge"])
def test_importing_and_looking_around_bring_no_torch(program: str) -> None:
    assert told(f"import qwen_precision, sys\n{program}\nprint('torch' in sys.modules)").endswith("False\n")


def test_what_can_be_called_is_seen_before_it_is_called() -> None:
    text = told("import qwen_precision; print(dir(qwen_precision)); help(qwen_precision)")
    assert "'probe_model'" in text and "'watch'" in text
    assert "watch(model: 'nn.Module')" in text and "probe_model(model: " in text
