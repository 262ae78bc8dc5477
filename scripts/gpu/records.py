"""Files that a kill at any time leaves readable, and what identifies the sources that they are about."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

PACKAGE = ("csrc", "kernels", "fastkd", "setup.py", "pyproject.toml")
"""What the installed package is made of."""


def append(path: Path, row: Row) -> None:
    """Add one line, flushed, from however many processes; a line that a kill cut short does not spoil this one."""
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
    """Return every whole line; one that was cut short is skipped."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def replace(path: Path, data: Any) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def digest(root: Path, names: Iterable[str]) -> str:
    """Return a hash of files and folders of sources, the same in any checkout, with git or without."""
    sha = hashlib.sha256()
    for name in names:
        path = root / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            made = "__pycache__" in file.parts or file.suffix in (".so", ".pyd") or file.name.startswith("_build_info")
            if file.is_file() and not made:
                sha.update(f"{file.relative_to(root)}\0".encode())
                sha.update(hashlib.sha256(file.read_bytes()).digest())
    return sha.hexdigest()[:12]


class Tail:
    """The rows that are added to a file from now on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = path.stat().st_size if path.exists() else 0

    def rows(self) -> list[Row]:
        """Return those since the last call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.position)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.position += len(whole)
        found = []
        for line in whole.splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found
