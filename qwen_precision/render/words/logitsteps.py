"""What a softmax in its dtype does to each step of a generated text, in cells."""

from qwen_precision.judge import Report, SoftmaxStep, softmax_steps
from qwen_precision.render.text import number, quoted

COLUMNS = ("row", "step", "token", "dtype", "log-prob.", "error", "mass lost", "tied", "next")

_MOST = 12
_TOKEN = 12
"""Signs of a token."""


def title(report: Report) -> str:
    """Of the table: which steps it has."""
    found = len(_steps(report))
    which = f"at the {_MOST} worst of {found:,} steps" if found > _MOST else "step by step"
    return f"What they buy {which}"


def rows(report: Report) -> list[tuple[str, ...]]:
    """A row a step, of ``COLUMNS``, in order: of many those that change the next token, then those farthest off."""
    worst = sorted(_steps(report), key=lambda each: (not each.changed, -_off(each)))[:_MOST]
    return [
        (
            str(each.row),
            str(each.step),
            quoted(each.token, _TOKEN),
            each.dtype,
            number(each.logprob),
            number(each.error) if each.error is not None else "infinite",
            number(each.mass_lost),
            f"{each.ranks} of 10",
            "other" if each.changed else "same",
        )
        for each in sorted(worst, key=lambda each: (each.row, each.step))
    ]


def _steps(report: Report) -> list[SoftmaxStep]:
    return softmax_steps(report.run.generation) if report.run.generation is not None else []


def _off(step: SoftmaxStep) -> float:
    return abs(step.error) if step.error is not None else float("inf")
