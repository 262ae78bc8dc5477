"""Write files and replace folders as a whole: readers see either the old content or all of the new."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_files(*paths: Path, durable: bool = False) -> Iterator[tuple[Path, ...]]:
    """Yield a temporary path next to each of ``paths``; when the block ends, rename them into place.

    If the block raises, no file is replaced and the temporary ones are removed. ``durable`` is that of
    `replace_folder`.

    Example:
        >>> with replace_files(Path("facts.json")) as (partial,):  # doctest: +SKIP
        ...     partial.write_text("{}")
    """
    for path in paths:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder: expected the name of a file")
        path.parent.mkdir(parents=True, exist_ok=True)
    partials = tuple(path.with_name(f".{path.name}.{os.getpid()}.partial") for path in paths)
    try:
        yield partials
        for partial, path in zip(partials, paths, strict=True):
            _make_readable(partial)
            if durable:
                _sync(partial)
            partial.replace(path)
            if durable:
                _sync(path.parent)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


@contextmanager
def replace_folder(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder; when the block ends, it replaces ``path`` and everything in it.

    If the block raises, ``path`` stays as it was and the temporary folder is removed.

    Args:
        path: the folder to write.
        durable: wait until the content is on the disk before renaming, so that a power failure leaves the old or the
            new content too, not only the end of the process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    for leftover in (partial, old):  # left by a killed process with the same PID
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            _make_readable(file)
            if durable:
                _sync(file)
        if durable:
            _sync(partial)
        if path.exists():
            path.rename(old)
        try:
            partial.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
        if durable:
            _sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _make_readable(path: Path) -> None:
    """Make a file or folder readable by everyone: temporary files of some libraries are private to the user."""
    path.chmod(0o755 if path.is_dir() else 0o644)


def remove_leftovers(parent: Path) -> None:
    """Remove the temporary files and folders that killed processes left in a folder.

    A process killed between the two renames of `replace_folder` left only the old folder: it gets its name back. No
    other process may be writing to ``parent``.
    """
    for old in parent.glob(".*.old"):
        path = parent / old.name[1:].removesuffix(".old").rpartition(".")[0]  # .NAME.PID.old
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(path)
    for partial in parent.glob(".*.partial"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file's content or a folder's entries are on the disk."""
    if path.is_dir() and os.name != "posix":  # other systems do not open folders
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
