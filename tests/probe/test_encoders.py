"""Models that read with an encoder: positions that skip padding by themselves, a decoder that is given the prompt."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qwen_precision.cli.app import main
from qwen_precision.judge.checks import judge
from qwen_precision.qwen3 import layer_of
from support.families import make_family
from support.plants import ids_of
from support.runs import errors, run_probe

pytestmark = pytest.mark.transformers

TEXTS = ["hello there, this is a test", "ab"]
Answers = dict[int, torch.Tensor]


def encoder(folder: Path, made: str, answers_with: str = "Model") -> Path:
    """RoBERTa or BERT: the first counts positions from the padding's id, which is the tokenizer's here."""
    made_of: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 640,
        "initializer_range": 0.25,
        "pad_token_id": ids_of("<|endoftext|>")[0],
    }
    return saved(folder, getattr(transformers, made + answers_with)(getattr(transformers, f"{made}Config")(**made_of)))


def t5(folder: Path, loud: bool = False) -> Path:
    """T5, perhaps with a q of its decoder's second layer that is too large for fp16."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_heads": 4}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    if loud:
        with torch.no_grad():
            model.decoder.block[1].layer[0].SelfAttention.q.weight.mul_(1e7)
    return saved(folder, model)


def saved(folder: Path, model: Any) -> Path:
    other = make_family(folder, "qwen3").folder  # for its tokenizer
    (other / "model.safetensors").unlink()
    model.to(torch.float32).save_pretrained(folder)
    return folder


def answers(folder: Path, texts: list[str], batch: bool) -> Answers:
    found: Answers = {}

    def keep(dtype: str, prompt: int, states: torch.Tensor, logits: torch.Tensor | None) -> None:
        found[prompt] = (states if logits is None else logits).clone()

    path = folder.parent / "prompts.yaml"
    path.write_text(f"- {{name: two, batch: {texts}}}\n")
    assert run_probe(folder, [] if batch else texts, str(path) if batch else None, dtypes=["fp32"], on_final=keep)
    return found


@pytest.mark.parametrize("made", ["XLMRoberta", "Roberta", "Bert"])
def test_beside_padding_a_row_of_an_encoder_is_what_it_is_alone(made: str, tmp_path: Path) -> None:
    folder = encoder(tmp_path / "model", made)
    together, alone = answers(folder, TEXTS, batch=True)[0], answers(folder, TEXTS, batch=False)
    for row, single in alone.items():
        # Sums over padding that counts for nothing are rounded elsewhere; another position moves it by its own size.
        assert torch.allclose(together[row, -single.shape[1] :], single[0], atol=1e-4, rtol=1e-4)


def test_a_classifier_that_reads_its_first_token_says_that_it_is_padding_in_short_rows(tmp_path: Path) -> None:
    folders = {
        "Bert": encoder(tmp_path / "bert", "Bert", "ForSequenceClassification"),
        "Qwen3": make_family(tmp_path / "qwen3", "qwen3", architecture="Qwen3ForSequenceClassification").folder,
    }
    (tmp_path / "prompts.yaml").write_text(f"- {{name: two, batch: {TEXTS}}}\n")
    runs = {
        made: run_probe(each, file=str(tmp_path / "prompts.yaml"), dtypes=["fp32"]) for made, each in folders.items()
    }
    notes = {made: [each.value for each in run.choices if each.what == "padding"] for made, run in runs.items()}
    assert notes == {"Bert": ["on the left"], "Qwen3": []}


def test_an_encoder_with_a_decoder_is_given_the_prompt_for_both(tmp_path: Path, capsys: Any) -> None:
    folder = t5(tmp_path / "model")
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    ids = torch.tensor([ids_of("ab")])
    with torch.inference_mode():
        plain = model(input_ids=ids, labels=ids).logits
    assert torch.equal(answers(folder, ["ab"], batch=False)[0], plain)
    assert main(["probe", str(folder), "--prompt", "ab", "--full", "-o", str(tmp_path / "run.json")]) == 0
    assert "decoder reads the prompt too (" in " ".join(capsys.readouterr().out.split())
    assert main(["generate", str(folder), "--prompt", "ab"]) == 3
    assert "an encoder for the prompt" in capsys.readouterr().err


def test_a_layer_whose_parts_are_numbered_again_is_named_by_its_own_number(tmp_path: Path) -> None:
    assert layer_of("decoder.block.1.layer.2.DenseReluDense.wi") == 1
    first = errors(judge(run_probe(t5(tmp_path / "model", loud=True), ["ab"], dtypes=["fp16"])))[0]
    assert (first.place.module, first.place.layer) == ("decoder.block.1.layer.0.SelfAttention.q", 1)
