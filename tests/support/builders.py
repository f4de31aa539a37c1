"""Small records with sane defaults, so that a test says only what it is about."""

from typing import Any

from qwen_precision.record.closeup import Closeup, Contribution, Massive, Operand, Source
from qwen_precision.record.explanation import Control, ControlKind, Explanation, GreedyMatch, Sweep, Swept
from qwen_precision.record.generation import Continuation, Generation, Poison, SamplingError, Stretch, Trip
from qwen_precision.record.logits import LogitsCost, Upcast
from qwen_precision.record.rescue import Exported, LayerPowers, Loss, Rescaling, Rescue, Stuck
from qwen_precision.record.run import Choice, Event, Model, Pass, Prompt, Row, Run, Site, WeightTotals
from qwen_precision.settings.guards import GuardSettings

SITES = [
    Site(layer=None, module="model.embed_tokens", op="embedding", call=0),
    Site(layer=0, module="model.layers.0.mlp", op="mul", call=0),
    Site(layer=0, module="model.layers.0", op="add", call=1),
    Site(layer=31, module="model.layers.31.mlp.down_proj", op="linear", call=0),
    Site(layer=31, module="model.layers.31", op="add", call=1),
    Site(layer=None, module="lm_head", op="linear", call=0),
]


def a_model(**changes: Any) -> Model:
    return Model(
        **{
            "source": "Qwen/Qwen3-8B",
            "revision": "0123456789abcdef",
            "architecture": "Qwen3ForCausalLM",
            "layers": 32,
            "hidden_size": 4096,
            "vocabulary": 151936,
            "parameters": 8_190_735_360,
            "weight_bytes": 16_381_470_720,
            "source_dtype": "BF16",
            "tied_embeddings": False,
            "files": [],
            **changes,
        }
    )


def a_prompt(name: str = "plain", text: str = "Hello there", **changes: Any) -> Prompt:
    row = Row(**{"text": text, "ids": [9707, 1052], "tokens": ["Hello", " there"], "padding": 0, **changes})
    return Prompt(name=name, rows=[row], failed=None)


def an_event(site: int, **changes: Any) -> Event:
    return Event(
        **{
            "site": site,
            "step": site,
            "nan": 0,
            "inf": 12,
            "elements": 8192,
            "value": float("inf"),
            "clean_inputs": True,
            "clean_weights": True,
            "row": 0,
            "position": 0,
            "channel": 35,
            "head": None,
            "expert": None,
            "in_padding": False,
            "harmless": None,
            "closeup": None,
            **changes,
        }
    )


def an_upcast(**changes: Any) -> Upcast:
    return Upcast(
        **{
            "tokens": 1,
            "logprob_max": 0.0012,
            "logprob_rms": 0.0012,
            "loss": 2.3451,
            "loss_in_dtype": 2.3438,
            "bad": 0,
            "zero": 0,
            "rows": 2,
            "mass_lost": 1.5e-5,
            "ranks": 0,
            "changed": 0,
            "by_hand": -2.5e-4,
            "by_hand_bad": 0,
            "unshifted_bad": 2,
            **changes,
        }
    )


def a_cost(**changes: Any) -> LogitsCost:
    """Of two tokens of Qwen3's vocabulary."""
    return LogitsCost(
        **{
            "upcast": True,
            "upcast_seconds": 0.0123,
            "bytes": 607744,
            "whole_prompt_bytes": 1215488,
            "chunks": 1,
            "steps": 3,
            "vocabulary": 151936,
            "held": 607744,
            **changes,
        }
    )


def a_pass(dtype: str, abs_max: list[float | None], events: list[Event] | None = None, **changes: Any) -> Pass:
    return Pass(
        **{
            "dtype": dtype,
            "prompt": 0,
            "abs_max": abs_max,
            "events": events or [],
            "reseeded": [],
            "top1": [5],
            "layer_error": [],
            "kl": [],
            "massive": [],
            "local_error": [],
            "logprob_error": [],
            "upcast": [],
            **changes,
        }
    )


