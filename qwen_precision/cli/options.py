"""Arguments and options of the command line that stand on their own, checked against the tables they come from."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from qwen_precision.cli import terminal
from qwen_precision.dtypes import DTYPE_ALIASES, DTYPES
from qwen_precision.report import NAMES
from qwen_precision.settings import ATTENTION, BLOCK_PROMPTS, FAIL_ON, RESCUE_DTYPES, SWEEPS, flag_of


def given(context: typer.Context, settings: type[BaseModel]) -> dict[str, Any]:
    """What was asked for on the command line, by the names of the settings; what is not a setting is left out.

    Args:
        context: of the command.
        settings: whose fields are looked for; each field's flag is ``flag_of`` it.
    """
    found = {}
    for field in settings.model_fields:
        flag = flag_of(field)
        value = context.params.get(flag.removeprefix("--").replace("-", "_"))
        if flag.startswith("--no-"):
            value = False if value else None
        if value is not None and value != []:
            found[field] = value
    return found


def dtypes(value: Any) -> Any:
    """A callback that takes the names of ``DTYPES`` and those that torch and engines use, several with commas."""
    if value is None:
        return None
    words = [word.strip() for each in (value if isinstance(value, list) else [value]) for word in each.split(",")]
    names = [DTYPE_ALIASES.get(word.lower(), word) for word in words]
    choice_from(DTYPES, "dtype")(names)
    if isinstance(value, list):
        return names
    if len(names) > 1:
        raise typer.BadParameter(f"{value!r} is more than one dtype; give one.")
    return names[0]


def choice_from(names: Sequence[str] | dict[str, Any], what: str) -> Callable[[Any], Any]:
    """A callback that accepts only the names of a table, so that help, check and table cannot drift."""

    def check(value: Any) -> Any:
        for each in value if isinstance(value, list) else [value]:
            if each is not None and each not in names:
                raise typer.BadParameter(f"unknown {what} {each!r}; expected one of {', '.join(names)}.")
        return value

    return check


QuietOption = Annotated[
    bool,
    typer.Option(
        "-q", "--quiet", help="Say nothing but errors.", callback=lambda value: (terminal.be_quiet(value), value)[1]
    ),
]
PromptsOption = Annotated[
    str | None,
    typer.Option(
        help="A file of prompts: YAML, JSONL, one a line, or a saved run; - is standard input.", metavar="FILE"
    ),
]
FullOption = Annotated[bool, typer.Option("--full", help="Everything, in place of one screen; float32 logits, too.")]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "-f",
        "--format",
        help="What to print. Default: screen.",
        metavar="NAME",
        callback=choice_from(NAMES, "format"),
    ),
]


def path(text: str) -> Path:
    """A path that was given; an empty one would be the working folder.

    Raises:
        typer.BadParameter: it is empty.
    """
    if not text:
        raise typer.BadParameter("is empty; give the name of a file or a folder")
    return Path(text)


OutputOption = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE",
        help="Where to save the run (.json); with another suffix a report beside it; - prints and saves nothing.",
    ),
]
PlaceOption = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE",
        help="Where to save the run (.json); with another suffix a report beside it; - prints and saves nothing. A "
        "folder (runs/) takes a record a block: see Many.",
    ),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Replace what is there: a file that is not an older run, an earlier export.")
]

ModelsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...",
        help="A hub id (owner/name), a checkpoint folder, a GGUF file (also owner/name/file.gguf), or the word demo; "
        "several with -o FOLDER.",
    ),
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A hub id (owner/name), a checkpoint folder, a GGUF file (also owner/name/file.gguf), or the word demo.",
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps. Default: auto.", metavar="NAME")
]
AttentionOption = Annotated[
    str | None,
    typer.Option(
        help="Attention implementation. Default: what transformers chooses.",
        metavar="|".join(ATTENTION),
        callback=choice_from(ATTENTION, "attention implementation"),
    ),
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.", metavar="NAME")]

FailOnOption = Annotated[
    str, typer.Option(help="What gives exit code 1.", metavar="|".join(FAIL_ON), callback=choice_from(FAIL_ON, "level"))
]

_MANY = "Many, with -o FOLDER"
ShardOption = Annotated[
    str | None,
    typer.Option(
        help="This process's share, by hand; else by what torchrun, accelerate or Slurm set.",
        metavar="I/N",
        rich_help_panel=_MANY,
    ),
]
JobsOption = Annotated[
    str | None,
    typer.Option(
        help="So many ranks on this machine, under torchrun; auto: one a card, without cards one.",
        metavar="auto|N",
        rich_help_panel=_MANY,
    ),
]
BlockOption = Annotated[
    int | None,
    typer.Option(
        min=1, help=f"Prompts of a record at most. Default: {BLOCK_PROMPTS}.", metavar="N", rich_help_panel=_MANY
    ),
]

_WHY = "Why it failed"
ExplainOption = Annotated[
    bool | None,
    typer.Option(
        "--explain/--no-explain",
        help="Control runs and every measure of precision, or none. Default: controls after a failure.",
        rich_help_panel=_WHY,
    ),
]
BudgetOption = Annotated[
    int | None,
    typer.Option(help="Forwards that control runs may take. Default: 10.", metavar="N", rich_help_panel=_WHY),
]

SweepOption = Annotated[
    str | None,
    typer.Option(
        help="Search for triggers: every token as the first one, or lengths of a failing prompt.",
        metavar="|".join(SWEEPS),
        callback=choice_from(SWEEPS, "sweep"),
        rich_help_panel=_WHY,
    ),
]
SweepLimitOption = Annotated[
    int | None,
    typer.Option(help="So many first tokens, evenly spread. Default: all.", metavar="N", rich_help_panel=_WHY),
]
SweepTextsOption = Annotated[
    str | None,
    typer.Option(help="A file of texts, one a line, in place of tokens.", metavar="FILE", rich_help_panel=_WHY),
]

_RESCUE = "Rescue"
RescueToOption = Annotated[
    Path | None,
    typer.Option(
        help="Write the checkpoint, rescaled to be safe in fp16, into this folder.",
        metavar="FOLDER",
        rich_help_panel=_RESCUE,
    ),
]
RescueMarginOption = Annotated[
    float | None,
    typer.Option(
        help="Headroom that every operation shall have then. Default: 4.", metavar="X", rich_help_panel=_RESCUE
    ),
]
RescueDtypeOption = Annotated[
    str | None,
    typer.Option(
        help="Format of its weights. Default: fp16.",
        metavar="|".join(RESCUE_DTYPES),
        callback=choice_from(RESCUE_DTYPES, "format"),
        rich_help_panel=_RESCUE,
    ),
]
KeepOption = Annotated[
    bool,
    typer.Option("--keep-unverified", help="Keep the folder although it was not verified.", rich_help_panel=_RESCUE),
]
