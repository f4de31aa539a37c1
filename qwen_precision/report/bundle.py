"""The attachment: one zip of the runs, their report as Markdown and HTML, a script that fails alike, the environment.

The same runs always give the same bytes. Read back, a zip from a stranger may hold only the members that are written
here, none of them larger than a record may be; nothing is ever unpacked to disk.
"""

import io
import json
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import ConfigDict, TypeAdapter

from qwen_precision.dtypes import DTYPES
from qwen_precision.errors import QprecError
from qwen_precision.judge import Corpus
from qwen_precision.record import MAX_BYTES, Run, check_count, parse, to_json

_RUN = re.compile(r"run(-\d{1,3})?\.json")
_NUMBERED = re.compile(r"(run|merged)(-\d{1,3})?\.json")
"""Beside the run of a folder stands what came of all its prompts: the run holds those that are worst somewhere."""
_MOST_VALUES = 4_000_000
_OTHERS = {"report.md", "report.html", "repro.py", "environment.json"}
_MOST = 2_004
"""Members of a bundle: 1,000 checkpoints of a folder have two each."""

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip can hold


class Merged(NamedTuple):
    """What a report over a folder says beyond its run."""

    name: str
    """Of the checkpoint."""
    corpus: Corpus


_FORM = TypeAdapter(Merged, config=ConfigDict(ser_json_inf_nan="constants"))


def pack(runs: Sequence[tuple[Run, Merged | None]], reports: Mapping[str, str]) -> bytes:
    """The zip's bytes.

    Args:
        runs: without what should not travel (``redact.py``); of a folder with what came of all prompts.
        reports: file name to text.
    """
    ends = [""] if len(runs) == 1 else [f"-{number}" for number in range(1, len(runs) + 1)]
    files = {f"run{end}.json": to_json(run) for end, (run, _) in zip(ends, runs, strict=True)}
    for end, (_, merged) in zip(ends, runs, strict=True):
        if merged is not None:
            files[f"merged{end}.json"] = _FORM.dump_json(merged).decode("utf-8", "replace") + "\n"
    files["environment.json"] = json.dumps([run.environment for run, _ in runs], indent=2, ensure_ascii=False) + "\n"
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, text in sorted({**files, **reports}.items()):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.compress_type, info.external_attr, info.create_system = zipfile.ZIP_DEFLATED, 0o644 << 16, 3
            archive.writestr(info, text.encode("utf-8"))
    return sink.getvalue()


def unpack(data: bytes, path: Path) -> list[tuple[Run, Merged | None]]:
    """The runs of a bundle, each of a folder's with what came of all its prompts; ``path`` is its name in messages.

    Raises:
        QprecError: not a bundle, unexpected members, too large, or a damaged run.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            names = [info.filename for info in infos]
            if len(set(names)) != len(names) or len(names) > _MOST:
                raise QprecError(f"{path}: holds a member twice, or more than {_MOST}; it is not a qprec bundle.")
            for info in infos:
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
                    raise QprecError(
                        f"{path}: {info.filename!r} is packed in a way that qprec does not write; refused."
                    )
                if not _NUMBERED.fullmatch(info.filename) and info.filename not in _OTHERS:
                    raise QprecError(f"{path}: holds {info.filename!r}, which is no part of a qprec bundle; refused.")
            runs = sorted((i for i in infos if _RUN.fullmatch(i.filename)), key=lambda info: _number(info.filename))
            if not runs:
                raise QprecError(f"{path}: holds no run.json, so it is not a qprec bundle.")
            left, found = MAX_BYTES, []
            for info in runs:
                raw = _read(archive, info, path, left)
                left -= len(raw)
                run = parse(raw.decode("utf-8"), f"{path}:{info.filename}")
                beside = info.filename.replace("run", "merged")
                more = _read(archive, archive.getinfo(beside), path, left) if beside in names else b""
                left -= len(more)
                found.append((run, _merged(more, f"{path}:{beside}") if more else None))
            return found
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise QprecError(f"{path}: is not a readable zip; give the bundle that qprec wrote.") from error


def _merged(data: bytes, path: str) -> Merged:
    try:
        check_count(data, _MOST_VALUES)
        found = _FORM.validate_json(data)
    except ValueError as error:
        raise QprecError(f"{path}: is damaged, or of another version of qprec; give the folder itself.") from error
    corpus = found.corpus
    if not {*(each.dtype for each in corpus.across), *corpus.sums, *corpus.bought} <= set(DTYPES):
        raise QprecError(f"{path}: tells of a dtype that qprec does not know; give the folder itself.")
    return found


def _number(name: str) -> int:
    return int("".join(char for char in name if char.isdigit()) or 0)


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, most: int) -> bytes:
    with archive.open(info) as member:
        data = member.read(most + 1)  # what the header says of the size is a stranger's word
    if len(data) > most:
        raise QprecError(f"{path}: is larger than {MAX_BYTES >> 20} MiB unpacked; refused.")
    return data
