"""Speed and memory, as ratios measured interleaved in one run; no number here is asserted anywhere.

    python scripts/bench.py [PART …]     (default: all of PARTS, below)

QPREC_BENCH_DIR says where the checkpoints are written (default: a folder in the system's temporary one);
they are kept there for the next run. Figures are the minimum and the median of ``RUNS``.
"""

import contextlib
import json
import logging
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import bench_many
import torch
import transformers
from make_checkpoint import DEMO, write
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import qwen_precision
from qwen_precision.dtypes import DTYPES
from qwen_precision.generate.decode import Decoder
from qwen_precision.generate.rescaler import Rescaler
from qwen_precision.model import files
from qwen_precision.model.folder import open_checkpoint
from qwen_precision.model.loaded import Models
from qwen_precision.probe.run import measure, prepare
from qwen_precision.record.rescue import Rescaling
from qwen_precision.rescue.export import Exporter
from qwen_precision.settings.config import load_settings
from qwen_precision.settings.guards import load_guards
from qwen_precision.settings.prompts import PromptSpec

RUNS = 7
FEW = 5
"""Runs of whole probes."""
TOKENS = 128
NEW_TOKENS = 64
FOLDER = Path(os.environ.get("QPREC_BENCH_DIR", Path(tempfile.gettempdir()) / "qprec-bench"))
TEXT = "The quick brown fox jumps over the lazy dog. " * 64


def checkpoint(shape: str, layers: int | None = None) -> Path:
    """A checkpoint of a real shape, written once."""
    folder = FOLDER / (shape if layers is None else f"{shape}-{layers}")
    if not (folder / "tokenizer.json").exists():
        write(shape, folder, {}, layers=layers)
    return folder


def some_ids(device: str = "cpu") -> torch.Tensor:
    """One prompt, ``[1, TOKENS]``, always the same."""
    return torch.randint(0, 500, (1, TOKENS), generator=torch.Generator().manual_seed(0)).to(device)


def interleaved(variants: Mapping[str, Callable[[], object]], runs: int = RUNS) -> dict[str, list[float]]:
    """Seconds of each variant, taken in turn: A B C A B C …, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(runs + 1):
        for name, run in variants.items():
            started = time.perf_counter()
            run()
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def show(title: str, seconds: dict[str, list[float]]) -> None:
    """A row a variant, as ratio to the first."""
    first = next(iter(seconds.values()))
    print(f"\n{title}")
    for name, values in seconds.items():
        low, middle = min(values), statistics.median(values)
        ratio = f"{low / min(first):5.2f}x {middle / statistics.median(first):5.2f}x"
        print(f"  {name:44s} min {low * 1e3:9.1f} ms  median {middle * 1e3:9.1f} ms   {ratio}")


class Empty(TorchDispatchMode):
    """Runs each operation and does nothing: what torch takes for handing every one to Python, whoever watches."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as the watcher says

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs) if kwargs else func(*args)


def watch_overhead() -> None:
    """A resident forward: bare, with nothing done at every operation, watched, and with the peers installed."""
    folder = checkpoint("0.6B")
    ids = some_ids()
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

        def bare(model: torch.nn.Module = model) -> None:
            model(ids, use_cache=False)

        def untouched(model: torch.nn.Module = model) -> None:
            with Empty():
                model(ids, use_cache=False)

        def watched(model: torch.nn.Module = model) -> None:
            with qwen_precision.watch(model):
                model(ids, use_cache=False)

        with torch.inference_mode():
            ways = {"bare forward": bare, "an empty dispatch mode": untouched, "qwen_precision.watch": watched}
            show(f"watching every operation, 0.6B, {TOKENS} tokens, {dtype}", interleaved(ways))
        with torch.no_grad(), open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            rows = {name: interleaved({"bare": bare, name: run}) for name, run in peers(model, ids)}
        for name, seconds in rows.items():
            show(f"  beside it: {name}, {dtype}", seconds)


