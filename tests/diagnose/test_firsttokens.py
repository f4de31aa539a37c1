"""A sweep over first tokens says of each token what plain transformers in fp16 does with it, wherever the fault is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_precision.diagnose.run import diagnose
from qwen_precision.judge.checks import judge
from qwen_precision.model import weights
from qwen_precision.record.run import Run
from qwen_precision.render.words import why
from qwen_precision.settings.config import load_settings
from qwen_precision.settings.prompts import PromptSpec
from support.builders import explained_run
from support.checkpoints import make_checkpoint
from support.plants import enough_of_them, expert_product, ids_of, one_channel
from support.rescues import load
from support.runs import run_probe

IDS = torch.arange(512)[:, None]
LIMIT = 65504.0


def swept(folder: Path, **settings: Any) -> Run:
    chosen = load_settings(None, {"explain": False, "sweep": "first-token", **settings})
    return diagnose(str(folder), chosen, [PromptSpec(name="plain", text="abc")]).run


def by_token(model: Any, module: torch.nn.Module, ins: bool = False) -> torch.Tensor:
    """The largest magnitude that each token makes at a module, in fp32."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda part, args, out: seen.append(args[0] if ins else out))
    model(IDS)
    handle.remove()
    out = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return out.detach().abs().reshape(512, -1).amax(dim=1)


def raise_to(size: float, values: torch.Tensor, *weights: torch.Tensor) -> None:
    """Multiply weights so that a few tokens come out beyond ``size``, none of them near it."""
    top = values.sort(descending=True).values[3:40]
    gap = int((top[:-1] / top[1:]).argmax())
    for weight in weights:
        weight *= size / float((top[gap] * top[gap + 1]).sqrt())


def embedding(model: Any, size: float) -> None:
    model.model.embed_tokens.weight[::50, 3] = 1.2 * size
    model.model.norm.weight[3] = 0.0


def q_norm(model: Any, size: float) -> None:
    norm = model.model.layers[1].self_attn.q_norm
    model.model.layers[1].self_attn.k_norm.weight.zero_()  # whatever q is, the scores are not large
    raise_to(size, by_token(model, norm), norm.weight)


def product(model: Any, size: float) -> None:
    mlp = model.model.layers[1].mlp
    mlp.down_proj.weight.zero_()
    mlp.gate_proj.weight *= 100.0  # so the product is more than what up_proj gives
    raise_to(size, by_token(model, mlp.down_proj, ins=True), mlp.up_proj.weight)


def final_norm(model: Any, size: float) -> None:
    norm = model.model.norm
    norm.weight[torch.arange(64) != 3] = 0.0
    model.lm_head.weight[:, 3] = 0.0
    raise_to(size, by_token(model, norm), norm.weight)


def logits(model: Any, size: float) -> None:
    raise_to(size, by_token(model, model.lm_head), model.lm_head.weight)


def behind_the_step_up(model: Any, size: float) -> None:
    """The stream is as large as it ever gets from the embedding on; three layers on a product is too large."""
    one_channel(model, 5, 1_000.0)
    layer = model.model.layers[-1]
    layer.post_attention_layernorm.weight.fill_(5_000.0)  # what is not in that channel becomes as usual
    layer.post_attention_layernorm.weight[5] = 0.0
    layer.mlp.down_proj.weight.zero_()
    layer.mlp.gate_proj.weight *= 100.0
    raise_to(size, by_token(model, layer.mlp.down_proj, ins=True), layer.mlp.up_proj.weight)


def router(model: Any, size: float) -> None:
    """With so large logits the router is sure: the softmax of an infinity is not a number."""
    gate = model.model.layers[1].mlp.gate
    raise_to(size, by_token(model, gate), gate.weight)


def inside_an_expert(model: Any, size: float) -> None:
    """The product of an expert is large, and nothing that leaves it is."""
    block = model.model.layers[1].mlp
    seen: list[torch.Tensor] = []
    handle = block.experts.register_forward_pre_hook(lambda part, args: seen.append(args[0].reshape(512, -1)))
    model(IDS)
    handle.remove()
    half = block.experts.gate_up_proj.shape[1] // 2
    block.experts.gate_up_proj[:, :half] *= 100.0
    both = torch.einsum("th,ech->tec", seen[0], block.experts.gate_up_proj)
    made = torch.nn.functional.silu(both[..., :half]) * both[..., half:]
    block.experts.down_proj.zero_()
    raise_to(size, made.abs().flatten(1).amax(dim=1), block.experts.gate_up_proj[:, half:])


