"""From a symptom to its origin: the `qprec probe` that is worth running after a generation went bad. Pure; no torch."""

import re
import shlex
import unicodedata

from qwen_precision.dtypes import DTYPES, RESCUED
from qwen_precision.judge.findings import Report
from qwen_precision.record import Continuation, Row, Run, failing_step
from qwen_precision.settings import ProbeSettings, configs_folder, flag_of, read_yaml

_LONGEST_PROMPT = 200  # characters; a longer one is read from the record


def next_probe(run: Run, row: Continuation, record: str = "RUN") -> str:
    """The command that leads from the symptom to its origin: a probe of what the failing step was given, id for id.

    Args:
        run: the generation.
        row: the row that failed.
        record: where the run is saved, as a word of a command line. Ids, mask and row are read from there, unless the
            row failed on nothing but a text that fits a command line.
    """
    parts = _start("probe", run)
    for key in ("attention", "device"):
        told = run.settings.get(key)
        parts += [f"{flag_of(key)} {quoted_for_a_shell(told)}"] if isinstance(told, str) and told != "auto" else []
    asked = run.settings.get("dtype")
    dtype = asked if isinstance(asked, str) and asked in DTYPES else run.dtypes[0] if run.dtypes else "fp16"
    plain = _prompt_alone(run, row) and len(row.input) <= _LONGEST_PROMPT
    return " ".join([*parts, f"--dtype {dtype}", _prompt(row.input) if plain else f"--prompts {record}"])


def to_its_origin(run: Run, row: Continuation, record: str = "RUN") -> str:
    """Advice that ends in the probe to run next; of a redacted run, which holds nothing to probe, in where to look."""
    if run.redacted:
        return "Find the origin: this record is redacted; the one it was made from names the probe to run."
    return f"Find the origin: {next_probe(run, row, record)}"


def _prompt(text: str) -> str:
    return f"--prompt {quoted_for_a_shell(text)}"


def _prompt_alone(run: Run, row: Continuation) -> bool:
    """Whether a row's text, tokenised, is what its failing step was given.

    Not after a step: a token that was drawn may merge with what stands before it, or be a part of a character. Not
    where a chat turn or a shorter prompt stands for the text, and not where it was one of a batch, or was chunked.
    """
    given, made = run.prompts[0].rows if run.prompts else [], run.generation
    if made is None or len(given) != 1 or failing_step(made, row.row) or (made.logits and made.logits.chunks > 1):
        return False
    return row.row == 0 and _as_given(row, given[0])


def _as_given(row: Continuation, given: Row) -> bool:
    """Whether nothing was put around a prompt's text, or cut off it, before it was tokenised."""
    return bool(row.input) and row.input == given.text


_TOLD = (
    "dtype",
    "attention",
    "max_tokens",
    "device",
    "memory",
    "arithmetic",
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "guards",
    "on_failure",
    "rescue_margin",
)
"""Settings that are flags with a value."""


def same_again(run: Run, record: str = "RUN") -> str:
    """The command that makes this run again; prompts that no text on a command line gives are read from the record.

    Of a redacted run, whose prompts are gone, a comment of a shell that says so.
    """
    if run.redacted:
        return "# The prompts are redacted: only the record that this one was made from gives the command."
    told = run.settings
    parts = _start(run.verb, run)
    if run.verb == "probe" and run.dtypes != list(DTYPES):
        parts += [f"--dtype {name}" for name in run.dtypes]
    for key in _TOLD:
        value, flag = told.get(key), flag_of(key)
        if key in ProbeSettings.model_fields and value == ProbeSettings.model_fields[key].default:
            continue
        if isinstance(value, (str, int, float)) and value not in ("auto", "default") and not isinstance(value, bool):
            parts.append(f"{flag} {quoted_for_a_shell(str(value))}")
    switches = {"do_sample": ("--do-sample", "--greedy"), "chat": ("--chat", ""), "reference": ("", "--no-reference")}
    for key, (on, off) in switches.items():
        if isinstance(told.get(key), bool):
            parts.append(on if told[key] else off)
    return " ".join(part for part in [*parts, *_prompts(run, record)] if part)


def _prompts(run: Run, record: str) -> list[str]:
    if run.verb == "probe" and {prompt.name for prompt in run.prompts} == _built_in():
        return []  # the prompts that a probe takes when it is given none
    if _texts_will_do(run):
        return [_prompt(row.text) for prompt in run.prompts for row in prompt.rows]
    return [f"--prompts {record}"]