def peers(model: torch.nn.Module, ids: torch.Tensor) -> list[tuple[str, Callable[[], object]]]:
    """Other tools on the same forward. Each is set up anew per run only where it cannot be left on."""
    from transformers.debug_utils import DebugUnderflowOverflow

    rows: list[tuple[str, Callable[[], object]]] = []

    def debug_underflow_overflow() -> None:
        before = {part: dict(part._forward_hooks) for part in model.modules()}
        DebugUnderflowOverflow(model)
        try:
            model(ids, use_cache=False)
        finally:
            for part, hooks in before.items():  # it never removes its hooks
                part._forward_hooks.clear()
                part._forward_hooks.update(hooks)

    rows.append(("transformers DebugUnderflowOverflow", debug_underflow_overflow))
    with contextlib.suppress(ImportError):
        from torchlens import debug as torchlens_debug

        rows.append(("torchlens find_nan", lambda: torchlens_debug.find_nan(model, ids)))
    with contextlib.suppress(ImportError):
        from msprobe.pytorch import PrecisionDebugger

        folder = tempfile.mkdtemp()
        config = Path(folder) / "config.json"
        config.write_text(
            json.dumps(
                {
                    "task": "statistics",
                    "dump_path": folder,
                    "rank": [],
                    "step": [],
                    "level": "L0",
                    "statistics": {"scope": [], "list": [], "data_mode": ["all"]},
                }
            )
        )
        debugger = PrecisionDebugger(config_path=str(config))

        def msprobe() -> None:
            debugger.start(model)
            model(ids, use_cache=False)
            debugger.stop()
            debugger.step()

        rows.append(("mindstudio-probe statistics L0", msprobe))
    return rows


def small() -> None:
    """Three dtypes of a 0.6B-shaped checkpoint: one probe against three plain loads and forwards."""
    folder = checkpoint("0.6B")

    def plain() -> None:
        for dtype in DTYPES.values():
            run = subprocess.run([sys.executable, __file__, "--plain", str(folder), dtype.torch_name], check=True)
            assert run.returncode == 0

    def ours() -> None:
        probe(folder, TOKENS, "auto")

    show(
        "three dtypes of 0.6B, whole processes",
        interleaved({"three plain loads and forwards": plain, "qprec probe": ours}),
    )


def plain_forward(folder: str, name: str) -> None:
    """What a person would run by hand for one dtype."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, name)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][:, :TOKENS]
    with torch.no_grad():
        model(ids).logits[:, -1].argmax(dim=-1).item()


def probe(folder: Path, tokens: int, memory: str, text: str | None = TEXT, arithmetic: str = "native") -> dict:
    """One `qprec probe` in its own process: the saved run's seconds, and the peak memory in GB.

    Args:
        text: the prompt; None for the built-in ones.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run.json"
        command = [
            sys.executable,
            "-m",
            "qwen_precision",
            "probe",
            str(folder),
            *(["--prompt", text] if text is not None else []),
            "--arithmetic",
            arithmetic,
            "--max-tokens",
            str(tokens),
            "--memory",
            memory,
            "-o",
            str(out),
            "--fail-on",
            "never",
        ]
        code = (
            f"import subprocess,sys,resource;r=subprocess.run({command!r},stdout=subprocess.DEVNULL);"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss);sys.exit(r.returncode)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds = json.loads(out.read_text())["seconds"]
    return {**seconds, "peak": int(done.stdout) * 1024 / 1e9}


GEMMA: dict[str, dict[str, Any]] = {
    "270M": {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18},
    "1B": {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26},
}
"""Shapes of Gemma 3, a family that runs as a whole."""


def gemma(shape: str) -> Path:
    """A checkpoint in such a shape, with random weights."""
    folder = FOLDER / f"gemma3-{shape.lower()}"
    if not (folder / "tokenizer.json").exists():
        heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}
        config = transformers.Gemma3TextConfig(**GEMMA[shape], **heads, vocab_size=262_144, sliding_window=512)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        for name in ("tokenizer_config.json", "tokenizer.json"):
            shutil.copy(DEMO / name, folder / name)
    return folder


