"""What the failing steps of a saved generation were given: rows of token ids, as they stood before each step."""

from qwen_precision.record import NOT_FINITE, FailedStep, Generation, Prompt, Row, bad_trips, failing_step


def failing_prompts(made: Generation, given: list[Row]) -> list[Prompt]:
    """What the failing steps of a generation were given, step by step."""
    steps = {row.row: failing_step(made, row.row) for row in made.rows if row.row < len(given)}
    if "engine" in made.options:  # rows of a trip file are requests, each for itself
        return [_alone(made, given, row, step) for row, step in steps.items() if step is not None]
    return [
        at_step(made, given, step, [row for row in steps if steps[row] == step])
        for step in sorted({step for step in steps.values() if step is not None})
    ]


def _alone(made: Generation, given: list[Row], row: int, step: int) -> Prompt:
    """What a step of one request of a serving engine was given."""
    failed = _failed(made, given, step, [row])
    told = failed.model_copy(update={"rows": [0]}) if failed is not None else None
    return Prompt(name=f"request {row}", rows=[_at(made, given[row], row, step)], failed=told)


def at_step(made: Generation, given: list[Row], step: int, failing: list[int]) -> Prompt:
    """What a step of a generation was given: the row, or the whole batch where there was more than one.

    Args:
        made: the generation.
        given: the rows of its prompt.
        step: how many tokens had been generated.
        failing: numbers of the rows that failed at it.
    """
    numbers = dict.fromkeys(row.row for row in made.rows if row.row < len(given))
    return Prompt(
        name=f"batch at step {step}" if len(given) > 1 else "row 0",
        rows=[_at(made, given[row], row, step) for row in numbers],
        failed=_failed(made, given, step, failing),
    )


def _failed(made: Generation, given: list[Row], step: int, rows: list[int]) -> FailedStep | None:
    """What the record says of a step; None where no logits were seen to be anything but finite."""
    trips = [trip for row in rows for trip in bad_trips(made.trips, row) if trip.step == step]
    dtypes = {trip.row: trip.dtype for trip in reversed(trips) if trip.kind in NOT_FINITE}
    if not dtypes:
        return None
    dtype = next(iter(dtypes.values()))  # a row leaves the dtype asked for when it fails, and not before: all agree
    guard = made.guards.get("float32_logits")
    chunk = guard.get("chunk") if isinstance(guard, dict) and guard.get("enabled") else 0
    chunked = isinstance(chunk, int) and 0 < chunk < len(given[0].ids) + given[0].padding
    return FailedStep(dtype=dtype, step=step, rows=sorted(dtypes), chunk=chunk if chunked else 0)


def _at(made: Generation, given: Row, row: int, step: int) -> Row:
    """A row as it was before a step; one that was over by then was filled up, unmasked, as transformers does it."""
    if not step:
        return given
    pad = made.options.get("pad_token_id")
    pad = next((each for each in (pad if isinstance(pad, list) else [pad]) if isinstance(each, int)), 0)
    own = next(each.ids for each in made.rows if each.row == row)[:step]
    ids = [*given.ids, *own, *[pad] * (step - len(own))]
    return given.model_copy(update={"text": "", "ids": ids})
