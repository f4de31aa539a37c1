"""Tiny checkpoints with known faults, and expected outputs that can be written anew."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

DEMO = Path(__file__).parent.parent / "qwen_precision" / "demo"
GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write expected outputs anew; read the diff")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare text with a file; a missing file is a failure."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{path} is missing: run pytest --update-golden and read it"
        assert text == path.read_text(encoding="utf-8")

    return compare


def make_checkpoint(
    folder: Path,
    *,
    moe: bool = False,
    tied: bool = False,
    dtype: str = "bfloat16",
    edit: Callable[[Any], None] | None = None,
    shard: str | None = None,
    **config: Any,
) -> Path:
    """A seeded tiny Qwen3 with the demo's tokenizer.

    Args:
        edit: called with the fp32 model before it is cast and saved: where faults are planted.
        shard: safetensors shard size, for checkpoints of several files.
    """
    import torch
    import transformers
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    common = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        **config,
    }
    if moe:
        experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**experts, **common))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**common))
    if edit is not None:
        with torch.no_grad():
            edit(model)
    # Saved in fp32 first where the values must survive: a weight of 70,000 is finite in bf16 and fp32.
    model.to(getattr(torch, dtype)).save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, folder / name)
    return folder


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs in a folder of its own, at the default width."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A copy of the demo to break."""
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr; stdout must be empty."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert len(lines) == 1 and "Traceback" not in captured.err, captured.err
    return lines[0]


@pytest.fixture(scope="session")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("healthy"))


@pytest.fixture(scope="session")
def healthy_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def healthy_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("moe"), moe=True)


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The demo, probed once."""
    return run_probe("demo")


def run_probe(source: str | Path, texts: list[str] | None = None, file: str | None = None, **settings: Any) -> Any:
    from qwen_precision.probe.run import probe
    from qwen_precision.settings.config import load_settings
    from qwen_precision.settings.prompts import read_prompts

    on_final = settings.pop("on_final", None)
    return probe(str(source), load_settings(None, settings), read_prompts(texts or [], file), on_final=on_final)


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
