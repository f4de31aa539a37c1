"""Advice: what the numbers of a run say of its settings and of float32 logits. Never more than an info; no torch.

Given only where a number says so: a softmax in a 16-bit dtype that is off by no more than the limits, or logits that
take less than ``MUCH``, are shown, and nothing is advised about them.
"""

import math
from collections.abc import Iterator

from qwen_precision.dtypes import DTYPES, REFERENCE
from qwen_precision.judge.columns import Columns
from qwen_precision.judge.findings import Cause, Finding, Magnitude, Place
from qwen_precision.judge.logitcost import Cost, a_step, cost, sized
from qwen_precision.judge.logits import Bought, lost_by_hand
from qwen_precision.judge.text import bad_settings, is_advised

MUCH = 1 << 30
"""Bytes of a prompt's logits from which on they are worth avoiding: a probe computes no more of them at once, and in
float32 it is what 1,766 tokens of Qwen3's vocabulary take."""


def advice(columns: Columns) -> Iterator[Finding]:
    """Settings that are known to make it worse; where logits are worth float32, and where they take too much memory."""
    yield from bad_settings(columns)
    if not is_advised(columns.run):
        return
    taken = cost(columns.run)
    for dtype, found in columns.bought.items():
        yield from _training(columns, dtype, found, taken)
        yield from _next_token(columns, dtype, found, taken)
        yield from _by_hand(columns, dtype, found)
    if taken is not None:
        yield from _long(columns, taken)


def _training(columns: Columns, dtype: str, found: Bought, taken: Cost | None) -> Iterator[Finding]:
    """The loss of training is off where its softmax is not in float32."""
    off, said = found.loss_error, []
    if (
        off is not None
        and found.loss is not None
        and found.loss_in_dtype is not None
        and off > _spared(columns, found, dtype)
    ):
        pair = f"{found.loss_in_dtype:.5g} in place of {found.loss:.5g}"
        said.append(f"the loss of {_whose(found)} is off by {off:.2g} nats a token ({pair})")
    if found.bad:
        said.append(f"the log-probability of {_of(found.bad, found.tokens, 'token')} is infinite")
    if not said:
        return
    memory = f" Those of the largest prompt here take {sized(taken.whole.float32)}." if taken is not None else ""
    do = (
        f"To train or fine-tune in {dtype}, keep the logits of the loss in float32 (transformers' own losses do: "
        f"logits.float() before cross_entropy).{memory} A fused loss (cut-cross-entropy, Liger Kernel) has its softmax "
        "in float32 and never holds all of them."
    )
    yield _finding(
        dtype, "loss", f"With its softmax in {dtype}, {' and '.join(said)}.", do, _evidence(columns, found, dtype)
    )


def _whose(found: Bought) -> str:
    row = f", row {found.row}," if found.row is not None else ""
    return f"prompt {found.prompt!r}{row}" if found.prompt is not None else "a prompt"


def _spared(columns: Columns, found: Bought, dtype: str) -> float:
    """Nats that a loss may be off: the limit, or half a step of the dtype there, as writing it down alone may do, as
    long as that is little."""
    step = DTYPES[dtype].eps * 2.0 ** (math.frexp(found.loss or 0.0)[1] - 1)
    return max(columns.limits.loss, min(step / 2, columns.limits.loss_most))


def _next_token(columns: Columns, dtype: str, found: Bought, taken: Cost | None) -> Iterator[Finding]:
    """What is sampled is another distribution where the softmax is not in float32."""
    mass = found.mass_lost or 0.0
    said = []
    if found.changed > max(1, columns.limits.next_tokens * found.rows):
        seen = " looked at" if columns.run.generation is None else ""
        said.append(f"{_of(found.changed, found.rows, 'next token')}{seen} change")
    if abs(mass) > columns.limits.mass:
        said.append(f"probabilities sum to {1 - mass:.4g}")
    if not said:
        return
    price = f" {a_step(taken)}" if taken is not None else ""
    do = f"Upcast the last position's logits before the softmax, as transformers' generate does.{price}"
    yield _finding(
        dtype, "next token", f"With the softmax in {dtype}, {' and '.join(said)}.", do, _evidence(columns, found, dtype)
    )


