"""``-o repro.py``: the finding as forty lines of torch and transformers, for those who have nothing of ours.

Every string of the record goes in as an ASCII literal, or, into a comment, without control characters; and none into
the first two lines, in which Python would read "coding: …" as the encoding of all that follows.
"""

import math
import re
from textwrap import wrap

from qwen_precision.dtypes import DTYPES
from qwen_precision.qwen3 import placed
from qwen_precision.record import Model, ScaleFault, Weight
from qwen_precision.render.repro.case import Case, case_of, gguf_of
from qwen_precision.render.text import safe
from qwen_precision.render.view import View
from qwen_precision.render.words import logits

LONGEST = 40
"""Lines of a script."""

_WIDTH = 118
_ID_LINES = 4
"""Lines that the token ids may take before they stand in one long line."""

_TOP = (
    "# Runs fixed token ids through a checkpoint. Arguments: another folder, another dtype. torch, transformers only."
)

_SIFT = [
    "def seen(value):  # the rows and positions whose numbers count",
    "    masks = look, look.flatten(), look.any(1)  # of [rows, tokens, ...], [rows * tokens, ...] and [rows, ...]",
    "    return value[next((mask for mask in masks if value.shape[: mask.dim()] == mask.shape), ...)]",
]

_STATE = (
    'names, running, bad = {module: name or "the model" for name, module in model.named_modules()}, ["the model"], []'
)

_HOOK = """\
def hook(module, args, *out):  # before a module with what goes in, after it with what it gives
    where, values = (running.pop(), out[0]) if out else (running[-1], args)
    for value in values if isinstance(values, tuple) else (values,):
        if isinstance(value, torch.Tensor) and not torch.isfinite({seen}).all():
            bad.append(where)
    if not out:
        running.append(names[module])"""

_HOOKED = [
    "for module in model.modules():",
    "    module.register_forward_pre_hook(hook)",
    "    module.register_forward_hook(hook)",
]

_SAMPLED = """\
told |= {{"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}}
try:
    scores = model.generate(ids, attention_mask=mask, **told).scores[0]{rows}
except RuntimeError as error:  # torch refuses to draw
    raise AssertionError(f"{{error}}; first module that is not finite: {{bad[:1]}}") from error
print(f"first module that is not finite: {{bad[:1]}}")"""

_ASSERTS = {
    "answer": 'assert finite, f"not finite from {first} on"',
    "modules": 'assert not bad, f"not finite in {first}"',
    "spread": 'assert (answer.amax(-1) > answer.amin(-1)).all(), "all logits are equal"',
    "scores": 'assert torch.isfinite(scores.amax(-1)).all(), "sampling leaves nothing to draw from"',
}

_SAMPLER = "do_sample temperature top_k top_p min_p typical_p repetition_penalty no_repeat_ngram_size".split()


def render_repro(view: View) -> str:
    """The script of a view; of several reports, of the first that fails.

    Raises:
        UsageError: it was redacted, or holds no token ids.
    """
    case = case_of(view)
    damaged = case.damaged
    told = _logits(case)
    notes = [f"# {part}" for line in told for part in wrap(line, _WIDTH - 2)]
    # What has no room goes: lines of ids first, then blank ones, then the length of the notes.
    layouts = [(notes, ids, between) for ids in (_wrapped(case), [_literal(case)]) for between in ("\n\n", "\n")]
    for kept, ids, between in [
        *layouts,
        ([f"# Logits: {logits.in_short(case.report, case.dtype)}"] * bool(told), [_literal(case)], "\n"),
        ([], [_literal(case)], "\n"),
    ]:
        blocks = _of_a_tensor(case, damaged, kept) if damaged is not None else _of_a_forward(case, ids, kept)
        text = between.join("\n".join(block) for block in blocks if block) + "\n"
        if text.count("\n") <= LONGEST:
            return text
    return text


def _of_a_forward(case: Case, ids: list[str], notes: list[str]) -> list[list[str]]:
    hook = _HOOK.format(seen="seen(value)" if case.sifted else "value")
    run = _sampled(case) if case.asserts == "scores" else [*_forward(case), *_said(case)]
    return [
        [_TOP, *_imports(case)],
        ["import torch", "import transformers"],
        [
            *_found(case),
            *notes,
            f"MODEL = {_source(case.report.run.model)}",
            _asked(case),
            *ids,
            *_model(case),
            *_tensors(case),
        ],
        [_STATE],
        _SIFT if case.sifted else [],
        [hook],
        _HOOKED,
        [*run, *_end(case, _ASSERTS[case.asserts])],
    ]