def whole() -> None:
    """Three dtypes of a family that runs whole: a probe against loading and forwards, one dtype after another."""
    settings = load_settings(None, {"memory": "resident", "max_tokens": TOKENS, "dtypes": ["fp16", "bf16"]})
    specs = [PromptSpec(name="text", text=TEXT)]
    for shape in GEMMA:
        folder = gemma(shape)
        taken: list[dict[str, float]] = []

        def plain(folder: Path = folder) -> None:
            for name in DTYPES:
                plain_forward(str(folder), DTYPES[name].torch_name)

        def ours(folder: Path = folder, taken: list[dict[str, float]] = taken) -> None:
            files._read.cache_clear()  # a probe that is not the first of its process would find the hashes made
            run = measure(prepare(str(folder), settings, specs))
            assert run.stopped is None
            taken.append(run.seconds)

        show(
            f"{shape} of Gemma 3, whole, {TOKENS} tokens, {', '.join(DTYPES)}",
            interleaved({"plain loads and forwards, in turn": plain, "probe, whole": ours}, FEW),
        )
        forwards = {name: bare_seconds(folder, name) for name in DTYPES}
        ratios = {name: min(each[name] for each in taken) / forwards[name] for name in DTYPES}
        total = sum(min(each[name] for each in taken) for name in DTYPES) / sum(forwards.values())
        told = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items())
        print(f"  its forwards alone, minimum of each: {told}; together {total:.2f}x", flush=True)


def bare_seconds(folder: Path, name: str) -> float:
    """The shortest of a few plain forwards, each the first of a model that was just loaded, as a probe's is."""
    seconds = []
    for _ in range(FEW):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, DTYPES[name].torch_name)).eval()
        ids = some_ids()
        with torch.inference_mode():
            started = time.perf_counter()
            model(input_ids=ids, use_cache=False)
            seconds.append(time.perf_counter() - started)
    return min(seconds)


def large() -> None:
    """An 8B-shaped checkpoint, streamed: wall time against the arithmetic of its three dtypes; peak memory."""
    folder = checkpoint("8B")
    rows = [probe(folder, 64, "streamed") for _ in range(3)]
    for row in rows:
        arithmetic = sum(row[name] for name in DTYPES)
        print(
            f"\n8B streamed, 3 dtypes, 64 tokens: {row['total']:.1f} s, arithmetic {arithmetic:.1f} s "
            f"({row['total'] / arithmetic:.2f}x), reading and casting {row['read and cast']:.1f} s, "
            f"peak {row['peak']:.2f} GB"
        )


def arithmetics() -> None:
    """Native against tensor-core: three dtypes as a ratio to three fp32 passes, and to native; taken in turn.

    A processor with AMX computes 16 bits natively in no time. As one with AVX2 computes:
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python scripts/bench.py arithmetic
    """
    cases = {
        "0.6B, built-in prompts": (checkpoint("0.6B", 7), 512, "resident", None),
        "8B streamed, 64 tokens": (checkpoint("8B", 2), 64, "streamed", TEXT),
    }
    print(f"\n{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    for title, (folder, tokens, memory, text) in cases.items():
        rows: dict[str, list[dict]] = {"native": [], "tensor-core": []}
        for _ in range(FEW):
            for name, measured in rows.items():
                measured.append(probe(folder, tokens, memory, text, name))
        first = statistics.median(sum(row[name] for name in DTYPES) for row in rows["native"])
        for name, measured in rows.items():
            middle = {key: statistics.median(row[key] for row in measured) for key in (*DTYPES, "total", "peak")}
            whole = statistics.median(sum(row[key] for key in DTYPES) for row in measured)
            ratio = statistics.median(sum(row[key] for key in DTYPES) / (3 * row["fp32"]) for row in measured)
            parts = ", ".join(f"{key} {middle[key]:.2f} s" for key in DTYPES)
            print(
                f"  {title}, {folder.name}, {name:12s} {parts}; {ratio:.2f}x of three fp32 passes, "
                f"{whole / first:.2f}x of native; in all {middle['total']:.2f} s, peak {middle['peak']:.2f} GB",
                flush=True,
            )


def linear() -> None:
    """Cost against layers and tokens; peak memory of a streamed probe against layers."""
    print("\nby layers (0.6B-shaped, streamed, 64 tokens)")
    for layers in (7, 14, 28, 56):
        row = min((probe(checkpoint("0.6B", layers), 64, "streamed") for _ in range(3)), key=lambda r: r["total"])
        print(f"  {layers:3d} layers  {row['total']:6.2f} s  peak {row['peak']:.2f} GB")
    print("by tokens (0.6B, resident)")
    for tokens in (64, 128, 256, 512):
        row = min((probe(checkpoint("0.6B"), tokens, "resident") for _ in range(3)), key=lambda r: r["total"])
        print(f"  {tokens:4d} tokens  {row['total']:6.2f} s  peak {row['peak']:.2f} GB")


def decoder(folder: Path, models: Models, dtype: str, profile: str) -> Decoder:
    """The guarded decoding method, saying nothing while it works."""
    guards, opened = load_guards(profile), open_checkpoint(folder, str(folder))
    rescaler = Rescaler(models, opened, "auto", None, guards.recover.margin, lambda what: None)
    return Decoder(models, rescaler, dtype, guards, lambda done, total, what: None, lambda row, token: None)


def generating() -> None:
    """Guards on against transformers' own generate: the same model, greedy, the same tokens; then the memory."""
    folder = checkpoint("0.6B")
    ids = some_ids()
    for dtype in ("fp32", "bf16"):
        models = Models(open_checkpoint(folder, str(folder)), torch.device("cpu"), None)
        model = models.get(dtype)
        length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}

        def plain(model: Any = model, length: dict[str, Any] = length) -> torch.Tensor:
            return model.generate(ids, attention_mask=torch.ones_like(ids), **length)

        def guarded(
            profile: str, model: Any = model, models: Any = models, dtype: str = dtype, length: dict[str, Any] = length
        ) -> torch.Tensor:
            way = decoder(folder, models, dtype, profile)
            return model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=way, **length)

        assert torch.equal(plain(), guarded("default")), "the guards changed a token"
        ways = {
            "transformers generate": plain,
            "guards default": lambda: guarded("default"),
            "guards off": lambda: guarded("off"),
        }
        show(f"{NEW_TOKENS} tokens after a prompt of {TOKENS}, 0.6B, {dtype}, greedy", interleaved(ways))
    for name in ("transformers", "default"):
        command = [sys.executable, __file__, "--generate", str(folder), name]
        peaks = [int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(3)]
        print(f"  peak memory of a process that generates, bf16, {name:14s} {min(peaks) * 1024 / 1e9:.3f} GB")


