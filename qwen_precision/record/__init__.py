"""The Run: everything a probe or a generation measured, as one frozen record that is saved, loaded and upgraded.

Other folders import the names below, from here. No torch.
May import: no other folder.
"""

from qwen_precision.record.closeup import Closeup, Contribution, Massive, Operand, Source
from qwen_precision.record.explanation import Control, ControlKind, Explanation, GreedyMatch, Sweep, Swept
from qwen_precision.record.file import MAX_BYTES, load, parse, save, to_json
from qwen_precision.record.generation import (
    FILTERED,
    MENDED,
    BadKind,
    Continuation,
    Finish,
    Generation,
    Kind,
    LogitsCost,
    Poison,
    ProbeSummary,
    SamplingError,
    Stretch,
    Trip,
    bad_trips,
    failing_step,
    mended_steps,
)
from qwen_precision.record.parts import in_words, rounded
from qwen_precision.record.rescue import Exported, LayerPowers, Loss, Rescaling, Rescue, Stuck
from qwen_precision.record.run import Choice, Event, Model, Pass, Prompt, Reseed, Row, Run, Site, Weight, WeightTotals

__all__ = [
    "FILTERED",
    "MAX_BYTES",
    "MENDED",
    "BadKind",
    "Choice",
    "Closeup",
    "Continuation",
    "Contribution",
    "Control",
    "ControlKind",
    "Event",
    "Explanation",
    "Exported",
    "Finish",
    "Generation",
    "GreedyMatch",
    "Kind",
    "LayerPowers",
    "LogitsCost",
    "Loss",
    "Massive",
    "Model",
    "Operand",
    "Pass",
    "Poison",
    "ProbeSummary",
    "Prompt",
    "Rescaling",
    "Rescue",
    "Reseed",
    "Row",
    "Run",
    "SamplingError",
    "Site",
    "Source",
    "Stretch",
    "Stuck",
    "Sweep",
    "Swept",
    "Trip",
    "Weight",
    "WeightTotals",
    "bad_trips",
    "failing_step",
    "in_words",
    "load",
    "mended_steps",
    "parse",
    "rounded",
    "save",
    "to_json",
]