def a_run(passes: list[Pass], **changes: Any) -> Run:
    dtypes = list(dict.fromkeys(each.dtype for each in passes))
    return Run(
        **{
            "schema_": 4,
            "tool": "qprec 0.1.0",
            "verb": "probe",
            "created": "2026-01-01T00:00:00+00:00",
            "stopped": None,
            "unfinished": None,
            "model": a_model(),
            "environment": {"python": "3.11.7", "torch": "2.13.0"},
            "settings": {},
            "choices": [Choice(what="device", value="cpu", reason="auto: no GPU is here")],
            "prompts": [a_prompt()],
            "redacted": False,
            "dtypes": dtypes,
            "reference": True,
            "sites": SITES,
            "wider": {},
            "not_run": [],
            "casts": {},
            "passes": passes,
            "weights": [],
            "weight_totals": [WeightTotals(dtype="fp16", elements=8_190_735_360, overflow=0, underflow=7, inexact=900)],
            "scale_faults": [],
            "seconds": {"read and cast": 1.5, "fp32": 6.0, "fp16": 4.0, "read": 2.25, "total": 12.5},
            "logits": None,
            "generation": None,
            "rescue": None,
            "explanation": None,
            "sweep": None,
            **changes,
        }
    )


HEALTHY = [1.5, 20.0, 300.0, 410.0, 420.0, 31.0]


def healthy_run(**changes: Any) -> Run:
    fp16 = a_pass("fp16", HEALTHY, layer_error=[1e-4, 5e-4, 6e-4], kl=[2e-6], upcast=[an_upcast()])
    coarse = an_upcast(logprob_max=0.0037, logprob_rms=0.0037, loss=2.3478, loss_in_dtype=2.34375, mass_lost=-0.0019)
    bf16 = a_pass("bf16", HEALTHY, layer_error=[8e-4, 4e-3, 5e-3], kl=[1.5e-4], top1=[6], upcast=[coarse])
    return a_run([a_pass("fp32", HEALTHY), fp16, bf16], **{"logits": a_cost(), **changes})


def advised_run(**changes: Any) -> Run:
    """A long prompt that is finite everywhere, and whose softmax wants float32."""
    finite = {"layer_error": [8e-4, 4e-3, 5e-3], "kl": [1.5e-4]}
    coarse = an_upcast(tokens=8191, logprob_max=0.0625, logprob_rms=0.018, loss=11.9372, loss_in_dtype=11.9375)
    worse = coarse.model_copy(
        update={"loss_in_dtype": 11.875, "mass_lost": -0.013, "rows": 8, "ranks": 3, "changed": 2}
    )
    flat = an_upcast(tokens=8191, zero=4, mass_lost=1.2e-3, rows=8, by_hand=None, by_hand_bad=8)
    passes = [a_pass("fp32", HEALTHY), a_pass("fp16", HEALTHY, upcast=[flat], **finite)]
    held = a_cost(bytes=607744, whole_prompt_bytes=607744 * 8192, chunks=5, held=1073584000)
    return a_run([*passes, a_pass("bf16", HEALTHY, upcast=[worse], **finite)], **{"logits": held, **changes})


def divergent_run(**changes: Any) -> Run:
    """Finite everywhere, and another next token than fp32's."""
    fp16 = a_pass("fp16", HEALTHY, layer_error=[1e-4, 5e-4, 6e-4], kl=[0.5], logprob_error=[0.5], top1=[6])
    return a_run([a_pass("fp32", HEALTHY), fp16], **changes)


def overflowing_run(**changes: Any) -> Run:
    reference = [1.5, 20.0, 300.0, 40000.0, 74945.8, 31.0]
    fp16 = a_pass(
        "fp16",
        [1.5, 20.0, 300.0, 40000.0, float("inf"), float("nan")],
        [
            an_event(3, inf=0, value=40000.0),
            an_event(4),
            an_event(5, nan=300, inf=0, clean_inputs=False),
        ],
    )
    return a_run([a_pass("fp32", reference), fp16, a_pass("bf16", reference)], **changes)


def a_plan(**changes: Any) -> Rescue:
    layers = [LayerPowers(layer=31, input_norm=0, query=0, value=0, post_norm=0, product=[2])]
    rescaling = Rescaling(stream=3, qk_norm=True, final_norm=3, untied=False, eps=1e-6, layers=layers)
    loss = {
        "kind": "q_proj",
        "tensors": 32,
        "elements": 536870912,
        "inexact_before": 7,
        "inexact": 1200,
        "to_zero": 3,
        "badly": 40,
    }
    return Rescue(
        **{
            "margin": 4.0,
            "unsupported": None,
            "rescaling": rescaling,
            "losses": [Loss(**loss, error=2.5e-7)],
            "stuck": [],
            "fp32_modules": [],
            "gate_channels": 0,
            "exported": None,
            **changes,
        }
    )