def generate_once(folder: str, how: str) -> None:
    """One generation in this process, and its peak memory on stdout, in KiB."""
    models = Models(open_checkpoint(Path(folder), folder), torch.device("cpu"), None)
    ids = some_ids()
    more = {} if how == "transformers" else {"custom_generate": decoder(Path(folder), models, "bf16", "default")}
    models.get("bf16").generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, **more)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def exporting() -> None:
    """A rescaled 0.6B-shaped checkpoint written to disk, against copying its files; both to the disk itself."""
    folder = checkpoint("0.6B")
    target = FOLDER / "export"

    def copy() -> None:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for path in folder.iterdir():
            shutil.copyfile(path, target / path.name)
            with (target / path.name).open("rb+") as file:
                os.fsync(file.fileno())

    def export() -> None:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        export_once(str(folder), str(target))

    show(
        "a 0.6B-shaped checkpoint, every tensor of the stream rescaled, to fp16",
        interleaved({"copying its files": copy, "export, with hashes": export}),
    )
    shutil.rmtree(target)
    target.mkdir()
    command = [sys.executable, __file__, "--export", str(folder), str(target)]
    peaks = []
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    shutil.rmtree(target)
    print(f"  peak memory of a process that exports {min(peaks) * 1024 / 1e9:.3f} GB")


def sweeping() -> None:
    """4,096 first tokens of a 0.6B-shaped checkpoint: seconds in all, and for a thousand tokens."""
    folder = checkpoint("0.6B")
    seconds = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "run.json"
            command = [
                sys.executable,
                "-m",
                "qwen_precision",
                "probe",
                str(folder),
                "--prompt",
                "a",
                "--dtype",
                "fp16",
                "--sweep",
                "first-token",
                "--sweep-limit",
                "4096",
                "-o",
                str(out),
                "--fail-on",
                "never",
            ]
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            sweep = json.loads(out.read_text())["sweep"]
            seconds.append((time.perf_counter() - started, float(sweep["seconds"]), sweep["layers"]))
    whole, alone, layers = min(seconds)
    print(
        f"\nsweep of 4,096 first tokens, 0.6B, {layers} layers: {whole:.1f} s whole command, "
        f"{alone:.1f} s the sweep, {alone / 4.096:.2f} s a thousand tokens"
    )


