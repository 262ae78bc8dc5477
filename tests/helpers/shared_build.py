"""Folders of what tests compile, shared by all test processes and later runs: one for each content of the sources."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KEPT = 2  # folders of one name: for today's sources, and for those before the last edit


def root() -> Path:
    """Return where these folders lie: ``FASTKD_TEST_CACHE``, or one in the user's cache folder."""
    stated = os.environ.get("FASTKD_TEST_CACHE")
    if stated:
        return Path(stated).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "fastkd" / "tests"


@contextmanager
def shared_folder(name: str, sources: Path, *options: str) -> Iterator[Path]:
    """Hold the folder of these sources (a folder or a file), options, compiler and Python; other processes wait.

    It may be empty, complete, or what a killed process left of it.
    """
    folder = root() / f"{name}-{_digest(sources, options)}"
    folder.mkdir(parents=True, exist_ok=True)
    with _lock_of(folder).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.utime(folder)
        _drop_old_ones(name, folder.parent)
        yield folder


def _digest(sources: Path, options: tuple[str, ...]) -> str:
    compiler = subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True, check=False)
    flags = [f"{name}={os.environ.get(name, '')}" for name in ("CXX", "CXXFLAGS", "LDFLAGS")]
    stated = (sys.prefix, sysconfig.get_config_var("EXT_SUFFIX"), compiler.stdout, *flags, *options)
    digest = hashlib.sha256("\0".join(map(str, stated)).encode())
    for path in sorted(path for path in (sources, *sources.rglob("*")) if path.is_file()):
        digest.update(f"\0{path.relative_to(sources)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".lock")


def _drop_old_ones(name: str, parent: Path) -> None:
    """Remove all but the last used folders of a name that no process holds."""
    folders = [path for path in parent.glob(f"{name}-*") if path.is_dir()]
    for path in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT:]:
        with _lock_of(path).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(path, ignore_errors=True)
