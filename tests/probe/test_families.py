"""Every causal language model that transformers has: the same bits as its own forward, no false alarm, the plant named.

What cannot be made is listed with its reason in
``support.families``; what is made must be probed.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer

from qwen_precision.judge.checks import judge
from qwen_precision.judge.findings import Report
from qwen_precision.model.skeleton import model_class
from qwen_precision.model.way import LAYERWISE
from qwen_precision.torch_dtypes import torch_dtype
from support.families import FAMILIES, SKIPPED, WRAPPERS, make_family
from support.runs import errors, run_probe

pytestmark = pytest.mark.transformers

TEXTS = ["hello there, this is a test", "ab"]
NAMES = [*(name for name in FAMILIES if name not in SKIPPED), *(n for n, t in WRAPPERS.items() if t in CONFIG_MAPPING)]
AMPLIFYING = ("qwen4_exp", "qwen4_exp_text")
"""What multiplies the planted module's output by up to 2: of a token that is finite until then, that overflows too."""
Answers = dict[tuple[str, int], torch.Tensor]


def made(folder: Path, name: str, plant: bool) -> Any:
    if name in WRAPPERS:
        return make_family(folder, WRAPPERS[name], architecture=name, plant=plant)
    return make_family(folder, name, plant=plant)


def probed(folder: Path, dtypes: list[str]) -> tuple[Report, Answers]:
    answers: Answers = {}

    def keep(dtype: str, prompt: int, states: torch.Tensor, logits: torch.Tensor | None) -> None:
        answers[dtype, prompt] = states if logits is None else logits

    return judge(run_probe(folder, TEXTS, dtypes=dtypes, on_final=keep)), answers


def plain(folder: Path, dtype: str, text: str) -> torch.Tensor:
    """What transformers' own forward answers."""
    config = AutoConfig.from_pretrained(folder)
    model = model_class(config).from_pretrained(folder, dtype=torch_dtype(dtype)).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(text).input_ids])
    with torch.inference_mode():
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, return_dict=True)
    answer = getattr(out, "logits", None)
    return answer if answer is not None else out[0]


def test_at_least_a_hundred_families_are_probed() -> None:
    assert len(NAMES) >= 100 and LAYERWISE & set(CONFIG_MAPPING) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_healthy_family_gives_what_transformers_gives_and_no_finding(name: str, tmp_path: Path) -> None:
    folder = made(tmp_path / "model", name, plant=False).folder
    report, answers = probed(folder, ["fp32", "fp16"])
    assert report.stopped is None
    # A tiny random bias may well become zero in fp16, and random logits differ: that is true, and no alarm.
    found = [each for each in report.findings if each.kind not in ("underflow", "divergence", "advice")]
    assert not found, [(each.kind, each.dtype, each.place.module, each.place.name) for each in found]
    for dtype in ("fp32", "fp16"):
        assert torch.equal(answers[dtype, 0], plain(folder, dtype, TEXTS[0])), dtype


@pytest.mark.parametrize("name", NAMES)
def test_an_overflow_planted_into_a_family_is_named(name: str, tmp_path: Path) -> None:
    family = made(tmp_path / "model", name, plant=True)
    report, _ = probed(family.folder, ["fp32", "fp16"])
    found = errors(report)
    assert report.verdict["fp32"] in ("ok", "risk") and report.verdict["fp16"] == "fail"
    assert found and all(each.kind == "overflow" for each in found)
    # Where experts run in a loop, what two of them give may be in range, weighted, and their sum not.
    assert all(each.place.op == "index_add_" for each in found if each.predicted)
    places = [(each.place.module, each.place.name, each.place.expert) for each in found if not each.predicted]
    inside = [place for place in places if f".{family.planted}." in f".{place[0]}."]
    assert places[0] in inside and len(places) - len(inside) == (name in AMPLIFYING), places
    # One module is one place, run again or not; of experts every one that overflows is.
    assert len(set(inside)) == len(inside) and (len(inside) == 1 or "expert" in inside[0][0]), places
