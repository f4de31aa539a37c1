"""A GGUF file is read as transformers converts it, bit by bit, and run like any other checkpoint."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_precision.cli.app import main
from qwen_precision.judge.checks import judge
from qwen_precision.model import gguffile, ggufmodel
from qwen_precision.model.folder import open_checkpoint
from qwen_precision.model.weights import read_tensor
from qwen_precision.record.run import Run
from qwen_precision.torch_dtypes import torch_dtype
from support.gguffiles import FAMILIES, HEADS, LAYERS, SIZE, WIDTH, tiny, write_gguf
from support.plants import down_proj_output
from support.runs import errors, run_probe, sentence

Capture = pytest.CaptureFixture[str]

pytestmark = [pytest.mark.usefixtures("scratch"), pytest.mark.transformers]

TEXT = "the capital of France is"
KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q5_1]


def logits(path: Path | str, **settings: Any) -> tuple[Run, dict[str, torch.Tensor]]:
    """A probe of fp32 and fp16, and what it computed."""
    found: dict[str, torch.Tensor] = {}

    def keep(dtype: str, prompt: int, states: torch.Tensor, answer: torch.Tensor | None) -> None:
        assert answer is not None
        found[dtype] = answer

    return run_probe(path, [TEXT], dtypes=["fp32", "fp16"], on_final=keep, **settings), found


def plain(path: Path, dtype: str) -> torch.Tensor:
    """The logits of transformers' own conversion."""
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch_dtype(dtype)).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)(TEXT).input_ids])
    with torch.inference_mode():
        answer: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return answer