def _of_a_tensor(case: Case, damaged: Weight | ScaleFault, notes: list[str]) -> list[list[str]]:
    """The file is at fault by itself: one tensor is read, and no forward is needed to see it."""
    model = case.report.run.model
    fine, what = _fine(case, damaged)
    return [
        [_TOP, *_imports(case)],
        ["import torch", "from safetensors import safe_open", "from transformers.utils import cached_file"],
        [*_found(case), *notes, f"MODEL = {_source(model)}", f"FILE, NAME = {damaged.file!a}, {damaged.name!a}"],
        [
            f'with safe_open(cached_file(MODEL, FILE{_which(model)}), framework="pt") as file:',
            "    tensor = file.get_tensor(NAME)",
            f"bad = int((~({fine})).sum())",
            f'print(f"{{NAME}} in {{FILE}}: {{bad}} of {{tensor.numel()}} numbers are {what}")',
            *_end(case, f'assert not bad, f"{{NAME}} holds numbers that are {what}"'),
        ],
    ]


def _fine(case: Case, damaged: Weight | ScaleFault) -> tuple[str, str]:
    """The expression that is true of a good number, and what the others are."""
    if isinstance(damaged, Weight):
        return f"torch.isfinite(tensor.float().to({_dtype(case)}))", f"not finite in {case.dtype}"
    if damaged.kind == "unwritten":
        return f"tensor.float() != {float(damaged.value)!r}", "what scales are filled with before they are read"
    if damaged.kind == "zero":
        return "tensor.float() != 0", "zero"
    if "MXFP" in case.told.get("weights", ""):  # there bytes are exponents, and other scales may lie beside them
        what = "NaN" if damaged.kind == "nan" else "not finite"
        return "tensor != 255 if tensor.dtype is torch.uint8 else torch.isfinite(tensor.float())", what
    return "torch.isfinite(tensor.float())", "not finite"


def _imports(case: Case) -> list[str]:
    demo, forward = case.report.run.model.source == "demo", case.damaged is None and case.asserts != "scores"
    names = ["inspect"] * (forward and not case.causal and not case.replay) + ["sys"]
    found = ["from importlib.util import find_spec  # the demo lies in the package qwen-precision: install that"]
    return [*(f"import {name}" for name in names), *(found * demo)]


def _found(case: Case) -> list[str]:
    """What was found, with what it was measured, and how it is made here."""
    run, finding = case.report.run, case.finding
    said = f"{case.dtype} is {case.verdict}"
    if finding is not None:
        place = finding.place
        where = f"{placed(place.layer, place.name)}, in {place.module} ({place.op})"
        if place.step is not None and place.site is None:
            where = f"the logits of row {place.row} at step {place.step}"  # where it starts is printed below
        said += f": {finding.kind}, {where}"
    told = [f"{name} {run.environment[name]}" for name in ("torch", "transformers") if name in run.environment]
    measured = f"Measured with {', '.join([*told, case.told.get('device', 'cpu')])}."
    lines = (said, " ".join([measured, *_how(case)]), *_computed(case))
    return [f"# {safe(text, _WIDTH - 2)}" for text in lines]


def _logits(case: Case) -> list[str]:
    """What float32 logits buy in the script's dtype, and cost."""
    return [f"Logits: {line}" for about, line in logits.in_brief(case.report) if about in (case.dtype, "cost")]


def _computed(case: Case) -> list[str]:
    """What a script does not do that the run did: it would take more lines than there are."""
    told = case.told.get("arithmetic")
    if told is None or case.damaged is not None:
        return []
    return [f"Measured with --arithmetic {told}; this computes as torch does on its device, and may not fail."]


def _how(case: Case) -> list[str]:
    """What a reader has to know of how the forward is made."""
    failed, weights = case.prompt.failed, case.told.get("weights")
    if case.damaged is None and weights is not None:
        return [f"Measured on weights {weights}: kernels for quantised ones may round otherwise."]
    if case.replay:
        known = case.report.run.generation is None
        return [f"Step {case.step} as generated: {'one forward is finite' if known else 'one forward may be finite'}."]
    return [f"One forward of the ids of step {failed.step} shows it."] if failed is not None and failed.step else []


def _literal(case: Case) -> str:
    return f"IDS = {[row.ids for row in case.prompt.rows]}"


def _wrapped(case: Case) -> list[str]:
    """The literal in a few lines, or in one where that would take too many."""
    lines = wrap(_literal(case), _WIDTH, subsequent_indent="       ", break_long_words=False)
    return lines if len(lines) <= _ID_LINES else [_literal(case)]


def _model(case: Case) -> list[str]:
    """The lines that load it as the run had it."""
    model, name = case.report.run.model, case.report.run.model.architecture
    found = (
        f"transformers.{name}" if re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) else f"getattr(transformers, {name!a})"
    )
    if case.told.get("lm_head") == "not run":
        found = "transformers.AutoModel"  # the class that was run would make an lm_head up
    attention = case.told.get("attention", "unknown")
    asked = "" if attention == "unknown" else f"attn_implementation={attention!a}, "
    return [
        f"model = {found}.from_pretrained(MODEL{_which(model)}, dtype=DTYPE,",
        f"    {asked}use_safetensors=True).to({case.told.get('device', 'cpu')!a})",
    ]


