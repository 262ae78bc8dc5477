"""Bugs planted in copies of the sources, to prove that a rig finds them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def update(sources: Path, copy: Path) -> None:
    """Make ``copy`` equal to the sources, touching only files that differ: no others are compiled again."""
    for path in (path for path in sources.rglob("*") if path.is_file()):
        target = copy / path.relative_to(sources)
        if not target.is_file() or target.read_bytes() != path.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


@contextmanager
def planted(path: Path, right: str, wrong: str, make: Callable[[], None]) -> Iterator[None]:
    """Within it the file has ``wrong`` in place of ``right``, and was built so."""
    text = path.read_text()
    assert text.count(right) == 1, f"{path.name} has changed: plant the bug elsewhere"
    path.write_text(text.replace(right, wrong))
    try:
        make()
        yield
    finally:
        path.write_text(text)
