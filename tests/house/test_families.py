"""configs/families.md: which families run how, and what of each is not said."""

import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from qwen_precision.model.lanes import cache_argument
from qwen_precision.model.way import LAYERWISE
from support.checkpoints import ROOT
from support.families import FAMILIES, OWN_CACHE, SKIPPED, WRAPPERS, config_for, tiny_config

PATH = ROOT / "configs" / "families.md"
HEAD = """# Model families

By `model_type` of config.json, of transformers {version}. Written from the tests' own table (`make golden`); of each
family that is not in the last rows, `tests/probe/test_families.py` makes a tiny checkpoint and demands logits bit-equal
to transformers' own in fp32 and fp16, no finding on a healthy one, and a planted overflow named.

Of a model that runs whole no rescue is planned, a row that has gone bad stays so in that dtype (what overflows behind
it is told from fp32 alone), and `--memory streamed` is refused. `qprec generate` is tested with few of them
(`tests/generate/test_families.py`); those that it refuses are marked.

| families | how they run | what is not said |
|---|---|---|
"""
NO_CACHE = "`qprec generate` refuses them: no key-value cache, or one of a kind of their own"
TURNED = "quantised weights are refused: matrices lie turned (Conv1D)"


def limits(name: str) -> str:
    """What is not done of a family that runs whole, beside what is not done of any."""
    made = getattr(transformers, FAMILIES[name])
    cached = cache_argument(made) is not None and name not in OWN_CACHE
    found = [] if cached else [NO_CACHE]
    if "Conv1D" in vars(sys.modules[made.__module__]) and has_conv1d(name):
        found.append(TURNED)
    return "; ".join(found) or "—"


def has_conv1d(name: str) -> bool:
    made = getattr(transformers, FAMILIES[name])
    with torch.device("meta"):
        model = made(config_for(made, tiny_config(name)))
    return any(type(module).__name__ == "Conv1D" for module in model.modules())


def listing() -> str:
    """The file: a row for all families of which the same is to be said."""
    rows: dict[tuple[str, str], list[str]] = defaultdict(list)
    rows["layer by layer", "—"] = sorted(LAYERWISE)
    for name in sorted(FAMILIES.keys() - LAYERWISE - SKIPPED.keys()):
        rows["whole", limits(name)].append(name)
    rows["whole", "tested besides, by class"] = sorted(
        name for name, kind in WRAPPERS.items() if kind in CONFIG_MAPPING and not name.startswith("Qwen3Model")
    )
    for name, reason in sorted(SKIPPED.items()):
        if name in FAMILIES:
            rows["not tested", reason].append(name)
    return HEAD.format(version=transformers.__version__) + "".join(
        f"| {', '.join(f'`{name}`' for name in names)} | {way} | {limit} |\n" for (way, limit), names in rows.items()
    )


def test_the_list_of_families_is_the_one_that_the_tests_probe(request: pytest.FixtureRequest) -> None:
    wanted = listing()
    if request.config.getoption("--update-golden"):
        PATH.write_text(wanted, encoding="utf-8")
    assert PATH.read_text(encoding="utf-8") == wanted, "run `make golden` and read the diff of configs/families.md"


def test_every_family_is_in_the_list_once() -> None:
    text = Path(PATH).read_text(encoding="utf-8")
    assert [name for name in FAMILIES if text.count(f"`{name}`") != 1] == []
