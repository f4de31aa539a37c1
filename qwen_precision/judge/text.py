"""Judgement of a generation: bad logits, the sampling error, text that says nothing, pad rows. Pure; no torch.

Bad logits that a guard mended or recovered from are a warning: the text is what healthy logits support, but the dtype
did fail. Left as they were, they are an error. A mere loop, with logits that were healthy, is told as an info.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from qwen_precision.judge.columns import Columns
from qwen_precision.judge.degenerate import Symptom, symptoms
from qwen_precision.judge.findings import Cause, Finding, Magnitude, Place, Spread
from qwen_precision.judge.nextcommand import to_its_origin
from qwen_precision.judge.poisoned import SWITCHES
from qwen_precision.record import (
    FILTERED,
    MENDED,
    Continuation,
    Generation,
    Run,
    SamplingError,
    Trip,
    bad_trips,
    mended_steps,
)
from qwen_precision.settings import Advice, GuardSettings


def _finding(run: Run, kind: str, severity: str, dtype: str, text: str, advice: str, **place: Any) -> Finding:
    """A finding about a generation; ``place`` is what is not the logits of the first prompt."""
    prompt = run.prompts[0].name if run.prompts else None
    where = {"layer": None, "module": "lm_head", "op": "logits", "name": "logits", "prompt": prompt, **place}
    return Finding(kind, severity, dtype, Place(**where), Magnitude(), Cause(None, text, (), advice), origin=False)


def nonfinite_logits(columns: Columns) -> Iterator[Finding]:
    """A row's logits were NaN, infinite or all equal at a step of a generation."""
    made = columns.run.generation
    if made is None:
        return
    for row in made.rows:
        for dtype in columns.run.dtypes:
            bad = [t for t in bad_trips(made.trips, row.row) if t.dtype == dtype and t.kind not in FILTERED]
            if bad:
                yield _bad_row(columns, made, row, bad)


def _bad_row(columns: Columns, made: Generation, row: Continuation, bad: list[Trip]) -> Finding:
    run, first = columns.run, bad[0]
    steps = {trip.step for trip in bad}
    done = [t for t in made.trips if t.acted and t.kind in MENDED and t.row == row.row and t.step in steps]
    mended = steps <= mended_steps(made.trips, row.row)
    cause = f"At step {first.step} of row {row.row}, {first.why}."
    if first.poisoned is not None:
        place = first.poisoned
        before = f"layer {place.layer - 1} or before" if place.layer else "the embedding"
        token = place.position - run.prompts[0].rows[row.row].padding
        where = f"token {token}" if token >= 0 else "a pad position"
        cause += (
            f" The KV cache is not finite from the {place.part} of layer {place.layer} on, first at {where}: "
            f"it starts in {before}."
        )
    elif "engine" in made.options:
        cause += f" The engine's KV cache was not looked at. {SWITCHES}"
    else:
        cause += " Its KV cache was finite."
    what = "; ".join(dict.fromkeys(f"{trip.why} (guard {trip.guard})" for trip in done))
    found = _finding(
        run,
        "nonfinite-logits",
        "warning" if mended else "error",
        first.dtype,
        cause,
        to_its_origin(run, row, columns.record),
        row=row.row,
        step=first.step,
    )
    size = Magnitude(nan=_whole(first.before.get("nan")), inf=_whole(first.before.get("inf")))
    with_done = found.cause._replace(done=f"{what[0].upper()}{what[1:]}." if what else "")
    return replace(found, magnitude=size, cause=with_done, spread=Spread(propagated=len(steps) - 1))


def _whole(value: float | None) -> int:
    return int(value) if value is not None and math.isfinite(value) else 0


def sampling_error(columns: Columns) -> Iterator[Finding]:
    """Torch refused to draw a token from the probabilities, or the filters left none."""
    made = columns.run.generation
    if made is None:
        return
    if made.error is not None:
        yield _refused(columns.run, made, made.error)
    for row in made.rows:
        # Unwatched, the guard epsilon is the only one that saw it.
        mine = [t for t in made.trips if t.row == row.row and (t.kind in FILTERED or t.guard == "epsilon")]
        if mine:
            yield _nothing_left(columns.run, made, row, mine)


def _refused(run: Run, made: Generation, error: SamplingError) -> Finding:
    rows = ", ".join(str(row) for row in error.rows)
    row = next((row for row in made.rows if error.rows and row.row == error.rows[0]), None)
    return _finding(
        run,
        "sampling-error",
        "error",
        row.stretches[-1].dtype if row and row.stretches else run.dtypes[0],
        f"Sampling ended at step {error.step} with torch's error for row {rows}: {error.message}.",
        "Run it again with the guards on (--guards default), or look for the origin with a probe.",
        row=row.row if row else None,
        step=error.step,
        name="sampling",
        op="multinomial",
    )


