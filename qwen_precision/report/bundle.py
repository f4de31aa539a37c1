"""The attachment: one zip of the runs, their report as Markdown and HTML, a script that fails alike, the environment.

The same runs always give the same bytes. Read back, a zip from a stranger may hold only the members that are written
here, none of them larger than a record may be; nothing is ever unpacked to disk.
"""

import io
import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from qwen_precision.errors import QprecError
from qwen_precision.record import MAX_BYTES, Run, parse, to_json

_RUN = re.compile(r"run(-\d{1,3})?\.json")
_OTHERS = {"report.md", "report.html", "repro.py", "environment.json"}
_MOST = 64
"""Members of a bundle."""

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip can hold


def pack(runs: list[Run], reports: Mapping[str, str]) -> bytes:
    """The zip's bytes.

    Args:
        runs: without what should not travel (``redact.py``).
        reports: file name to text.
    """
    names = ["run.json"] if len(runs) == 1 else [f"run-{number}.json" for number in range(1, len(runs) + 1)]
    files = {name: to_json(run) for name, run in zip(names, runs, strict=True)}
    files["environment.json"] = json.dumps([run.environment for run in runs], indent=2, ensure_ascii=False) + "\n"
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, text in sorted({**files, **reports}.items()):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.compress_type, info.external_attr, info.create_system = zipfile.ZIP_DEFLATED, 0o644 << 16, 3
            archive.writestr(info, text.encode("utf-8"))
    return sink.getvalue()


def unpack(data: bytes, path: Path) -> list[Run]:
    """The runs of a bundle; ``path`` is its name in messages.

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
                if not _RUN.fullmatch(info.filename) and info.filename not in _OTHERS:
                    raise QprecError(f"{path}: holds {info.filename!r}, which is no part of a qprec bundle; refused.")
            runs = sorted((i for i in infos if _RUN.fullmatch(i.filename)), key=lambda info: _number(info.filename))
            if not runs:
                raise QprecError(f"{path}: holds no run.json, so it is not a qprec bundle.")
            left, found = MAX_BYTES, []
            for info in runs:
                raw = _read(archive, info, path, left)
                left -= len(raw)
                found.append(parse(raw.decode("utf-8"), f"{path}:{info.filename}"))
            return found
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise QprecError(f"{path}: is not a readable zip; give the bundle that qprec wrote.") from error


def _number(name: str) -> int:
    return int("".join(char for char in name if char.isdigit()) or 0)


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, most: int) -> bytes:
    with archive.open(info) as member:
        data = member.read(most + 1)  # what the header says of the size is a stranger's word
    if len(data) > most:
        raise QprecError(f"{path}: is larger than {MAX_BYTES >> 20} MiB unpacked; refused.")
    return data
