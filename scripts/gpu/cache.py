"""Keep what takes long to make (the installed package, Triton's and Inductor's kernels) in one folder, or in one file.

The output folder of another machine may come back as few small files only: the archive holds what fits.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

MOST = 15 * 2**20
FOLDERS = ("build", "triton", "inductor", "tests")
"""In order of the time they save. ``tools``, the packages from the wheels, is not kept: it is quickly made again."""

OPTIONAL = ("tests",)  # the tests that passed do not run again: what of it fits is kept
LOADED = (".cubin", ".json", ".so")  # of each of Triton's kernels; the other files are what it was made from


def pack(folder: Path, archive: Path, most: int = MOST) -> list[str]:
    """Write the archive; return which parts of the folder did not fit, with the number of files skipped."""
    chosen, size, skipped = [], 0, []
    for name in FOLDERS:
        too_many = 0
        for path in _files(folder, name):
            cost = len(zlib.compress(path.read_bytes(), 6)) + 200
            if size + cost > most:
                too_many += 1
                continue
            size += cost
            chosen.append(path)
        if too_many and name not in OPTIONAL:
            skipped.append(f"{too_many} files of {name}")
    partial = archive.with_name(f".{archive.name}")
    with tarfile.open(partial, "w:gz", compresslevel=6) as tar:
        for path in chosen:
            tar.add(path, str(path.relative_to(folder)), recursive=False)
    partial.replace(archive)
    return skipped


def _files(folder: Path, name: str) -> Iterator[Path]:
    """Yield the files of a part, oldest first: the first checks needed those."""
    for path in sorted((folder / name).rglob("*"), key=lambda p: (p.lstat().st_mtime, str(p))):
        parts = path.relative_to(folder).parts
        if path.is_file() and "__pycache__" not in parts and ("triton" not in parts[:2] or path.suffix in LOADED):
            yield path


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive; files that exist stay, and so does a build.

    Triton lists the files of a kernel by their absolute paths: those lists are rewritten for where the files are now.
    """
    built = (folder / "build").exists()
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            mixed = built and member.name.startswith("build/")
            if member.isfile() and not mixed and not (folder / member.name).exists():
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
