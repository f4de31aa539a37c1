"""What is run after a probe is computed as the probe was: sequences of a sweep, and a step that is made again."""

from pathlib import Path

import pytest
import torch

from qwen_precision.diagnose.replays import run_replays
from qwen_precision.diagnose.walk import walker
from qwen_precision.judge import Candidate
from qwen_precision.probe import job_for, measure, prepare
from qwen_precision.progress import silent
from qwen_precision.record import Explanation, FailedStep
from qwen_precision.settings import PromptSpec, load_settings
from support.checkpoints import make_checkpoint
from support.plants import half_a_sum

pytestmark = pytest.mark.arithmetic

SPECS = [PromptSpec(name="p", text="abc")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), edit=half_a_sum)


@pytest.mark.parametrize("arithmetic", ["native", "tensor-core", "fp16-accumulate"])
def test_a_sequence_goes_through_the_model_in_the_arithmetic_of_the_run(folder: Path, arithmetic: str) -> None:
    job = prepare(str(folder), load_settings(None, {"arithmetic": arithmetic}), SPECS)
    measure(job)
    peaks = walker(job, "fp16").peaks(torch.tensor([[3], [4]]), "fp16")
    assert bool(torch.isinf(peaks.value).all()) == (arithmetic == "fp16-accumulate")


@pytest.mark.parametrize("what", ["as generated", "without cache"])
@pytest.mark.parametrize("arithmetic", ["native", "tensor-core", "fp16-accumulate"])
def test_a_step_is_made_again_in_the_arithmetic_of_the_run(folder: Path, arithmetic: str, what: str) -> None:
    settings = load_settings(None, {"arithmetic": arithmetic, "memory": "resident"})
    first = prepare(str(folder), settings, SPECS)
    failed = FailedStep(dtype="fp16", step=1, rows=[0], chunk=0)
    prompts = [prompt.model_copy(update={"failed": failed}) for prompt in first.prompts]
    job = job_for(first.checkpoint, str(folder), settings, prompts)
    made = Explanation(budget=10, controls=[], left_out=[], hashes={}, continuations=[])
    ids = tuple(prompts[0].rows[0].ids)
    run_replays(job, [Candidate(what, "fp16", "p", 0, ids, "")], made, silent)  # type: ignore[arg-type]
    assert made.left_out == []
    assert [each.clean for each in made.controls] == [arithmetic != "fp16-accumulate"]
