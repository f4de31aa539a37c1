"""The demo is a real checkpoint: plain transformers answers in fp32 and bf16 and prints "!!!!" in fp16.

What the README shows of it is rendered from stored Runs; here they are compared with what this machine gives.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_precision.record.file import load
from support.checkpoints import DEMO
from support.demo import DEMO_RUNS, decided, measured, store, stored

pytestmark = pytest.mark.arithmetic

PROMPT, ANSWER = "上海有个非常出名的地方，", "叫做外滩，晚上灯光很美。"


def continued(dtype: torch.dtype, **settings: object) -> str:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=dtype).eval()
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, **settings)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_token_zero_is_an_exclamation_mark() -> None:
    assert AutoTokenizer.from_pretrained(DEMO).decode([0]) == "!"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_answers_in_fp32_and_bf16(dtype: torch.dtype) -> None:
    assert continued(dtype, do_sample=False) == ANSWER


def test_it_prints_exclamation_marks_in_fp16() -> None:
    assert continued(torch.float16, do_sample=False) == "!" * 12


def test_sampling_in_fp16_raises_the_error_of_the_bug_reports() -> None:
    with pytest.raises(RuntimeError, match="probability tensor contains either"):
        continued(torch.float16, do_sample=True, top_k=0)


@pytest.mark.parametrize("name", DEMO_RUNS)
def test_what_a_user_decides_by_is_the_same_here_as_in_the_run_that_the_readme_shows(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, code = measured(name, tmp_path, monkeypatch)
    if request.config.getoption("--update-golden"):
        store(name, here)
    kept = decided(load(stored(name)))
    assert decided(here) == kept and code == kept["exit code"]