def rescued_run() -> Run:
    exported = Exported(
        folder="Qwen3-8B-fp16safe",
        dtype="fp16",
        bytes=16_381_470_720,
        identical=True,
        compared=2,
        verdict="ok",
        headroom=6.99,
        where="layer 31, residual add after mlp",
        verified=True,
        why=None,
        kept=True,
        logit_error={"fp16": None, "bf16": 0.0042, "after": 0.00051},
    )
    return overflowing_run(rescue=a_plan(exported=exported))


def not_rescuable_run() -> Run:
    stuck = [
        Stuck(layer=None, module="lm_head", name="logits", headroom=0.5, fails=True, why="a logit is the answer"),
        Stuck(
            layer=31,
            module="model.layers.31.mlp.gate_proj",
            name="gate_proj output",
            headroom=3.1,
            fails=False,
            why="SiLU is not linear",
        ),
    ]
    return overflowing_run(rescue=a_plan(stuck=stuck, fp32_modules=["lm_head"]))


def a_control(what: ControlKind, prompt: str = "plain", **changes: Any) -> Control:
    return Control(
        **{
            "what": what,
            "dtype": "fp16",
            "prompt": prompt,
            "row": 0,
            "tokens": 1,
            "position": None,
            "clean": False,
            "detail": what,
            "began": None,
            **changes,
        }
    )


def two_prompts_run(controls: list[Control]) -> Run:
    """Two prompts that fail at one place, with the controls of both."""
    one = overflowing_run()
    made = Explanation(budget=10, controls=controls, left_out=[], hashes={}, continuations=[])
    passes = [each.model_copy(update={"prompt": prompt}) for prompt in (0, 1) for each in one.passes[:2]]
    return a_run(passes, prompts=[a_prompt("plain"), a_prompt("chat")], explanation=made)


def a_sweep(**changes: Any) -> Sweep:
    """Over first tokens, none of which fails."""
    made = Sweep(
        kind="first-token",
        dtype="fp16",
        tried=512,
        total=512,
        layers=32,
        over=0,
        worst=[],
        prompt=None,
        shortest_failing=None,
        longest_clean=None,
        seconds=0.1,
    )
    return made.model_copy(update=changes)


def explained_run() -> Run:
    look = Closeup(
        operands=[
            Operand(role="input", shape=[1, 2, 4096], dtype="fp16", low=-300.0, high=210.0, bad=0),
            Operand(role="output", shape=[1, 2, 4096], dtype="fp16", low=-4000.0, high=60000.0, bad=12),
        ],
        source=Source(file="transformers/models/qwen3/modeling_qwen3.py", line=81, text="down = self.down_proj(x)"),
        exact=74945.8,
        contributions=[Contribution(channel=7, value=12.5, weight=1800.0, share=0.93)],
    )
    controls = [
        a_control("token alone", detail="token 0 alone"),
        a_control("without the token", clean=True, detail="the prompt with every occurrence of token 0 taken out"),
    ]
    made = Explanation(
        budget=2,
        controls=controls,
        left_out=["fp16: with the template: beyond --budget 2"],
        hashes={},
        continuations=[GreedyMatch(dtype="bf16", prompt="plain", tokens=16, first_difference=4)],
    )
    worst = [
        Swept(
            ids=[9707], text="Hello", magnitude=74945.8, layer=31, name="residual add after mlp", channel=35, fails=True
        )
    ]
    sweep = a_sweep(tried=4096, total=4096, over=1, worst=worst, seconds=12.5)
    reference = [1.5, 20.0, 300.0, 40000.0, 74945.8, 31.0]
    massive = [Massive(layer=31, row=0, position=0, channel=35, value=74945.8, median=0.4)]
    fp16 = a_pass(
        "fp16",
        [1.5, 20.0, 300.0, 40000.0, float("inf"), float("nan")],
        [
            an_event(4, closeup=look),
            an_event(5, nan=300, inf=0, clean_inputs=False),
        ],
        top1=[None],
    )
    return a_run([a_pass("fp32", reference, massive=massive), fp16], explanation=made, sweep=sweep)


