"""Plant faults in copies of the sources, to prove that tests detect them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def update(sources: Path, copy: Path) -> None:
    """Copy the sources to ``copy``, touching only files that differ, so that no others are compiled again."""
    for path in (path for path in sources.rglob("*") if path.is_file()):
        target = copy / path.relative_to(sources)
        if not target.is_file() or target.read_bytes() != path.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


@contextmanager
def planted(path: Path, original: str, faulty: str, make: Callable[[], None]) -> Iterator[None]:
    """Replace ``original`` by ``faulty`` in the file, build, and restore the text afterwards."""
    text = path.read_text()
    assert text.count(original) == 1, (
        f"{path.name}: expected one occurrence of {original!r}; adapt the fault to the changed source"
    )
    path.write_text(text.replace(original, faulty))
    try:
        make()
        yield
    finally:
        path.write_text(text)
