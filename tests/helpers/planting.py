"""Bugs planted in copies of the sources, to prove that a rig finds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


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