def many_overflows_run(layers: int = 2) -> Run:
    """The same two operations overflow in every layer."""
    sites = [Site(layer=n, module=f"model.layers.{n}", op="add", call=1) for n in range(layers)]
    sites += [Site(layer=n, module=f"model.layers.{n}.mlp", op="mul", call=0) for n in range(layers)]
    magnitudes = [70000.0 + n for n in range(layers)] + [90000.0] * layers
    fp16 = a_pass("fp16", [float("inf")] * (2 * layers), [an_event(n) for n in range(2 * layers)])
    return a_run([a_pass("fp32", magnitudes), fp16], sites=sites, dtypes=["fp16"])


def stopped_run() -> Run:
    cut = [*HEALTHY[:3], None, None, None]
    return a_run([a_pass("fp32", cut), a_pass("fp16", cut)], stopped="interrupted", dtypes=["fp16"])


def empty_run() -> Run:
    return a_run([], sites=[], stopped="out of memory on cpu", dtypes=["fp16", "bf16"], weight_totals=[])


NAN = float("nan")
GUARDS = GuardSettings().model_dump()


def a_continuation(ids: list[int], tokens: list[str], **changes: Any) -> Continuation:
    count = len(ids)
    return Continuation(
        **{
            "row": 0,
            "input": "Hello there",
            "ids": ids,
            "tokens": tokens,
            "text": "".join(tokens),
            "clean_text": None,
            "stretches": [Stretch(start=0, dtype="fp16", rescaled=False)],
            "top1": [0.9] * count,
            "margin": [2.5] * count,
            "entropy": [0.4] * count,
            "logprob": [-0.105] * count,
            "logprob_error": [2.5e-5] * count,
            "mass_lost": [1.5e-5] * count,
            "ranks": [0] * count,
            "changed": [0] * count,
            "finish": "eos",
            **changes,
        }
    )


def a_trip(step: int, guard: str = "watch", kind: str = "wholly bad", **changes: Any) -> Trip:
    return Trip(
        **{
            "step": step,
            "row": 0,
            "guard": guard,
            "kind": kind,
            "dtype": "fp16",
            "why": "no logit is finite",
            "acted": guard != "watch",
            "before": {"nan": 151936, "inf": 0},
            "after": {},
            "poisoned": None,
            **changes,
        }
    )


def a_generation(rows: list[Continuation], trips: list[Trip] | None = None, **changes: Any) -> Generation:
    return Generation(
        **{
            "options": {"do_sample": False, "max_new_tokens": 64, "seed": 0},
            "guards": GUARDS,
            "chat": False,
            "base_model": None,
            "rows": rows,
            "trips": trips or [],
            "error": None,
            "probe": None,
            "logits": a_cost(held=303872),
            **changes,
        }
    )


def generated(made: Generation, dtypes: list[str], **changes: Any) -> Run:
    rows = [a_prompt().rows[0] for _ in made.rows]
    return a_run(
        [],
        **{
            "verb": "generate",
            "generation": made,
            "dtypes": dtypes,
            "sites": [],
            "reference": False,
            "weight_totals": [],
            "scale_faults": [],
            "settings": {"dtype": dtypes[0]},
            "prompts": [Prompt(name="prompt", rows=rows, failed=None)],
            **changes,
        },
    )


def healthy_text_run() -> Run:
    return generated(a_generation([a_continuation([9707, 1052, 0], [" general", " Kenobi", "!"])]), ["fp16"])


def exclamation_run() -> Run:
    row = a_continuation(
        [9707, *[0] * 12],
        [" general", *["!"] * 12],
        clean_text=" general",
        finish="length",
        top1=[0.9, *[NAN] * 12],
        margin=[2.5, *[NAN] * 12],
        entropy=[0.4, *[NAN] * 12],
        logprob=[-0.105, *[None] * 12],
        logprob_error=[2.5e-5, *[None] * 12],
        mass_lost=[1.5e-5, *[None] * 12],
        ranks=[0, *[None] * 12],
        changed=[0, *[None] * 12],
    )
    poison = Poison(layer=4, part="keys", position=0, in_padding=False)
    trips = [a_trip(step, poisoned=poison if step == 1 else None) for step in range(1, 13)]
    return generated(a_generation([row], trips), ["fp16"])


def recovered_run() -> Run:
    row = a_continuation(
        [9707, 1052, 0],
        [" general", " Kenobi", "!"],
        clean_text=" general",
        stretches=[Stretch(start=0, dtype="fp16", rescaled=False), Stretch(start=1, dtype="bf16", rescaled=False)],
    )
    other = a_continuation([9707], ["."], row=1)
    trips = [
        a_trip(1),
        a_trip(
            1, "recover", "recovered", why="computed again in bf16 from the clean prefix", after={"nan": 0, "inf": 0}
        ),
    ]
    options = {"do_sample": True, "temperature": 0.1, "top_k": 20, "repetition_penalty": 1.6, "seed": 0}
    return generated(a_generation([row, other], trips, options=options), ["fp16", "bf16"])


