"""What a probe did not see, so that no silence is taken for a pass: modules that never ran, operations not reached."""

from collections.abc import Iterator

from qwen_precision.judge import Report
from qwen_precision.render.text import count

_MOST = 4


def not_seen(report: Report) -> Iterator[str]:
    """A sentence each; none where everything was seen."""
    run = report.run
    for words in report.corpus.missing if report.corpus is not None else ():
        yield f"Not seen: {words}."
    if report.corpus is not None:
        yield from report.corpus.do
    if run.generation is not None:
        return
    if run.not_run:
        names = ", ".join(run.not_run[:_MOST]) + (" …" if len(run.not_run) > _MOST else "")
        yield f"Not seen: {count(len(run.not_run), 'module')} never ran ({names})."
    device = next((each.value for each in run.choices if each.what == "device"), "cpu")
    if device == "mps":
        yield "Not run on a real Apple GPU yet by its makers: where mps surprises, compare with --device cpu."
    for dtype in run.dtypes:
        mine = [each for each in run.passes if each.dtype == dtype]
        missing = len(run.prompts) - len(mine)
        if missing:
            yield f"Not seen: {dtype} did not start on {count(missing, 'prompt')}."
        replaced = sorted({seed.layer for each in mine for seed in each.reseeded})
        if replaced:
            yield (
                f"Not seen: from layer {replaced[0]} on some rows of {dtype} ran on the reference's hidden states, "
                "because their own were no longer finite."
            )
