"""Read ``shapes.json``, the data that RefCOCO's files cannot hold."""

from __future__ import annotations

import json
import os
from pathlib import Path


def sentence_kinds(root: str | os.PathLike[str]) -> dict[int, str]:
    """Return ``sent_id`` to kind (attribute, place, ...) for all sentences of a shapes set.

    Raises:
        FileNotFoundError: ``root`` has no ``shapes.json``, so it was not written by ``make_shapes``.
    """
    path = Path(root) / "shapes.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} doesn't exist: root {str(root)!r} was not written by make_shapes")
    return {int(sent_id): kind for sent_id, kind in json.loads(path.read_text(encoding="utf-8"))["sentences"].items()}