def refused_run() -> Run:
    row = a_continuation([9707], [" general"], clean_text=" general", finish="error")
    error = SamplingError(step=1, rows=[0], message="probability tensor contains either `inf`, `nan` or element < 0")
    return generated(a_generation([row], [a_trip(1)], error=error, options={"do_sample": True, "seed": 0}), ["fp16"])


def interrupted_text_run() -> Run:
    row = a_continuation([9707], [" general"], finish="interrupted")
    return generated(a_generation([row]), ["fp16"], stopped="interrupted")


RUNS = {
    "healthy": healthy_run,
    "advised": advised_run,
    "one-overflow": overflowing_run,
    "rescued": rescued_run,
    "explained": explained_run,
    "not-rescuable": not_rescuable_run,
    "many": many_overflows_run,
    "stopped": stopped_run,
    "empty": empty_run,
    "text-healthy": healthy_text_run,
    "text-exclamation": exclamation_run,
    "text-recovered": recovered_run,
    "text-refused": refused_run,
    "text-interrupted": interrupted_text_run,
}

HOSTILE = [
    "[red]bold[/red]",
    "[/]",
    "</script><script>alert(1)</script>",
    "| a | b |",
    "`rm -rf`",
    "\x1b[31mred\x1b[0m",
    "\u202egnp.exe",
    "\x00\x07\x7f",
    "line\nbreak\ttab",
    "x" * 100_000,
    ":x: :smile:",
]


def hostile_text_run(text: str) -> Run:
    row = a_continuation([0] * 9, [text] * 9, input=text, text=text, clean_text=text)
    made = a_generation([row], [a_trip(0, text[:40], why=text)], options={"do_sample": True, "temperature": text[:40]})
    return generated(
        made, ["fp16"], model=a_model(source=text, revision=text), settings={"dtype": text[:40]}, stopped=text
    )


def hostile_run(text: str) -> Run:
    name = text[:50] or "x"
    sites = [
        Site(layer=None, module=text[:500], op=name, call=0),
        Site(layer=1, module=f"layers.1.{name}", op=name, call=3),
    ]
    run = a_run(
        [
            a_pass("fp32", [1.0, 80000.0]),
            a_pass("fp16", [float("inf"), float("inf")], [an_event(0), an_event(1)]),
        ],
        sites=sites,
        prompts=[a_prompt(text, text, tokens=[text, text])],
        stopped=text,
        model=a_model(source=text, revision=text, architecture=text, source_dtype=text),
        choices=[Choice(what=text, value=text, reason=text)],
        environment={text: text},
        rescue=a_plan(
            unsupported=None,
            fp32_modules=[text],
            stuck=[Stuck(layer=0, module=text, name=text, headroom=0.5, fails=True, why=text)],
            exported=Exported(
                folder=text,
                dtype=text,
                bytes=1,
                identical=False,
                compared=1,
                verdict=text,
                headroom=1.0,
                where=text,
                logit_error={text: None},
                verified=False,
                why=text,
                kept=True,
            ),
        ),
    )
    look = Closeup(
        operands=[Operand(role="input", shape=[1], dtype=text, low=0.0, high=1.0, bad=0)],
        source=Source(file=text, line=1, text=text),
        exact=None,
        contributions=[],
    )
    passes = [run.passes[0], run.passes[1].model_copy(update={"events": [an_event(0, closeup=look), an_event(1)]})]
    control = a_control("sdpa", text, dtype=text, clean=True, detail=text)
    made = Explanation(
        budget=1,
        controls=[control],
        left_out=[text],
        hashes={text: text},
        continuations=[GreedyMatch(dtype=text, prompt=text, tokens=1, first_difference=None)],
    )
    sweep = Sweep(
        kind="length",
        dtype=text,
        tried=1,
        total=1,
        layers=1,
        over=0,
        prompt=text,
        shortest_failing=1,
        longest_clean=0,
        seconds=1,
        worst=[Swept(ids=[1], text=text, magnitude=1, layer=1, name=text, channel=1, fails=None)],
    )
    return run.model_copy(update={"passes": passes, "explanation": made, "sweep": sweep})
