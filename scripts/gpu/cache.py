"""Pack the build and the compiled kernels of Triton and Inductor into one archive, and unpack it.

A rented machine may return only a few small files, so the archive has a size limit.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from records import replace_files

MAX_BYTES = 15 * 2**20
FOLDERS = ("build", "triton", "inductor", "tests")
"""Folders to pack, in order of the time they save. ``tools`` (installed wheels) is quick to recreate."""

OPTIONAL = ("tests",)  # omissions are not reported: passed tests do not run again
LOADED = (".cubin", ".json", ".so")  # files of a Triton kernel that are loaded; others are intermediate


def pack(folder: Path, archive: Path, max_bytes: int = MAX_BYTES) -> list[str]:
    """Write the archive, oldest files first; return a text such as "3 files of triton" per folder with omissions."""
    chosen, size, skipped = [], 0, []
    for name in FOLDERS:
        omitted = 0
        for path in _files(folder, name):
            cost = len(zlib.compress(path.read_bytes(), 6)) + 200
            if size + cost > max_bytes:
                omitted += 1
                continue
            size += cost
            chosen.append(path)
        if omitted and name not in OPTIONAL:
            skipped.append(f"{omitted} files of {name}")
    with replace_files(archive) as (partial,), tarfile.open(partial, "w:gz", compresslevel=6) as tar:
        for path in chosen:
            tar.add(path, str(path.relative_to(folder)), recursive=False)
    return skipped


def _files(folder: Path, name: str) -> Iterator[Path]:
    """Yield the files of a folder, oldest first: the first checks need them."""
    for path in sorted((folder / name).rglob("*"), key=lambda p: (p.lstat().st_mtime, str(p))):
        parts = path.relative_to(folder).parts
        if path.is_file() and "__pycache__" not in parts and ("triton" not in parts[:2] or path.suffix in LOADED):
            yield path


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive without overwriting existing files or mixing with an existing build.

    Triton lists the files of a kernel by absolute path; these lists are rewritten for the new location.
    """
    built = (folder / "build").exists()
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            in_build = built and member.name.startswith("build/")
            if member.isfile() and not in_build and not (folder / member.name).exists():
                tar.extract(member, folder, filter="data")
    for group in folder.rglob("__grp__*.json"):
        try:
            data = json.loads(group.read_text(encoding="utf-8"))
            present = {name: str(group.parent / name) for name in data["child_paths"]}
        except (ValueError, KeyError):
            group.unlink()
            continue
        data["child_paths"] = {name: path for name, path in present.items() if Path(path).exists()}
        group.write_text(json.dumps(data), encoding="utf-8")
