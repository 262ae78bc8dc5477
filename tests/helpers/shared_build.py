"""Share build folders between test processes and later runs: one folder per content of the sources."""

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

KEPT = 2  # folders per name: for the current sources and the previous ones


def cache_root() -> Path:
    """Return the folder of all build folders: ``FASTKD_TEST_CACHE``, or one in the user's cache folder."""
    configured = os.environ.get("FASTKD_TEST_CACHE")
    if configured:
        return Path(configured).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "fastkd" / "tests"


@contextmanager
def shared_folder(name: str, sources: Path, *options: str) -> Iterator[Path]:
    """Lock and return the folder for these sources (a folder or a file), options, compiler and Python.

    It may be empty, complete, or partly filled by a process that was killed. Other processes wait for the lock.
    """
    folder = cache_root() / f"{name}-{_digest(sources, options)}"
    folder.mkdir(parents=True, exist_ok=True)
    with _lock_path(folder).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.utime(folder)
        _remove_old_folders(name, folder.parent)
        yield folder


def _digest(sources: Path, options: tuple[str, ...]) -> str:
    compiler = subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True, check=False)
    flags = [f"{name}={os.environ.get(name, '')}" for name in ("CXX", "CXXFLAGS", "LDFLAGS")]
    inputs = (sys.prefix, sysconfig.get_config_var("EXT_SUFFIX"), compiler.stdout, *flags, *options)
    digest = hashlib.sha256("\0".join(map(str, inputs)).encode())
    for path in sorted(path for path in (sources, *sources.rglob("*")) if path.is_file()):
        digest.update(f"\0{path.relative_to(sources)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _lock_path(folder: Path) -> Path:
    return folder.with_name(folder.name + ".lock")


def _remove_old_folders(name: str, parent: Path) -> None:
    """Remove all but the most recently used folders of a name, except locked ones."""
    folders = [path for path in parent.glob(f"{name}-*") if path.is_dir()]
    for path in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT:]:
        with _lock_path(path).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(path, ignore_errors=True)
