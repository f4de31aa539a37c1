"""What a failure is not: each thing that was tried or checked and made no difference. Told by the run alone."""

from collections.abc import Iterator

from qwen_precision.dtypes import REFERENCE
from qwen_precision.judge import Finding, Report

_BY_CONTROL = (
    # (the control that must have failed alike, what that rules out, how it is told)
    ("same again", "chance", "the same again fails as well"),
    ("row alone", "batch and padding", "alone, without the batch and its padding, it fails as well"),
    ("sdpa", "attention implementation", "with sdpa it fails as well"),
    ("full reduction", "reduced-precision sums", "with sums in fp32 it fails as well"),
    ("token alone", "other tokens", "the token alone fails as well"),
    ("with the template", "chat template", "with the chat template it fails as well"),
    ("without the template", "chat template", "without the chat template it fails as well"),
    ("generated alone", "batch", "generated alone it fails as well"),
    ("prefilled whole", "chunked prefill", "prefilled whole it fails as well"),
    ("without cache", "KV cache", "without a cache it fails as well"),
)


def ruled_out(report: Report, finding: Finding) -> Iterator[tuple[str, str]]:
    """What an error is not, and how that is known; damage first, as that is what people suspect first."""
    run = report.run
    if finding.severity != "error":
        return
    if run.weight_totals and not run.scale_faults and not any(each.nan or each.inf for each in run.weights):
        yield "damaged file", "every tensor was read, and holds neither NaN nor infinity"
    others = [dtype for dtype, verdict in report.verdict.items() if verdict == "ok" and dtype != finding.dtype]
    if REFERENCE not in report.verdict and run.reference and finding.dtype != REFERENCE and not others:
        others = [REFERENCE] if _reference_is_finite(report) else []
    if others:
        yield "a broken model", f"finite in {' and '.join(others)}"
    outcomes = {each.what: each.outcome for each in finding.cause.tried}
    elsewhere = _clean_elsewhere(report, finding)
    doubted = {what for control, what, _ in _BY_CONTROL if control in elsewhere}
    for control, what, how in _BY_CONTROL:
        if outcomes.get(control) == "fails" and what not in doubted:
            yield what, how
    if run.generation is None and finding.place.step is None and finding.place.site is not None:
        yield "sampling", "one forward shows it, no token was drawn"


def _clean_elsewhere(report: Report, finding: Finding) -> set[str]:
    """Controls that were clean for another failing row of the dtype: of the checkpoint they rule nothing out."""
    explained = report.run.explanation
    return (
        {each.what for each in explained.controls if each.clean and each.dtype == finding.dtype} if explained else set()
    )


def _reference_is_finite(report: Report) -> bool:
    passes = [each for each in report.run.passes if each.dtype == REFERENCE]
    return bool(passes) and not any(each.failed for each in passes)