def _nothing_left(run: Run, made: Generation, row: Continuation, mine: list[Trip]) -> Finding:
    """The processors took every token, or took the scores out of range, although the logits were healthy."""
    steps, first = {trip.step for trip in mine}, mine[0]
    more = f", and so at {len(steps) - 1} later steps" if len(steps) > 1 else ""
    too_far, too_few = (
        "Bring temperature and repetition penalty nearer to 1.",
        "Loosen the filters (top-k, top-p, min-p, suppressed tokens).",
    )
    return _finding(
        run,
        "sampling-error",
        "warning" if steps <= mended_steps(made.trips, row.row) else "error",
        first.dtype,
        f"At step {first.step} of row {row.row}, {first.why}{more}.",
        too_far if first.kind == "overflowed" else too_few,
        row=row.row,
        step=first.step,
        name="sampling",
        op="softmax",
    )


def degenerate_text(columns: Columns) -> Iterator[Finding]:
    """The text is a run of one token ("!!!!"), descending ids or a short cycle; told apart by cause."""
    made = columns.run.generation
    if made is None:
        return
    settings = _settings(made)
    top_k = made.options.get("top_k") if made.options.get("do_sample") else 0
    for row in made.rows:
        for symptom in symptoms(row.ids, settings.degenerate, top_k if isinstance(top_k, int) else 0):
            yield _symptom(columns, made, row, symptom, settings.watch.enabled)
    yield from _same_whatever_the_seed(columns, made, settings)


def _symptom(columns: Columns, made: Generation, row: Continuation, symptom: Symptom, watched: bool) -> Finding:
    run, span = columns.run, range(symptom.start, symptom.end)
    mended = mended_steps(made.trips, row.row)
    bad = [t for t in bad_trips(made.trips, row.row) if t.step in span]
    left = [trip for trip in bad if trip.step not in mended]
    again = {t.step for t in made.trips if t.acted and t.kind == "recovered" and t.row == row.row}
    patched = {trip.step for trip in bad} - again
    ids = row.ids[symptom.start : symptom.end]
    looks = symptom.kind == "descending" or (symptom.kind == "run" and ids[0] == 0)
    what = _described(row, symptom)
    stretch = [each.dtype for each in row.stretches if each.start <= symptom.start]
    if left:
        cause = f"{what}: the logits were not usable at {len(left)} of these steps, so the text means nothing."
        severity, advice = "error", to_its_origin(run, row, columns.record)
    elif patched:
        cause = f"{what}: the logits were repaired at {len(patched)} of these steps."
        severity, advice = "warning", to_its_origin(run, row, columns.record)
    elif watched:
        healthy = "that its tokens come from were healthy" if bad else "were healthy all along"
        cause = f"{what}: the logits {healthy}, so the model merely repeats itself."
        severity, advice = "info", "This is not a numerical fault: sample, or raise the repetition penalty a little."
    elif looks:
        cause = f"{what}: this is what NaN logits print (the argmax of a NaN row is id 0); they were not watched."
        severity, advice = "error", "Run it again with the guard watch on."
    else:
        cause = f"{what}: whether the logits were healthy is not known, they were not watched."
        severity, advice = "info", "Run it again with the guard watch on."
    return _finding(
        run,
        "degenerate-text",
        severity,
        stretch[-1] if stretch else run.dtypes[0],
        cause,
        advice,
        row=row.row,
        step=symptom.start,
        name="generated text",
        op=symptom.kind,
    )


def _described(row: Continuation, symptom: Symptom) -> str:
    """What the text does, with a sample of it and of what stands before."""
    stop = symptom.start + (symptom.period or symptom.length)
    shown = "".join(row.tokens[symptom.start : stop])[:40]
    if not shown:  # redacted, or a token without text
        shown = "ids " + " ".join(str(each) for each in row.ids[symptom.start : stop][:8])
    tail = {"run": "over and over", "cycle": "again and again", "descending": "whose ids count down"}
    before = "".join(row.tokens[max(0, symptom.start - 8) : symptom.start])
    after = f" after {before!r}" if before else ""
    return f"{symptom.length} tokens from step {symptom.start} on are {shown!r} {tail[symptom.kind]}{after}"