def _by_hand(columns: Columns, dtype: str, found: Bought) -> Iterator[Finding]:
    """What torch's kernels keep in float32 and an exported graph does not."""
    if not lost_by_hand(found):
        return
    said = (
        f"is not finite on {_of(found.by_hand_bad, found.rows, 'position')}"
        if found.by_hand_bad
        else f"sums to {1 - (found.by_hand or 0.0):.4g} at worst"
    )
    do = (
        "Where a softmax is written out (an exported graph, a kernel of your own), upcast the logits before it. "
        "torch.softmax on a graphics card keeps its sums in float32; on a CPU log_softmax of 16-bit logits does not."
    )
    yield _finding(
        dtype,
        "by hand",
        f"A softmax of which every step is rounded to {dtype} {said}.",
        do,
        _evidence(columns, found, dtype),
    )


def _long(columns: Columns, taken: Cost) -> Iterator[Finding]:
    """All logits of a long prompt are memory for nothing: only the last position's are sampled from. A probe foresees
    what a forward gives that is asked for nothing less; a text is told of what its own run held."""
    whole, last = taken.whole, taken.last
    if columns.run.generation is not None:
        yield from _held(taken)
    if columns.run.generation is not None or whole.float32 < MUCH:
        return
    rows = f"{whole.rows} rows of " if whole.rows > 1 else ""
    said = (
        f"A forward that is not asked for less gives the logits of all {rows}{whole.tokens:,} tokens: "
        f"{_both(taken, whole.float32, whole.narrow)}; those of the last position alone take {sized(last.float32)}."
    )
    do = (
        "For text, ask for the last position alone (logits_to_keep=1; transformers' generate does): that saves "
        f"{_both(taken, whole.float32 - last.float32, whole.narrow - last.narrow)}. "
        "Prefill in chunks (guard float32_logits), or use "
        "an engine made for long prompts (vLLM, SGLang)."
    )
    facts = tuple(f"{each.name}: {sized(each.float32)} in float32" for each in taken.longer)
    pieces = f", in {taken.pieces} pieces" if taken.pieces > 1 else ""
    held = (f"held at most here: {sized(taken.held)}{pieces}",) if taken.held is not None else ()
    yield _finding(taken.dtype, "long prompt", said, do, (*held, *facts), "memory")


def _both(taken: Cost, wide: int, narrow: int) -> str:
    """Bytes in float32 and in the narrowest dtype, where that is another."""
    return f"{sized(wide)} in float32" + (f", {sized(narrow)} in {taken.dtype}" if taken.dtype != REFERENCE else "")


def _held(taken: Cost) -> Iterator[Finding]:
    """A model that can be asked for the last position alone never holds more: of any other a whole chunk is held."""
    held, last = taken.held, taken.last.float32
    if held is None or held < MUCH or held <= last:
        return
    part = "chunk" if taken.pieces > 1 else "prompt"
    said = (
        f"{sized(held)} of logits were held at once, those of a whole {part}, where those of the last "
        f"position take {sized(last)} in float32: this model's forward has no logits_to_keep."
    )
    do = (
        f"Prefill in smaller chunks (guard float32_logits): half the {part} at once holds half of that, "
        f"{sized(held // 2)} less. Or use an engine made for long prompts (vLLM, SGLang)."
    )
    yield _finding(taken.dtype, "prefill", said, do, (), "memory")


def _evidence(columns: Columns, found: Bought, dtype: str) -> tuple[str, ...]:
    limits = columns.limits
    facts = [f"of the very same logits, on {found.tokens:,} tokens and {found.rows:,} next tokens"]
    if found.logprob_rms is not None and found.logprob_max is not None:
        facts.append(f"log-probability error {found.logprob_rms:.2g} nats RMS, {found.logprob_max:.2g} at most")
    if found.loss_error is not None and math.isfinite(found.loss_error):
        facts.append(f"loss error {found.loss_error:.2g} nats (limit {_spared(columns, found, dtype):.2g})")
    if found.mass_lost is not None:
        facts.append(f"probability mass lost {found.mass_lost:.2g} (limit {limits.mass:g})")
    return tuple(facts)


def _finding(dtype: str, name: str, said: str, do: str, facts: tuple[str, ...], op: str = "softmax") -> Finding:
    place = Place(layer=None, module="lm_head", op=op, name=f"logits, {name}")
    return Finding("advice", "info", dtype, place, Magnitude(), Cause(None, said, facts, do), origin=False)


def _of(count: int, whole: int, thing: str) -> str:
    return f"{count:,} of {whole:,} {thing}{'' if whole == 1 else 's'}"