def _texts_will_do(run: Run) -> bool:
    """Whether the prompts fit a command line as texts, and these texts give their ids as far as the record tells."""
    rows = [row for prompt in run.prompts for row in prompt.rows]
    if sum(len(row.text) for row in rows) > _LONGEST_PROMPT or not all(row.text for row in rows):
        return False
    if run.generation is not None and run.generation.rows:
        made = [row for row in run.generation.rows if row.row < len(rows)]
        return all(_as_given(row, rows[row.row]) for row in made)
    if any(prompt.failed for prompt in run.prompts):
        return False  # a text says nothing of the step that failed on it
    alone = run.verb == "generate" or all(len(prompt.rows) == 1 for prompt in run.prompts)
    return alone and all("".join(row.tokens) == row.text for row in rows)


def next_rescue(report: Report, record: str = "RUN") -> str | None:
    """The command that carries a planned rescue out, where it is possible and was not done; ``record`` is its file."""
    run, plan = report.run, report.run.rescue
    if run.redacted or plan is None or not plan.possible or plan.rescaling.changes_nothing or plan.exported is not None:
        return None
    parts = [part for part in re.split(r"[\\/]", run.model.source) if part not in ("", ".", "..")]
    folder = f"{parts[-1]}-fp16safe" if parts else "../model-fp16safe"  # the checkpoint is where the shell stands
    if run.verb == "probe":
        start = same_again(run, record)
    else:
        start = next((next_probe(run, row, record) for row in run.generation.rows), "") if run.generation else ""
        start = start.replace(" --dtype fp16", "")
    return f"{start} --rescue-to {quoted_for_a_shell(folder)}"


def next_sweep(report: Report) -> str | None:
    """The command that looks for tokens that reach further than the prompts did, where it was not done yet."""
    run = report.run
    if run.verb != "probe" or run.sweep is not None or run.stopped or RESCUED not in run.dtypes or not run.reference:
        return None
    return sweep(run, RESCUED, "first-token")


def sweep(run: Run, dtype: str, kind: str, record: str = "RUN") -> str:
    """The command of a search for triggers: first tokens, or the length of this run's prompts (``record`` is its file);
    of a redacted run, which holds none, the option for the latter."""
    if kind == "length" and run.redacted:
        return f"--sweep {kind}"
    told = run.settings.get("arithmetic")
    computed = [f"--arithmetic {quoted_for_a_shell(told)}"] if isinstance(told, str) and told != "native" else []
    prompts = _prompts(run, record) if kind == "length" else []
    return " ".join([*_start("probe", run), *computed, f"--dtype {dtype}", *prompts, f"--sweep {kind}"])


def _start(verb: str, run: Run) -> list[str]:
    parts = [f"qprec {verb}", quoted_for_a_shell(run.model.source)]
    return [*parts, f"--revision {quoted_for_a_shell(run.model.revision)}"] if run.model.revision else parts


def _built_in() -> set[str]:
    items = read_yaml(configs_folder() / "prompts" / "default.yaml", "prompts", "the built-in set")
    return {str(item["name"]) for item in items}


def quoted_for_a_shell(text: str) -> str:
    """One word of a command line; control and format characters spelled out, so that it is inert and one line."""
    if not any(_acts(char) for char in text):
        return shlex.quote(text)
    names = {"\n": "\\n", "\t": "\\t", "'": "\\'", "\\": "\\\\"}
    return "$'" + "".join(names.get(char) or _escaped(char) for char in text) + "'"


def _acts(char: str) -> bool:
    """Whether a terminal would do something with it other than show it."""
    return unicodedata.category(char)[0] == "C" or char in "\u2028\u2029"


def _escaped(char: str) -> str:
    if not _acts(char):
        return char
    return f"\\x{ord(char):02x}" if ord(char) < 128 else f"\\U{ord(char):08x}"


def next_command(report: Report, record: str) -> str | None:
    """The probe to run next, after a generation in which logits or text went bad; ``record`` is its file."""
    if report.run.redacted:
        return None
    made = report.run.generation
    kinds = {"nonfinite-logits", "sampling-error", "degenerate-text", "masked-row"}
    bad = [each for each in report.findings if each.kind in kinds and each.severity != "info"]
    rows = {row.row: row for row in made.rows} if made is not None else {}
    return next((next_probe(report.run, rows[each.place.row], record) for each in bad if each.place.row in rows), None)
