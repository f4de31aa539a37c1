"""Small records with sane defaults, so that a test says only what it is about."""

from typing import Any

from qwen_precision.record import Choice, Event, Model, Pass, Prompt, Row, Run, Site, WeightTotals

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
            "source": "Qwen/Qwen3-8B", "revision": "0123456789abcdef", "architecture": "Qwen3ForCausalLM", "layers": 32,
            "hidden_size": 4096, "vocabulary": 151936, "parameters": 8_190_735_360, "weight_bytes": 16_381_470_720,
            "source_dtype": "BF16", "tied_embeddings": False, **changes,
        }
    )  # fmt: skip


def a_prompt(name: str = "plain", text: str = "Hello there", **changes: Any) -> Prompt:
    row = Row(**{"text": text, "ids": [9707, 1052], "tokens": ["Hello", " there"], "padding": 0, **changes})
    return Prompt(name=name, rows=[row])


def an_event(site: int, **changes: Any) -> Event:
    return Event(
        **{
            "site": site, "step": site, "nan": 0, "inf": 12, "elements": 8192, "value": float("inf"),
            "clean_inputs": True,
            "clean_weights": True, "row": 0, "position": 0, "channel": 35, "head": None, "expert": None,
            "in_padding": False, **changes,
        }
    )  # fmt: skip


def a_pass(dtype: str, abs_max: list[float | None], events: list[Event] | None = None, **changes: Any) -> Pass:
    return Pass(
        **{
            "dtype": dtype,
            "prompt": 0,
            "abs_max": abs_max,
            "events": events or [],
            "reseeded": [],
            "top1": [5],
            **changes,
        }
    )


def a_run(passes: list[Pass], **changes: Any) -> Run:
    dtypes = list(dict.fromkeys(each.dtype for each in passes))
    return Run(
        **{
            "schema_": 2, "tool": "qprec 0.1.0", "verb": "probe", "created": "2026-01-01T00:00:00+00:00",
            "stopped": None, "model": a_model(), "environment": {"python": "3.11.7", "torch": "2.13.0"},
            "settings": {}, "choices": [Choice(what="device", value="cpu", reason="auto: no GPU is here")],
            "prompts": [a_prompt()], "dtypes": dtypes, "reference": True, "sites": SITES, "wider": {}, "casts": {},
            "passes": passes, "weights": [],
            "weight_totals": [WeightTotals(dtype="fp16", elements=8_190_735_360, overflow=0, underflow=7, inexact=900)],
            "seconds": {"total": 12.5}, "generation": None, **changes,
        }
    )  # fmt: skip


HEALTHY = [1.5, 20.0, 300.0, 410.0, 420.0, 31.0]


def healthy_run(**changes: Any) -> Run:
    return a_run([a_pass("fp32", HEALTHY), a_pass("fp16", HEALTHY), a_pass("bf16", HEALTHY)], **changes)


def overflowing_run(**changes: Any) -> Run:
    reference = [1.5, 20.0, 300.0, 40000.0, 74945.8, 31.0]
    fp16 = a_pass("fp16", [1.5, 20.0, 300.0, 40000.0, float("inf"), float("nan")], [
        an_event(3, inf=0, value=40000.0), an_event(4), an_event(5, nan=300, inf=0, clean_inputs=False),
    ])  # fmt: skip
    return a_run([a_pass("fp32", reference), fp16, a_pass("bf16", reference)], **changes)


def many_overflows_run() -> Run:
    layers = 40
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


RUNS = {
    "healthy": healthy_run, "one-overflow": overflowing_run, "many": many_overflows_run, "stopped": stopped_run,
    "empty": empty_run,
}  # fmt: skip

HOSTILE = [
    "[red]bold[/red]", "[/]", "</script><script>alert(1)</script>", "| a | b |", "`rm -rf`", "\x1b[31mred\x1b[0m",
    "\u202egnp.exe", "\x00\x07\x7f", "line\nbreak\ttab", "x" * 100_000, ":x: :smile:",
]  # fmt: skip


def hostile_run(text: str) -> Run:
    name = text[:50] or "x"
    sites = [
        Site(layer=None, module=text[:500], op=name, call=0),
        Site(layer=1, module=f"layers.1.{name}", op=name, call=3),
    ]
    run = a_run([
        a_pass("fp32", [1.0, 80000.0]),
        a_pass("fp16", [float("inf"), float("inf")], [an_event(0), an_event(1)]),
    ], sites=sites, prompts=[a_prompt(text, text, tokens=[text, text])], stopped=text,
        model=a_model(source=text, revision=text, architecture=text, source_dtype=text),
        choices=[Choice(what=text, value=text, reason=text)], environment={text: text})  # fmt: skip
    return run
