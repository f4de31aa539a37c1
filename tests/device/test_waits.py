"""How often the host waits for the card: once a layer and dtype for all prompts together, once a step of a text."""

from collections import Counter
from pathlib import Path

import pytest

from qwen_precision.settings.prompts import PromptSpec
from support import generations, pretend
from support.checkpoints import make_checkpoint
from support.runs import explained

pytestmark = pytest.mark.device

DEVICE = pretend.devices()[:1]

BUDGET = {
    "a layer and dtype": 1,
    "a layer's weights": 1,  # by the reader, beside what computes
    "a step of a text": 1,
}
"""Waits of the host in a healthy run, whatever the number of prompts and rows."""

PROMPTS = [PromptSpec(name=name, text=text) for name, text in (("one", "The capital"), ("two", "abc"), ("three", "Z"))]


@pytest.fixture(autouse=True)
def _pretended(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--pretend"):
        pytest.skip("a real card does not tell")


def to_host(waits: list[pretend.Wait]) -> Counter[str]:
    """By file of ours."""
    return Counter(each.place.partition(":")[0] for each in waits if each.direction == "to host")


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("device", DEVICE)
def test_a_healthy_probe_waits_once_a_layer_and_dtype(device: str, memory: str, tmp_path: Path) -> None:
    found = []
    for layers in (2, 6):
        folder = make_checkpoint(tmp_path / str(layers), num_hidden_layers=layers)
        with pretend.counting() as waits:
            explained(folder, PROMPTS, device=device, memory=memory)
        ours = to_host(waits)
        found.append((ours.pop("model/upload.py", 0), sum(ours.values())))
    (few, fewer), (many, more) = found
    assert more - fewer <= 4 * 3 * BUDGET["a layer and dtype"], ours
    assert many - few <= 4 * BUDGET["a layer's weights"]


@pytest.mark.parametrize("device", DEVICE)
def test_more_prompts_make_no_layer_wait_more_often(device: str, tmp_path: Path) -> None:
    folder, found = make_checkpoint(tmp_path / "model"), []
    for prompts in (PROMPTS[:1], PROMPTS):
        with pretend.counting() as waits:
            explained(folder, prompts, device=device)
        found.append(to_host(waits)["watcher/readings.py"])
    # Logits of all prompts are too many to be held at once: the head alone is asked prompt by prompt.
    assert found[1] - found[0] <= 2 * 3


@pytest.mark.parametrize("device", DEVICE)
def test_a_healthy_text_waits_once_a_step(device: str, tmp_path: Path) -> None:
    folder, found = make_checkpoint(tmp_path / "model"), []
    for tokens in (4, 24):
        with pretend.counting() as waits:
            run = generations.run(folder, ["abc", "The capital"], device=device, dtype="fp16", max_new_tokens=tokens)
        assert not generations.trips_of(run)
        steps = max(map(len, generations.ids_of(run)))
        ours = to_host(waits)
        del ours["model/lanes.py"]  # transformers' own forward: it asks whether anything is padded
        found.append((sum(ours.values()), steps))
    (few, short), (many, long) = found
    assert long > short and many - few <= (long - short) * BUDGET["a step of a text"]