def columns(run: Run) -> dict[Any, Any]:
    """The largest magnitude of every operation."""
    sites = [(site.module, site.op, site.call) for site in run.sites]
    return {(each.dtype, sites[n]): value for each in run.passes for n, value in enumerate(each.abs_max)}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_gives_the_logits_that_transformers_conversion_gives(family: str, kind: Kind, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", family, kind, tied=kind is Kind.Q4_0)
    run, found = logits(path)
    assert run.stopped is None and judge(run).verdict == {"fp32": "ok", "fp16": "ok"}
    for dtype in ("fp32", "fp16"):
        assert torch.equal(found[dtype], plain(path, dtype)), dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_holds_the_numbers_of_the_model_that_it_was_written_from(family: str, tmp_path: Path) -> None:
    width = WIDTH[family] // 2 if family == "qwen3" else WIDTH[family]
    path = write_gguf(tmp_path / "model.gguf", family, Kind.F32, width=width)
    opened, model = open_checkpoint(path, "model"), tiny(family, family == "gemma3", width)
    for name, parameter in model.named_parameters():
        # Gemma's norms are kept plus one, which rounds.
        off = 2e-7 if family == "gemma3" and "norm" in name else 0.0
        assert torch.allclose(read_tensor(opened, name), parameter, rtol=0, atol=off), name


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BEFORE = 32
"""The context that a stretched model was trained for."""


def _divisors(writer: Any) -> None:
    """Llama 3's stretching as llama.cpp's converter writes it out: LlamaModel.generate_extra_tensors."""
    waves = 2 * np.pi * 10000.0 ** (np.arange(0, WIDTH["llama"], 2) / WIDTH["llama"])
    smooth = (BEFORE / waves - 1.0) / (4.0 - 1.0)
    found = np.where(waves < BEFORE / 4, 1.0, np.where(waves > BEFORE, 8.0, 1 / ((1 - smooth) / 8 + smooth)))
    writer.add_tensor("rope_freqs.weight", found.astype(np.float32))
    writer.add_rope_dimension_count(WIDTH["llama"])


def _by_keys(kind: gguf.RopeScalingType) -> Callable[[Any], None]:
    def alter(writer: Any) -> None:
        writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(BEFORE)

    return alter


SHORT, LONG = np.linspace(1.0, 3.0, 8, dtype=np.float32), np.linspace(2.0, 30.0, 8, dtype=np.float32)


def _factors(writer: Any) -> None:
    """Phi-3's way."""
    writer.add_tensor("rope_factors_short.weight", SHORT)
    writer.add_tensor("rope_factors_long.weight", LONG)
    writer.add_rope_dimension_count(WIDTH["llama"])
    writer.add_rope_scaling_orig_ctx_len(BEFORE)
    writer.add_rope_scaling_attn_factors(1.25)


LONGROPE = {"rope_type": "longrope", "short_factor": SHORT.tolist(), "long_factor": LONG.tolist()}


@pytest.mark.parametrize(
    ("family", "alter", "scaling"),
    [
        ("llama", _factors, {**LONGROPE, "original_max_position_embeddings": BEFORE, "attention_factor": 1.25}),
        ("llama", _divisors, {**LLAMA3, "original_max_position_embeddings": BEFORE}),
        ("llama", _by_keys(gguf.RopeScalingType.LINEAR), {"rope_type": "linear", "factor": 4.0}),
        (
            "qwen2",
            _by_keys(gguf.RopeScalingType.YARN),
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": BEFORE},
        ),
    ],
    ids=["longrope", "llama 3", "linear", "yarn"],
)
def test_a_rotary_embedding_that_is_stretched_is_run_so(
    family: str, alter: Callable[[Any], None], scaling: dict[str, Any], tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "model.gguf", family, Kind.F32, alter=alter)
    opened = open_checkpoint(path, "model")
    ids = torch.tensor([opened.tokenizer(TEXT).input_ids])
    with torch.inference_mode():
        model, other = (
            tiny(family, False, WIDTH[family], **more)(input_ids=ids, use_cache=False).logits
            for more in ({"rope_scaling": scaling}, {})
        )
    found = logits(path)[1]["fp32"]
    # Divisors of float32 stand for what Llama 3 computes: a frequency may be off by its last bit.
    assert torch.allclose(found, model, rtol=1e-4, atol=1e-5) and not torch.allclose(found, other, rtol=1e-2, atol=1e-3)
    assert not any(note.what == "tensors not used" for note in opened.notes)


@pytest.mark.parametrize(("largest", "scale"), [(62, 32), (LAYERS, SIZE // HEADS)], ids=["most", "27B"])
def test_gemma_s_scores_are_scaled_as_llama_cpp_scales_them(
    largest: int, scale: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ggufmodel._LARGEST, "gemma3", largest)
    path = write_gguf(tmp_path / "model.gguf", "gemma3", Kind.F32, width=32)
    ids = torch.tensor([open_checkpoint(path, "model").tokenizer(TEXT).input_ids])
    with torch.inference_mode():
        expected = tiny("gemma3", True, 32, query_pre_attn_scalar=scale)(input_ids=ids, use_cache=False).logits
    assert torch.equal(logits(path)[1]["fp32"], expected)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q4_0], ids=lambda kind: kind.name)
def test_streamed_a_gguf_gives_what_it_gives_resident(family: str, kind: Kind, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", family, kind, tied=True)
    resident, streamed = (run_probe(path, [TEXT], memory=memory) for memory in ("resident", "streamed"))
    assert columns(resident) == columns(streamed) and len(columns(resident)) > 0
    assert [each.top1 for each in resident.passes] == [each.top1 for each in streamed.passes]
    assert resident.weight_totals == streamed.weight_totals


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_0], ids=lambda kind: kind.name)
def test_an_overflow_planted_into_a_gguf_is_named(kind: Kind, tmp_path: Path) -> None:
    report = judge(run_probe(write_gguf(tmp_path / "model.gguf", kind=kind, edit=down_proj_output), [TEXT]))
    (first,) = errors(report)
    assert report.verdict["fp16"] == "fail" and report.verdict["fp32"] == "ok"
    assert (first.kind, first.place.module, first.place.channel) == ("overflow", "model.layers.1.mlp.down_proj", 9)


def test_an_overflow_planted_into_a_gguf_that_runs_whole_is_named(tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        for part in (model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj):
            part.weight.mul_(1000)

    report = judge(run_probe(write_gguf(tmp_path / "model.gguf", "gemma3", edit=plant), [TEXT]))
    (first,) = errors(report)
    assert report.verdict["fp16"] == "fail" and first.kind == "overflow"
    assert first.place.module == "model.layers.1.mlp", first.place


def test_the_report_says_what_weights_and_activations_are(tmp_path: Path, capsys: Capture) -> None:
    write_gguf(tmp_path / "a-Q4_0.gguf", kind=Kind.Q4_0)
    for command in (["probe"], ["generate", "--max-new-tokens", "3", "--raw"]):
        assert main([command[0], "./a-Q4_0.gguf", "--prompt", TEXT, "--dtype", "bf16", "--full", *command[1:]]) == 0
        told = " ".join(capsys.readouterr().out.split())
        assert "weights dequantised from GGUF Q4_0 (each to float32 once" in told and "activations run in" in told


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_continues_a_gguf_as_transformers_does(family: str, tmp_path: Path, capsys: Capture) -> None:
    path = write_gguf(tmp_path / "model.gguf", family)
    flags = ["--prompt", TEXT, "--dtype", "fp16", "--raw", "--max-new-tokens", "6", "--greedy", "-o", "run.json"]
    assert main(["generate", "./model.gguf", *flags]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float16).eval()
    given = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)(TEXT, return_tensors="pt")
    out = model.generate(**given, max_new_tokens=6, do_sample=False, pad_token_id=0)
    generation = Run.model_validate_json((tmp_path / "run.json").read_text()).generation
    assert generation is not None
    assert generation.rows[0].ids == out[0, given["input_ids"].shape[1] :].tolist()


def test_a_folder_with_one_gguf_is_that_model_and_one_with_several_is_refused_by_name(
    tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_gguf(folder / "a.gguf")
    assert main(["probe", "./model", "--prompt", TEXT, "--dtype", "bf16"]) == 0
    capsys.readouterr()
    write_gguf(folder / "b.gguf")
    assert main(["probe", "./model", "--prompt", TEXT]) == 3
    assert "holds 2 GGUF files (a.gguf, b.gguf)" in sentence(capsys)


def test_safetensors_beside_a_gguf_are_what_is_read(broken: Path) -> None:
    write_gguf(broken / "other.gguf", "llama")
    assert open_checkpoint(broken, "model").gguf is None


def split(path: Path) -> list[Path]:
    """The file in two, as llama-gguf-split writes them: the keys in the first, half of the tensors in each."""

    reader = gguf.GGUFReader(path)
    names = [path.with_name(f"model-0000{part}-of-00002.gguf") for part in (1, 2)]
    for part, name in enumerate(names):
        writer = gguf.GGUFWriter(name, "qwen3")
        for field in reader.fields.values() if part == 0 else ():
            if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                value = field.contents()
                sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, value, field.types[0], sub)
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", 2)
        for tensor in reader.tensors[part::2]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return names


def test_a_split_gguf_is_the_model_that_was_split_and_a_missing_part_is_named(tmp_path: Path, capsys: Capture) -> None:
    whole = write_gguf(tmp_path / "whole.gguf")
    parts = split(whole)
    for given in parts:
        assert torch.equal(logits(given)[1]["fp16"], logits(whole)[1]["fp16"])
    whole.unlink()
    assert open_checkpoint(tmp_path, "model").gguf == parts[0].name  # the parts are one model
    parts[1].rename(tmp_path / "elsewhere")
    assert main(["probe", f"./{parts[0].name}", "--prompt", TEXT]) == 3
    assert f"{parts[1].name}: this part of {parts[0].name} is missing" in sentence(capsys)
    parts[0].rename(tmp_path / "first.gguf")
    assert main(["probe", "./first.gguf", "--prompt", TEXT]) == 3
    assert "is one of 2 parts" in sentence(capsys)


def test_a_gguf_without_the_library_says_what_to_install(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "model.gguf")
    monkeypatch.setattr(gguffile.importlib.util, "find_spec", lambda name: None)
    assert main(["probe", "./model.gguf", "--prompt", TEXT]) == 3
    assert 'pip install "gguf' in sentence(capsys)


def number(path: Path, key: str, size: str, value: int, behind: int = 4) -> None:
    """Overwrite an integer that stands ``behind`` bytes after a key (its type comes first)."""
    data = bytearray(path.read_bytes())
    at = data.index(key.encode()) + len(key) + behind
    struct.pack_into(size, data, at, value)
    path.write_bytes(data)


HOSTILE = {
    "another magic": lambda path: path.write_bytes(b"GGUM" + path.read_bytes()[4:]),
    "a pickle": lambda path: path.write_bytes(b"\x80\x04." * 9),
    "nothing": lambda path: path.write_bytes(b""),
    "version 1": lambda path: path.write_bytes(b"GGUF\x01" + path.read_bytes()[5:]),
    "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:900]),
    "cut in the weights": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "a billion tensors": lambda path: path.write_bytes(
        path.read_bytes()[:8] + struct.pack("<Q", 2**62) + path.read_bytes()[16:]
    ),
    "a billion keys": lambda path: path.write_bytes(
        path.read_bytes()[:16] + struct.pack("<Q", 2**62) + path.read_bytes()[24:]
    ),
    "a long string": lambda path: number(path, "general.name", "<Q", 2**63),
    "a long array": lambda path: number(path, "tokenizer.ggml.token_type", "<Q", 2**60, 8),
    "many layers": lambda path: number(path, "qwen3.block_count", "<I", 2**31),
    "a wide stream": lambda path: number(path, "qwen3.embedding_length", "<I", 2**31),
    "no heads": lambda path: number(path, "qwen3.attention.head_count", "<I", 0),
    "other heads": lambda path: number(path, "qwen3.attention.head_count", "<I", 7),
    "an unknown format": lambda path: number(path, "blk.0.attn_q.weight", "<I", 77, 20),
    "a tensor beyond the end": lambda path: number(path, "blk.0.attn_q.weight", "<Q", 2**50, 24),
    "a large tensor": lambda path: number(path, "blk.0.attn_q.weight", "<Q", 2**40, 4),
    "another shape": lambda path: number(path, "blk.0.attn_q.weight", "<Q", 64, 12),
    "an unknown family": lambda path: path.write_bytes(path.read_bytes().replace(b"qwen3", b"qwen9")),
    "no vocabulary": lambda path: path.write_bytes(path.read_bytes().replace(b"ggml.tokens", b"ggml.takens")),
}


@pytest.mark.parametrize("verb", ["probe", "generate"])
@pytest.mark.parametrize("fault", HOSTILE)
def test_a_broken_or_hostile_gguf_gives_one_sentence(fault: str, verb: str, tmp_path: Path, capsys: Capture) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    HOSTILE[fault](path)
    assert main([verb, "./model.gguf", "--prompt", TEXT, "-o", "run.json"]) == 3
    assert "model.gguf" in sentence(capsys)


def test_cut_anywhere_in_its_header_a_gguf_gives_one_sentence(tmp_path: Path, capsys: Capture) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    data = path.read_bytes()
    for length in np.linspace(1, len(data) - 1, 60, dtype=int):
        path.write_bytes(data[:length])
        assert main(["probe", "./model.gguf", "--prompt", TEXT, "-o", "run.json"]) == 3
        assert "model.gguf" in sentence(capsys), length


def test_a_gguf_that_is_not_there_is_said_not_to_be(capsys: Capture) -> None:
    for name in ("none.gguf", "folder/none.gguf"):
        assert main(["probe", name]) == 3
        assert f"{name}: no such file" in sentence(capsys)


def test_a_tensor_that_becomes_no_parameter_is_said_not_to_be_used(tmp_path: Path, capsys: Capture) -> None:
    write_gguf(tmp_path / "model.gguf", alter=lambda w: w.add_tensor("rope_freqs.weight", np.ones(16, np.float32)))
    assert main(["probe", "./model.gguf", "--prompt", TEXT, "--dtype", "bf16", "--full"]) == 0
    assert "tensors not used rope_freqs.weight" in " ".join(capsys.readouterr().out.split())


def test_no_rescue_is_written_for_a_gguf(tmp_path: Path, capsys: Capture) -> None:
    write_gguf(tmp_path / "model.gguf", kind=Kind.F16, edit=down_proj_output)
    assert main(["probe", "./model.gguf", "--prompt", TEXT, "--rescue-to", "out"]) == 2
    assert "GGUF" in sentence(capsys) and not (tmp_path / "out").exists()


def test_a_layer_is_made_once_for_all_dtypes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    made: list[int] = []
    real = gguf.dequantize
    monkeypatch.setattr(gguf, "dequantize", lambda data, kind: made.append(data.size) or real(data, kind))
    path = write_gguf(tmp_path / "model.gguf", kind=Kind.Q4_0)
    read = sum(info.size for info in open_checkpoint(path, "model").tensors.values() if info.packed is not None)
    made.clear()
    run_probe(path, [TEXT], dtypes=["fp32", "fp16", "bf16"], memory="resident")
    assert sum(size for size in made if size > 100) == read
