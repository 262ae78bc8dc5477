"""Reading ``shapes.json``, which says what RefCOCO's files have no place for."""

from __future__ import annotations

import json
import os
from pathlib import Path


def sentence_kinds(root: str | os.PathLike[str]) -> dict[int, str]:
    """The kind (attribute, place, ...) of every sentence of a set written by ``make_shapes``, by ``sent_id``.

    Raises:
        FileNotFoundError: ``root`` holds no ``shapes.json``, so it isn't such a set.
    """
    path = Path(root) / "shapes.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} doesn't exist: root {str(root)!r} is not a set written by make_shapes")
    return {int(sent_id): kind for sent_id, kind in json.loads(path.read_text(encoding="utf-8"))["sentences"].items()}
