"""Steps of a generation that failed, and that a single forward of the same ids does not show: what makes them. Pure.

The step is made again as it was, and changed in one way at a time: its row alone, its prompt prefilled whole, without
a cache. What turns it clean is the cause. A step that fails in a single forward too has its origin there.
"""

from collections.abc import Iterator
from typing import NamedTuple

from qwen_precision.judge.columns import Columns
from qwen_precision.judge.findings import Cause, Finding, Magnitude, Place, Spread, Tried
from qwen_precision.qwen3 import name_of
from qwen_precision.record import REPLAYS, Control, FailedStep, Pass, Prompt, Replay, Site


class Unseen(NamedTuple):
    """A row whose logits failed at a step of a generation, and are finite in a single forward of the same ids."""

    prompt: Prompt
    number: int
    """Of the row."""
    failed: FailedStep

    @property
    def made(self) -> str:
        """How the step was made, in words."""
        rows, padded = len(self.prompt.rows), any(row.padding for row in self.prompt.rows)
        batch = f"in a batch of {rows}{', padded' if padded else ''}" if rows > 1 else "alone"
        chunks = f"prefilled {self.failed.chunk} tokens at a time" if self.failed.chunk else "prefilled whole"
        steps = self.failed.step
        return ", ".join([batch, chunks, *([f"then {steps} token{'s'[: steps > 1]} from the cache"] if steps else [])])

    def replays(self) -> Iterator[tuple[Replay, str]]:
        """Every way to make the step again that differs from the others, the first as it was; and each in words."""
        yield "as generated", f"step {self.failed.step} as generated ({self.made})"
        if len(self.prompt.rows) > 1:
            yield "generated alone", "as generated, but the row without the batch and its padding"
        if self.failed.chunk:
            yield "prefilled whole", "as generated, but the prompt prefilled whole"
        yield "without cache", "everything at once, without a cache"


def unseen(columns: Columns) -> list[Unseen]:
    """All such rows, prompt by prompt."""
    found = []
    for number, prompt in enumerate(columns.run.prompts):
        failed = prompt.failed
        each = columns.by_key.get((failed.dtype, number)) if failed is not None else None
        if failed is not None and each is not None and failed.dtype in columns.run.dtypes:
            rows = [row for row in failed.rows if _finite(columns, each, row)]
            found += [Unseen(prompt, row, failed) for row in rows]
    return found


def _finite(columns: Columns, each: Pass, row: int) -> bool:
    """Whether a row's logits came out finite, from a stream of its own in which nothing failed."""
    if row >= len(each.top1) or each.top1[row] is None:
        return False
    mine = [event for event in columns.origins(each) if event.row in (None, row)]
    return all(event.harmless or columns.spared(each, event) for event in mine)


def unseen_failure(columns: Columns) -> Iterator[Finding]:
    """Logits of a generation were not finite at a step, and are in a single forward of what it was given."""
    for each in unseen(columns):
        controls = _controls(columns, each)
        again = controls.get("as generated")
        began = again.began if again is not None else None
        yield Finding(
            kind="unseen-failure",
            severity="error" if again is not None and not again.clean else "warning",
            dtype=each.failed.dtype,
            place=_place(each, began),
            magnitude=Magnitude(),
            cause=_cause(each, controls, columns.run.explanation is not None),
            spread=Spread(prompts=(each.prompt.name,)),
            origin=began is not None,
        )


def _controls(columns: Columns, each: Unseen) -> dict[str, Control]:
    made = columns.run.explanation.controls if columns.run.explanation is not None else []
    about = (each.failed.dtype, each.prompt.name, each.number)
    return {c.what: c for c in made if c.what in REPLAYS and (c.dtype, c.prompt, c.row) == about}


def _place(each: Unseen, began: Site | None) -> Place:
    where = began or Site(layer=None, module="lm_head", op="logits", call=0)
    name = name_of(began.module, began.op, began.call) if began is not None else "logits"
    return Place(
        layer=where.layer,
        module=where.module,
        op=where.op,
        name=name,
        prompt=each.prompt.name,
        row=each.number,
        step=each.failed.step,
    )


def _cause(each: Unseen, controls: dict[str, Control], explained: bool) -> Cause:
    """What the controls say; where none ran, that, and how to have them."""
    at = f"The logits of row {each.number} were not finite at step {each.failed.step} of the generation ({each.made})"
    finite = "a single forward of the same ids is finite"
    again = controls.get("as generated")
    tried = tuple(Tried(c.what, c.detail, "clean" if c.clean else "fails") for c in controls.values())
    if again is None:
        why = "the controls that tell what made it were not run"
        left = "see what was not run, and why, under Controls" if explained else "probe it again without --no-explain"
        return Cause(None, f"{at}; {finite}, and {why}.", (), f"Let the step be made again: {left}.", tried)
    if again.clean:
        advice = "Generate it again, on the machine and with the versions it failed with: until it fails twice, no "
        return Cause(
            "not-told", f"{at}; {finite}, and so is the step made again.", (), f"{advice}cause is told.", tried
        )
    kinds = [(kind, advice) for what, (kind, advice) in _TOLD_BY.items() if what in controls and controls[what].clean]
    if not kinds:
        advice = f"Keep this prompt out of {each.failed.dtype}: no other way of making the step is clean."
        return Cause("not-told", f"{at}, and are not when it is made again; yet {finite}.", (), advice, tried)
    return Cause(kinds[0][0], f"{at}, and are not when it is made again; yet {finite}.", (), kinds[0][1], tried)


_TOLD_BY = {
    "generated alone": (
        "batch",
        "Generate this row by itself, or beside rows of its own length; its tokens are not the cause.",
    ),
    "prefilled whole": (
        "chunked-prefill",
        "Prefill the prompt whole: `float32_logits: {chunk: 0}` in a file given with --guards.",
    ),
    "without cache": (
        "cache",
        "The tokens are not the cause: look at the cache and at what reads it (try --attn, another transformers).",
    ),
}
"""By the control that is clean where the step as generated is not: the cause it tells, and what to do. Without a cache
there are no steps and no chunks either, so it is asked last."""