PLANTS: dict[str, tuple[Callable[[Any, float], None], str, dict[str, Any]]] = {
    "embedding": (embedding, "residual add after attention", {}),
    "q_norm": (q_norm, "q_norm output", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8}),
    "product": (product, "SwiGLU product", {}),
    "final norm": (final_norm, "norm output", {}),
    "logits": (logits, "logits", {}),
    "behind the step-up": (behind_the_step_up, "SwiGLU product", {"num_hidden_layers": 5}),
    "router": (router, "router logits", {"moe": True}),
    "inside an expert": (inside_an_expert, "SwiGLU product of the experts", {"moe": True}),
    "inside the one expert": (
        inside_an_expert,
        "SwiGLU product of the experts",
        {"moe": True, "num_experts_per_tok": 1},
    ),
}
MODES = [("resident", "sdpa", "bfloat16"), ("streamed", "eager", "float32")]


def failing(folder: Path, attention: str) -> list[int]:
    """By brute force: ids with which something that goes into or comes out of a module of plain fp16 is not finite.

    A router's -inf is none: its softmax makes nothing of it, and where it makes NaN, that is seen behind it.
    """
    model, bad = load(folder, torch.float16, attention), torch.zeros(512, dtype=torch.bool)
    routers = [part for name, part in model.named_modules() if name.endswith("mlp.gate")]

    def look(part: Any, args: Any, kwargs: Any, out: Any) -> None:
        for each in (*args, *(out if isinstance(out, tuple) else (out,))):
            if isinstance(each, torch.Tensor) and each.is_floating_point() and each.shape[0] == 512:
                fine = torch.isfinite(each) | ((each == -torch.inf) & (part in routers))
                bad.logical_or_(~fine.reshape(512, -1).all(dim=1))

    for name, part in model.named_modules():
        if "experts." not in name:
            part.register_forward_hook(look, with_kwargs=True)
    with torch.inference_mode():
        out = model(input_ids=IDS).logits
    bad |= ~torch.isfinite(out).flatten(1).all(dim=1)
    return [int(place) for place in bad.nonzero()]


@pytest.mark.parametrize(("memory", "attention", "dtype"), MODES)
@pytest.mark.parametrize("name", PLANTS)
def test_a_sweep_finds_the_tokens_that_plain_fp16_fails_at(
    name: str, memory: str, attention: str, dtype: str, tmp_path: Path
) -> None:
    plant, where, options = PLANTS[name]
    folder = make_checkpoint(tmp_path / "model", edit=lambda model: plant(model, LIMIT), dtype=dtype, **options)
    truth = failing(folder, attention)
    assert 3 <= len(truth) <= 60
    run = swept(folder, memory=memory, attention=attention)
    assert run.sweep.over == len(truth) and run.sweep.tried == 512
    marked = {each.ids[0]: each.fails for each in run.sweep.worst}
    assert all((token in truth) == fails for token, fails in marked.items() if fails is not None)
    assert sum(fails is True for fails in marked.values()) == min(20, len(truth))
    assert run.sweep.worst[0].name == where
    assert f"{len(truth)} fail." in next(why.triggers(run))


@pytest.mark.parametrize("name", PLANTS)
def test_the_same_a_quarter_as_large_is_healthy(name: str, tmp_path: Path) -> None:
    plant, _, options = PLANTS[name]
    folder = make_checkpoint(tmp_path / "model", edit=lambda model: plant(model, LIMIT / 4), **options)
    assert failing(folder, "sdpa") == []
    run = swept(folder)
    assert run.sweep.over == 0 and not any(each.fails for each in run.sweep.worst)
    assert max(float(each.magnitude) for each in run.sweep.worst) < LIMIT


