"""Open a split of any set that fastkd reads, by the name of its format."""

from __future__ import annotations

import os
from typing import Any

from fastkd.data.refcoco import RefCOCO
from fastkd.data.refer_folder import ReferFolder
from fastkd.data.referring_set import ReferringSet

FOLDER = "folder"


def open_set(
    root: str | os.PathLike[str], split: str, name: str = "refcoco", split_by: str | None = None, **options: Any
) -> ReferringSet:
    """Return a split: of a `ReferFolder` if ``name`` is "folder", else of a `RefCOCO`.

    Args:
        root: The folder of the set.
        split: The split.
        name: "folder", or a name that `RefCOCO` knows.
        split_by: Author of a `RefCOCO`'s split; default: the first one that is known.
        options: Arguments of the class. A `ReferFolder` has no ``check_counts``, and one ``sentence_field``, "sent".

    Raises:
        ValueError: A folder is opened with an option that it does not have, or as the class raises.

    Example::

        val = open_set("data/cups", "val", "folder")
    """
    if name != FOLDER:
        from fastkd.data._known_sets import SPLITS

        author = split_by or next((by for known, by in SPLITS if known == name), "unc")
        return RefCOCO(root, name, author, split, **options)
    if split_by is not None:
        raise ValueError(f"a folder has no split_by, got {split_by!r}: its splits are its JSONL or parquet files")
    if options.pop("sentence_field", "sent") != "sent" or options.pop("check_counts", False):
        raise ValueError("a folder has neither sentence_field nor check_counts: leave out these options")
    return ReferFolder(root, split, **options)
