"""How long a prompt may be: what a config says of positions, and of rotary embeddings that are stretched."""

from pathlib import Path
from typing import Any

import pytest

from qwen_precision.cli import main
from qwen_precision.model import open_checkpoint
from support.checkpoints import edit_json

pytestmark = pytest.mark.usefixtures("scratch")

YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.transformers
@pytest.mark.parametrize(
    ("told", "tokens"),
    [
        ({}, 512),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 512}}, 2048),
        ({"rope_scaling": YARN}, 2048),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 128}}, 512),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.5}}, 1280),
    ],
    ids=["plain", "yarn", "yarn, of the positions named", "yarn, stretched already", "linear"],
)
def test_the_context_is_what_rotary_embeddings_are_stretched_to(
    told: dict[str, Any], tokens: int, broken: Path
) -> None:
    edit_json(broken / "config.json", **told)
    assert open_checkpoint(broken, "model").context == tokens


def test_a_prompt_between_the_two_is_probed(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["probe", "model", "--dtype", "fp16", "--prompt", "word " * 600, "--no-explain", "-o", "run.json"]
    assert main(words) == 2 and "the model's context is 512" in capsys.readouterr().err
    edit_json(broken / "config.json", rope_scaling=YARN)
    assert main(words) == 1
