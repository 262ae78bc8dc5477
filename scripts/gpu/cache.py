"""One folder of what takes long to make (the installed package, Triton's and Inductor's kernels), as one file too.

Another machine's output folder may come back as few small files only: the archive holds what fits, in order of what
saves most time.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

MOST = 15 * 2**20
FOLDERS = ("build", "triton", "inductor", "triton-tests")
"""In order of value. ``tools``, the packages out of the wheels, is not kept: it is quickly made again."""

LOADED = (".cubin", ".json", ".so")  # of each of Triton's kernels; the rest is what it was made from


def pack(folder: Path, archive: Path, most: int = MOST) -> list[str]:
    """Write the archive; return what of the folder did not fit, in words, one entry per part of the folder."""
    chosen, size, left_out = [], 0, []
    for name in FOLDERS:
        skipped = 0
        for path in _files(folder, name):
            cost = len(zlib.compress(path.read_bytes(), 6)) + 200
            if size + cost > most:
                skipped += 1
                continue
            size += cost
            chosen.append(path)
        if skipped:
            left_out.append(f"{skipped} files of {name}")
    partial = archive.with_name(f".{archive.name}")
    with tarfile.open(partial, "w:gz", compresslevel=6) as tar:
        for path in chosen:
            tar.add(path, str(path.relative_to(folder)), recursive=False)
    partial.replace(archive)
    return left_out


def _files(folder: Path, name: str) -> Iterator[Path]:
    """Yield a part's files, oldest first: what the first checks needed comes first."""
    files = [p for p in (folder / name).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    if name.startswith("triton"):
        files = [p for p in files if p.suffix in LOADED]
    yield from sorted(files, key=lambda p: (p.stat().st_mtime, str(p)))


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive; files that are there already stay.

    Triton's lists of a kernel's files hold absolute paths: they are written anew for where the files are now.
    """
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if not member.isfile() or (folder / member.name).exists():
                continue
            tar.extract(member, folder, filter="data")
    for group in folder.glob("triton*/*/__grp__*.json"):
        try:
            data = json.loads(group.read_text())
            present = {name: str(group.parent / name) for name in data["child_paths"]}
        except (ValueError, KeyError):
            group.unlink()
            continue
        data["child_paths"] = {name: path for name, path in present.items() if Path(path).exists()}
        group.write_text(json.dumps(data))
