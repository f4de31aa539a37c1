"""Whether the indices and names of a record fit the lists and tables they point into.

One that does not would crash a renderer later on; records come from strangers, so it is found on loading.
"""

from collections.abc import Iterator

from qwen_precision.dtypes import DTYPES, WIDER_MAX
from qwen_precision.record.run import Run

_DEEPEST = 12


def misfit(run: Run) -> str | None:
    """The key of the first reference that points nowhere, or None."""
    checks = (_depth, _prompts, _passes, _tables, _weights, _generation)
    return next((key for check in checks for key in check(run)), None)


def _depth(run: Run) -> Iterator[str]:
    """What may hold anything must at least not be nested without end."""
    made = run.generation
    for key, value in {
        "settings": run.settings,
        **({"generation": [made.options, made.guards]} if made else {}),
    }.items():
        level = [value]
        for _ in range(_DEEPEST):
            level = [
                item
                for each in level
                if isinstance(each, (dict, list))
                for item in (each.values() if isinstance(each, dict) else each)
            ]
        if level:
            yield key


def _prompts(run: Run) -> Iterator[str]:
    for number, each in enumerate(run.prompts):
        if each.failed is not None and not each.failed.fits([len(row.ids) for row in each.rows]):
            yield f"prompts.{number}.failed"


def _passes(run: Run) -> Iterator[str]:
    sites = len(run.sites)
    for number, each in enumerate(run.passes):
        if len(each.abs_max) != sites:
            yield f"passes.{number}.abs_max"
        if not 0 <= each.prompt < len(run.prompts) or each.dtype not in DTYPES:
            yield f"passes.{number}"
            continue
        rows = len(run.prompts[each.prompt].rows)
        if not rows or any(one.row >= rows for one in each.massive):
            yield f"passes.{number}.massive"
        for event in each.events:
            if not 0 <= event.site < sites or (event.row is not None and not 0 <= event.row < rows):
                yield f"passes.{number}.events"


def _tables(run: Run) -> Iterator[str]:
    sites = len(run.sites)
    if not {*run.dtypes} <= set(DTYPES):
        yield "dtypes"
    for table in run.wider.values():
        if any(not 0 <= site < sites or name not in {*DTYPES, *WIDER_MAX} for site, name in table.items()):
            yield "wider"
    if any(not (0 <= site < sites and 0 <= source < sites) for site, source in run.casts.items()):
        yield "casts"


def _weights(run: Run) -> Iterator[str]:
    if any(total.dtype not in DTYPES for total in run.weight_totals):
        yield "weight_totals"
    for weight in run.weights:
        if not {*weight.overflow, *weight.underflow, *weight.inexact} <= set(DTYPES):
            yield "weights"
    if any(fault.dtype not in {None, *DTYPES} for fault in run.scale_faults):
        yield "scale_faults"


def _generation(run: Run) -> Iterator[str]:
    made = run.generation
    if made is None:
        if run.verb == "generate":
            yield "generation"
        return
    rows = len(run.prompts[0].rows) if run.prompts else 0
    for number, each in enumerate(made.rows):
        numbers = (each.top1, each.margin, each.entropy, each.logprob, each.logprob_error, each.mass_lost)
        lengths = {len(each.tokens), *map(len, numbers), len(each.ranks), len(each.changed)}
        if not 0 <= each.row < rows or lengths != {len(each.ids)}:
            yield f"generation.rows.{number}"
        if any(stretch.dtype not in run.dtypes for stretch in each.stretches):
            yield f"generation.rows.{number}.stretches"
    for number, trip in enumerate(made.trips):
        if trip.row >= rows or trip.dtype not in run.dtypes:
            yield f"generation.trips.{number}"
    if made.error is not None and any(not 0 <= row < rows for row in made.error.rows):
        yield "generation.error"