def on_a_card() -> None:
    """The same three questions on a CUDA card: watched against bare, a probe against plain, guarded against plain."""
    if not torch.cuda.is_available():
        print("\non a card: there is none here, so nothing was measured")
        return
    print(f"\n{torch.cuda.get_device_name()}")
    for shape in ("0.6B", "8B"):
        folder = checkpoint(shape)
        watched_on_a_card(folder)
        probed_on_a_card(folder)
        guarded_on_a_card(folder)


def synchronised(run: Callable[[], object]) -> Callable[[], object]:
    """Until the card is done."""

    def whole() -> None:
        run()
        torch.cuda.synchronize()

    return whole


def loaded_on_a_card(folder: Path, name: str) -> Any:
    """A model as a person would load it, in one dtype, straight onto the card."""
    torch_dtype = getattr(torch, DTYPES[name].torch_name)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype, device_map="cuda")
    return model.eval()


def watched_on_a_card(folder: Path) -> None:
    """A resident forward: bare, and with every operation watched."""
    ids = some_ids("cuda")
    for name in ("fp16", "bf16"):
        model = loaded_on_a_card(folder, name)

        def watched(model: Any = model) -> None:
            with qwen_precision.watch(model):
                model(ids, use_cache=False)

        ways = {"bare forward": lambda model=model: model(ids, use_cache=False), "qwen_precision.watch": watched}
        with torch.inference_mode():
            show(
                f"{folder.name} on the card, {TOKENS} tokens, {name}",
                interleaved({way: synchronised(run) for way, run in ways.items()}),
            )


def probed_on_a_card(folder: Path) -> None:
    """Three dtypes: one probe against three plain loads and forwards, in this process."""
    settings = load_settings(None, {"max_tokens": TOKENS, "device": "cuda"})

    def plain() -> None:
        for name in DTYPES:
            model = loaded_on_a_card(folder, name)
            with torch.inference_mode():
                torch.isfinite(model(some_ids("cuda"), use_cache=False).logits).all().item()

    def ours() -> None:
        run = measure(prepare(str(folder), settings, [PromptSpec(name="text", text=TEXT)]))
        assert run.stopped is None

    show(
        f"three dtypes of {folder.name} on the card",
        interleaved({"three plain loads and forwards": plain, "probe": ours}, FEW),
    )


def guarded_on_a_card(folder: Path) -> None:
    """Guards on against transformers' own generate: greedy, the same tokens."""
    ids = some_ids("cuda")
    models = Models(open_checkpoint(folder, str(folder)), torch.device("cuda"), None)
    model = models.get("fp16")
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}

    def generated(**more: Any) -> torch.Tensor:
        return model.generate(ids, attention_mask=torch.ones_like(ids), **length, **more)

    def guarded() -> torch.Tensor:
        return generated(custom_generate=decoder(folder, models, "fp16", "default"))

    assert torch.equal(generated(), guarded()), "the guards changed a token"
    show(
        f"{NEW_TOKENS} tokens after {TOKENS}, {folder.name} on the card, fp16, greedy",
        interleaved({"transformers generate": generated, "guards default": guarded}),
    )


def export_once(folder: str, target: str) -> None:
    """One export in this process."""
    rescaling = Rescaling(stream=4, qk_norm=True, final_norm=4, untied=False, eps=1e-6, layers=[])
    opened = open_checkpoint(Path(folder), folder)
    Exporter(opened, rescaling, "fp16", lambda done, total, what: None).write(Path(target))


PARTS: dict[str, Callable[[], None]] = {
    "watch": watch_overhead,
    "generate": generating,
    "export": exporting,
    "sweep": sweeping,
    "small": small,
    "large": large,
    "whole": whole,
    "linear": linear,
    "arithmetic": arithmetics,
    "card": on_a_card,
    **{name: partial(part, FOLDER) for name, part in bench_many.PARTS.items()},
}


def main() -> None:
    """Run the parts that were asked for."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if sys.argv[1:2] == ["--plain"]:
        plain_forward(sys.argv[2], sys.argv[3])
        return
    if sys.argv[1:2] == ["--generate"]:
        generate_once(sys.argv[2], sys.argv[3])
        return
    if sys.argv[1:2] == ["--export"]:
        export_once(sys.argv[2], sys.argv[3])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    for name in sys.argv[1:] or list(PARTS):
        PARTS[name]()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"\n(this process's own peak: {peak:.1f} GB)")


if __name__ == "__main__":
    main()
