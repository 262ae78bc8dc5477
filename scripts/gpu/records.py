"""Results files that stay readable if the process is killed, and digests of the sources they belong to."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import runpy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

replace_files = runpy.run_path(str(Path(__file__).resolve().parents[2] / "fastkd" / "_atomic.py"))["replace_files"]
"""Write files atomically; loaded from the sources, because fastkd may not be installed yet."""

PACKAGE = ("csrc", "kernels", "fastkd", "setup.py", "pyproject.toml")
"""Sources of the installed package."""


def append(path: Path, row: Row) -> None:
    """Append one line, safely from several processes; a partial line left by a killed process is terminated first."""
    data = (json.dumps(row) + "\n").encode()
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            data = b"\n" + data
        os.write(handle, data)
    finally:
        os.close(handle)


def read(path: Path) -> list[Row]:
    """Return all rows, skipping partial lines."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file atomically."""
    with replace_files(path) as (partial,):
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def digest(root: Path, names: Iterable[str]) -> str:
    """Return a hash of source files and folders, the same in every checkout, with or without git."""
    sha = hashlib.sha256()
    for name in names:
        path = root / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            generated = (
                "__pycache__" in file.parts or file.suffix in (".so", ".pyd") or file.name.startswith("_build_info")
            )
            if file.is_file() and not generated:
                sha.update(f"{file.relative_to(root)}\0".encode())
                sha.update(hashlib.sha256(file.read_bytes()).digest())
    return sha.hexdigest()[:12]


class Tail:
    """Reader of the rows appended to a file after its creation."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = path.stat().st_size if path.exists() else 0

    def rows(self) -> list[Row]:
        """Return the rows since the last call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.position)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self.position += len(complete)
        found = []
        for line in complete.splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found
