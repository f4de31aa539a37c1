"""What can be asked for, checked: settings behind flags and profiles, guards, engines, prompts, levels to fail on.

Other folders import the names below, from here. No torch.
May import: record.
"""

from qwen_precision.settings.config import (
    ARITHMETIC,
    ATTENTION,
    MAX_TEXT_BYTES,
    MEMORY,
    RESCUE_DTYPES,
    SWEEPS,
    GenerateSettings,
    ProbeSettings,
    Target,
    configs_folder,
    flag_of,
    load_generate_settings,
    load_settings,
    load_target,
    read_yaml,
)
from qwen_precision.settings.corpus import BLOCK_PROMPTS, DIGITS, Corpus, PromptBlock
from qwen_precision.settings.engines import ALL, EVIDENCE, VALUES, Engine, Option, Rule, engine_names, load_engines
from qwen_precision.settings.failedsteps import at_step
from qwen_precision.settings.firstids import first_ids
from qwen_precision.settings.guards import ON_FAILURE, Advice, Clamp, Degenerate, GuardSettings, Watch, load_guards
from qwen_precision.settings.levels import FAIL_ON, FAILING, SEVERITIES
from qwen_precision.settings.prompts import PromptSpec, is_counted, numbered, read_prompts, texts_of
from qwen_precision.settings.ranks import Rank, rank_of
from qwen_precision.settings.templates import TemplateFault, has_template, in_template
from qwen_precision.settings.tokens import as_batch, as_text, rendered, text_of, tokenise

__all__ = [
    "ALL",
    "ARITHMETIC",
    "ATTENTION",
    "BLOCK_PROMPTS",
    "DIGITS",
    "EVIDENCE",
    "FAILING",
    "FAIL_ON",
    "MAX_TEXT_BYTES",
    "MEMORY",
    "ON_FAILURE",
    "RESCUE_DTYPES",
    "SEVERITIES",
    "SWEEPS",
    "VALUES",
    "Advice",
    "Clamp",
    "Corpus",
    "Degenerate",
    "Engine",
    "GenerateSettings",
    "GuardSettings",
    "Option",
    "ProbeSettings",
    "PromptBlock",
    "PromptSpec",
    "Rank",
    "Rule",
    "Target",
    "TemplateFault",
    "Watch",
    "as_batch",
    "as_text",
    "at_step",
    "configs_folder",
    "engine_names",
    "first_ids",
    "flag_of",
    "has_template",
    "in_template",
    "is_counted",
    "load_engines",
    "load_generate_settings",
    "load_guards",
    "load_settings",
    "load_target",
    "numbered",
    "rank_of",
    "read_prompts",
    "read_yaml",
    "rendered",
    "text_of",
    "texts_of",
    "tokenise",
]
