"""Files of one JSON object a line, each on the disk as soon as it is known: a killed run keeps what it has finished."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(file: Path) -> list[Row]:
    """Return the rows of ``file``; a line that a killed process left incomplete is none."""
    if not file.exists():
        return []
    rows = []
    for line in file.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def append(file: Path, row: Row) -> None:
    """Add one row to ``file``, which is made if it is missing."""
    line = json.dumps(row, allow_nan=False, ensure_ascii=False).encode() + b"\n"
    with open(file, "ab+") as out:
        if out.seek(0, os.SEEK_END):
            out.seek(-1, os.SEEK_END)
            line = line if out.read(1) == b"\n" else b"\n" + line
        out.write(line)
        out.flush()
        os.fsync(out.fileno())