def test_a_token_is_told_from_the_others_whatever_goes_through_with_it(tmp_path: Path) -> None:
    from qwen_precision.diagnose.walk import walker as walker_of
    from qwen_precision.probe.run import measure, prepare

    folder = make_checkpoint(tmp_path / "model", edit=lambda model: inside_an_expert(model, LIMIT), moe=True)
    job = prepare(str(folder), load_settings(None, {}), [PromptSpec(name="plain", text="abc")])
    measure(job)
    walker = walker_of(job, "fp16")
    texts = torch.arange(96).reshape(32, 3) * 5
    together = walker.peaks(texts)
    for number, ids in enumerate(texts):
        alone = walker.peaks(ids[None])
        assert float(alone.value) == pytest.approx(float(together.value[number]), rel=1e-4)
        assert alone.name == together.name[number : number + 1]


@pytest.mark.parametrize(("attention", "moe"), [("sdpa", False), ("eager", False), ("eager", True)])
def test_of_texts_it_finds_every_prefix_that_plain_fp16_fails_at(attention: str, moe: bool, tmp_path: Path) -> None:
    def edit(model: Any) -> None:
        if not moe:
            return enough_of_them(1500.0)(model)
        expert_product(model)
        model.model.embed_tokens.weight[:, 3] = 0.0  # only "Z" drives the expert
        model.model.embed_tokens.weight[ids_of("Z"), 3] = 100.0

    folder = make_checkpoint(tmp_path / "model", edit=edit, dtype="float32", moe=moe)
    text = "aaaaaaaaaaaaZaaaZqkxjvbnmZwypd"
    prefixes = [text[:length] for length in range(1, len(text) + 1)]
    (tmp_path / "texts.txt").write_text("\n".join(prefixes))
    model, truth = load(folder, torch.float16, attention), set()
    for each in prefixes:
        with torch.inference_mode():
            if not torch.isfinite(model(torch.tensor([ids_of(each)])).logits).all():
                truth.add(each)
    found = swept(folder, attention=attention, sweep_texts=str(tmp_path / "texts.txt")).sweep
    assert found.tried == len(prefixes) and 0 < len(truth) < len(prefixes)
    assert found.over == len(truth)
    assert all((each.text in truth) == each.fails for each in found.worst if each.fails is not None)


def test_squares_inside_a_norm_are_not_held_against_fp16(tmp_path: Path) -> None:
    """A channel of 1,000 has a square of a million, which fp16's own model makes in fp32."""

    def plant(model: Any) -> None:
        model.model.embed_tokens.weight[::7, 5] = 1_000.0

    run = swept(make_checkpoint(tmp_path / "model", edit=plant))
    assert run.sweep.over == 0 and all(float(each.magnitude) < 5_000 for each in run.sweep.worst)


def test_a_weight_that_fp16_cannot_hold_fails_at_every_token(tmp_path: Path) -> None:
    """In fp32 nothing is large: the weight meets a channel that is next to nothing."""

    def plant(model: Any) -> None:
        model.model.layers[1].input_layernorm.weight[3] = 1e-6
        model.model.layers[1].self_attn.v_proj.weight[0, 3] = 70_000.0

    folder = make_checkpoint(tmp_path / "model", edit=plant)
    truth = failing(folder, "sdpa")
    found = swept(folder).sweep
    assert found.over == len(truth) > 500 and all(each.fails for each in found.worst)
    assert max(float(each.magnitude) for each in found.worst) < LIMIT / 2


def test_a_sweep_made_up_to_the_step_up_says_what_it_did_not_look_at() -> None:
    run = explained_run()
    old = run.model_copy(update={"sweep": run.sweep.model_copy(update={"layers": 3, "over": 0})})
    first, second = list(why.triggers(old))[:2]
    assert "in hidden states or at linear layers" in first and "behind 3 layers" in second
    assert judge(old).run.sweep.over == 0


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_a_sweep_reads_no_resident_weight_again_and_the_check_sees_each_once(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, read = make_checkpoint(tmp_path / "model"), []
    plain = run_probe(folder, ["abc"], memory=memory)
    whole = weights.checked_tensor
    monkeypatch.setattr(weights, "checked_tensor", lambda *args: read.append(args[1]) or whole(*args))
    run = swept(folder, memory=memory)
    assert run.sweep is not None and run.sweep.tried == 512
    assert (len(read) > len(set(read))) == (memory == "streamed")
    assert run.weight_totals == plain.weight_totals and run.weights == plain.weights
