"""Decides: from the facts of a Run to findings, the cause of each, a verdict, an exit code; what to run next.

Other folders import the names below, from here. No torch.
May import: record, qwen3, settings.
"""

from qwen_precision.judge.checks import CHECKS, Subject, judge
from qwen_precision.judge.columns import Columns
from qwen_precision.judge.compare import Changes, changes
from qwen_precision.judge.controls import Candidate, asked, candidates, starts_at
from qwen_precision.judge.corpus import SHARES, outcomes, standing_for
from qwen_precision.judge.degenerate import at_the_end
from qwen_precision.judge.engines import with_engines
from qwen_precision.judge.findings import (
    Across,
    Corpus,
    EngineVerdict,
    Finding,
    Headroom,
    Limits,
    Place,
    Report,
    Token,
    exit_code_of,
    rescue_exit_code,
)
from qwen_precision.judge.groups import Group, grouped
from qwen_precision.judge.logitcost import Cost, Length, a_step, cost, sized
from qwen_precision.judge.logits import (
    Bought,
    SoftmaxStep,
    bought,
    bought_by_row,
    lost_by_hand,
    softmax_steps,
    together,
)
from qwen_precision.judge.meanings import CAUSES, Meaning
from qwen_precision.judge.needs import (
    ANSWER,
    FAR,
    LOGITS,
    HeadroomGain,
    Needs,
    answer_of,
    beyond,
    headroom_gains,
    needs,
)
from qwen_precision.judge.nextcommand import next_command, next_rescue, next_sweep, quoted_for_a_shell, same_again
from qwen_precision.judge.poisoned import with_fresh_engines
from qwen_precision.judge.precision import Precision, Sums, sums
from qwen_precision.judge.surroundings import closeup_of, massive_channels, run_up

__all__ = [
    "ANSWER",
    "CAUSES",
    "CHECKS",
    "FAR",
    "LOGITS",
    "SHARES",
    "Across",
    "Bought",
    "Candidate",
    "Changes",
    "Columns",
    "Corpus",
    "Cost",
    "EngineVerdict",
    "Finding",
    "Group",
    "Headroom",
    "HeadroomGain",
    "Length",
    "Limits",
    "Meaning",
    "Needs",
    "Place",
    "Precision",
    "Report",
    "SoftmaxStep",
    "Subject",
    "Sums",
    "Token",
    "a_step",
    "answer_of",
    "asked",
    "at_the_end",
    "beyond",
    "bought",
    "bought_by_row",
    "candidates",
    "changes",
    "closeup_of",
    "cost",
    "exit_code_of",
    "grouped",
    "headroom_gains",
    "judge",
    "lost_by_hand",
    "massive_channels",
    "needs",
    "next_command",
    "next_rescue",
    "next_sweep",
    "outcomes",
    "quoted_for_a_shell",
    "rescue_exit_code",
    "run_up",
    "same_again",
    "sized",
    "softmax_steps",
    "standing_for",
    "starts_at",
    "sums",
    "together",
    "with_engines",
    "with_fresh_engines",
]