def _same_whatever_the_seed(columns: Columns, made: Generation, settings: GuardSettings) -> Iterator[Finding]:
    """Rows draw from different random numbers; the same ids for different prompts, from logits that were bad or that
    nobody watched, come from no distribution. (Healthy logits that are sure of a text give it to both.)"""
    if not made.options.get("do_sample"):
        return
    seen: dict[tuple[int, ...], Continuation] = {}
    for row in made.rows:
        key = tuple(row.ids)
        other = seen.setdefault(key, row)
        bad = {t.step for t in bad_trips(made.trips, row.row)} - mended_steps(made.trips, row.row)
        if len(key) < settings.degenerate.run or other is row or other.input == row.input:
            continue
        if settings.watch.enabled and not bad:
            continue
        yield _finding(
            columns.run,
            "degenerate-text",
            "error",
            row.stretches[-1].dtype if row.stretches else columns.run.dtypes[0],
            f"Rows {other.row} and {row.row} have different prompts and were drawn with different random numbers, "
            f"yet their {len(key)} tokens are the same: the text depends on neither, as with NaN logits.",
            to_its_origin(columns.run, row, columns.record),
            row=row.row,
            step=0,
            name="generated text",
            op="sampling",
        )


def masked_rows(columns: Columns) -> Iterator[Finding]:
    """Only pad positions of a row's KV cache are not finite: what was made of its padding went bad, not its tokens."""
    made = columns.run.generation
    if made is None:
        return
    for trip in made.trips:
        if trip.poisoned is not None and trip.poisoned.in_padding:
            mended = trip.step in mended_steps(made.trips, trip.row)
            row = next((each for each in made.rows if each.row == trip.row), None)
            find = f" {to_its_origin(columns.run, row, columns.record)}" if row is not None else ""
            before = f"layers up to {trip.poisoned.layer - 1}" if trip.poisoned.layer else "the embedding"
            yield _finding(
                columns.run,
                "masked-row",
                "warning" if mended else "error",
                trip.dtype,
                f"In row {trip.row} only pad positions of the KV cache are not finite, from the {trip.poisoned.part} "
                f"of layer {trip.poisoned.layer} on: what {before} made of the left padding is where it starts. A "
                "generation does not tell an operation that overflowed there from a fully masked row that gave NaN.",
                f"Give this prompt alone, without padding.{find}",
                row=trip.row,
                step=trip.step,
                name="KV cache",
                op=trip.poisoned.part,
                layer=trip.poisoned.layer,
            )


def is_advised(run: Run) -> bool:
    """Whether advice is wanted: a generation has a guard that can be switched off."""
    return run.generation is None or _settings(run.generation).advice.enabled


def bad_settings(columns: Columns) -> Iterator[Finding]:
    """Settings of a generation that are known to make it worse; never more than an info."""
    made = columns.run.generation
    if made is not None and is_advised(columns.run):
        for name, cause, remedy in _bad_settings(columns.run, made, _settings(made).advice):
            yield _finding(columns.run, "advice", "info", columns.run.dtypes[0], cause, remedy, name=name, op="setting")


def _bad_settings(run: Run, made: Generation, limits: Advice) -> Iterator[tuple[str, str, str]]:
    temperature, penalty = made.options.get("temperature"), made.options.get("repetition_penalty")
    if made.options.get("do_sample") and isinstance(temperature, (int, float)) and temperature < limits.temperature:
        yield (
            "temperature",
            f"Sampling at temperature {temperature:g} divides every logit by it: near greedy, and nearer to overflow.",
            f"Use --greedy, or a temperature of {limits.temperature:g} to 1.",
        )
    if isinstance(penalty, (int, float)) and abs(penalty - 1) > limits.penalty:
        cause = f"A repetition penalty of {penalty:g} is far from 1: it distorts the distribution at every step."
        yield "repetition penalty", cause, "Stay near 1, 1.05 to 1.2 say."
    if made.chat and made.base_model:
        cause = f"A chat turn is given to what looks like a base model: {made.base_model}."
        yield "base model", cause, "Use an instruction-tuned checkpoint, or --raw."
    probe = made.probe
    dtype = run.settings.get("dtype")
    if probe is not None and probe.headroom is not None and probe.headroom < limits.headroom:
        cause = (
            f"The probe {probe.file} says {probe.verdict} for {dtype}: headroom {probe.headroom:.3g}x at {probe.where}."
        )
        yield "headroom", cause, "Other prompts may overflow: keep the guards on, or use a wider dtype."


def _settings(made: Generation) -> GuardSettings:
    """The guards of the run; a record from elsewhere may hold anything, then the defaults hold."""
    try:
        return GuardSettings.model_validate(made.guards)
    except ValueError:
        return GuardSettings()