def _tensors(case: Case) -> list[str]:
    """Ids and mask ``[rows, tokens]``, padded on the left with what the tokenizer names; and whose numbers count."""
    lines = ["ids = torch.tensor(IDS, device=model.device)", "mask = torch.ones_like(ids)"]
    if case.padded:
        which = _which(case.report.run.model)
        lines = [
            f'tok = transformers.AutoTokenizer.from_pretrained(MODEL{which}, padding_side="left")',
            "tok.pad_token = tok.pad_token or tok.eos_token",
            'ids, mask = tok.pad({"input_ids": IDS}, return_tensors="pt").to(model.device).values()',
        ]
    if case.replay or case.padded:
        lines.append("positions = (mask.cumsum(-1) - 1).clamp(min=0)")
    if case.padded or case.rows:
        chosen = [[int(not case.rows or row in case.rows)] for row in range(len(case.prompt.rows))]
        rows = f" & torch.tensor({chosen}, device=model.device).bool()" if case.rows else ""
        lines.append(f"look = real = mask.bool(){rows}")
    return lines


def _forward(case: Case) -> list[str]:
    if case.replay:
        return _replayed(case)
    given = {"attention_mask": "mask", **({"position_ids": "positions"} if case.padded else {}), "use_cache": "False"}
    if case.causal:
        call = ", ".join(f"{key}={value}" for key, value in given.items())
        return ["with torch.inference_mode():", f"    out = model(input_ids=ids, {call})"]
    call = ", ".join(f'"{key}": {value}' for key, value in given.items())
    return [
        f"given = {{{call}}}",
        "takes = inspect.signature(model.forward).parameters",
        "with torch.inference_mode():",
        "    out = model(input_ids=ids, **{key: value for key, value in given.items() if key in takes})",
    ]


def _replayed(case: Case) -> list[str]:
    """The prompt, whole or in chunks, then a token at a time, from one cache."""
    first = case.prompt.rows[0]
    total = first.padding + len(first.ids)
    start = total - case.step
    mask = "attention_mask=mask[:, :end], " if case.padded else ""
    last = ", logits_to_keep=1" if case.causal else ""
    spans = "begin, end in zip(cuts, cuts[1:])"
    if case.sifted:
        spans = "begin, end, look in ((a, b, real[:, a:b]) for a, b in zip(cuts, cuts[1:]))"
    return [
        f"cuts = [*range(0, {start}, {case.chunk or start}), *range({start}, {total + 1})]",
        "cache = transformers.DynamicCache(config=model.config)",
        "with torch.inference_mode():",
        f"    for {spans}:",
        f"        out = model(ids[:, begin:end], {mask}position_ids=positions[:, begin:end],",
        f"            past_key_values=cache, use_cache=True{last})",
    ]


def _said(case: Case) -> list[str]:
    """What is printed of the answer."""
    counted = case.padded or bool(case.rows)
    if case.replay:
        answer = "out.logits[:, -1]" + (f"[{list(case.rows)}]" if case.rows else "")
    elif case.causal:
        answer = "out.logits[real]" if counted else "out.logits"
    else:
        answer = 'out["logits"] if "logits" in out else out[0]'
    lines = [f"answer = {answer}"]
    if counted and not case.replay and not case.causal:
        lines.append("answer = answer[real] if answer.dim() == 3 else answer")
    return [
        *lines,
        'finite, first = bool(torch.isfinite(answer).all()), bad[0] if bad else "none"',
        'print(f"first module that is not finite: {first}; the answer is finite: {finite}")',
    ]


def _sampled(case: Case) -> list[str]:
    """One token drawn as it was, by transformers' own generation."""
    made = case.report.run.generation
    options = made.options if made is not None else {}
    numbers = {key: value for key, value in options.items() if isinstance(value, (bool, int, float))}
    told = {key: numbers[key] for key in _SAMPLER if math.isfinite(numbers.get(key, math.nan))}
    rows = f"[{list(case.rows)}]" if case.rows else ""
    return [f"told = {told}", _SAMPLED.format(rows=rows)]


def _end(case: Case, last: str) -> list[str]:
    if case.verdict in ("ok", "fail"):
        return [last]
    return [f"# Nothing is asserted: {case.dtype} is judged {case.verdict}, which is no failure."]


def _asked(case: Case) -> str:
    return f'DTYPE = getattr(torch, sys.argv[2] if sys.argv[2:] else "{DTYPES[case.dtype].torch_name}")'


def _dtype(case: Case) -> str:
    return f"torch.{DTYPES[case.dtype].torch_name}"


def _which(model: Model) -> str:
    """The arguments that say which revision, and which file where it is GGUF."""
    gguf = gguf_of(model)
    file = f", gguf_file={gguf[1]!a}" if gguf else ""
    return (f", revision={model.revision!a}" if model.revision else "") + file


def _source(model: Model) -> str:
    """Where the checkpoint is; the demo lies in our package, wherever that is installed."""
    gguf = gguf_of(model)
    where = ascii(gguf[0] if gguf else model.source)
    if model.source == "demo":
        where = 'find_spec("qwen_precision").submodule_search_locations[0] + "/demo"'
    return f"sys.argv[1] if sys.argv[1:] else {where}"
