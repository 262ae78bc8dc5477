"""Open a split of any set that fastkd reads, by the name of its format."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastkd.data._files import read_refs
from fastkd.data._known_sets import SPLITS, in_split, refs_file
from fastkd.data.refcoco import RefCOCO
from fastkd.data.refer_folder import ReferFolder, folder_files
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
        try:
            return RefCOCO(root, name, author_of(name, split_by), split, **options)
        except FileNotFoundError as error:
            if files := folder_files(Path(root)):
                error.add_note(f"{root} holds {files[0].name}: read it with the name 'folder' (--dataset folder)")
            raise
    if split_by is not None:
        raise ValueError(f"a folder has no split_by, got {split_by!r}: its splits are its JSONL or parquet files")
    if options.pop("sentence_field", "sent") != "sent" or options.pop("check_counts", False):
        raise ValueError("a folder has neither sentence_field nor check_counts: omit these options")
    return ReferFolder(root, split, **options)


def splits_of(root: str | os.PathLike[str], name: str, split_by: str | None = None) -> list[str]:
    """Return the splits of a set that have refs, in the usual order.

    Raises:
        FileNotFoundError: the refs file is missing.
        ValueError: The set is unknown, or its file is damaged.
    """
    if name == FOLDER:
        return [path.stem for path in folder_files(Path(root))]
    author = author_of(name, split_by)
    if (name, author) not in SPLITS:
        known = ", ".join(f"{known} ({by})" for known, by in SPLITS)
        raise ValueError(f"name={name!r} with split_by={author!r} is not a known set; known sets: {known}, folder")
    present = {ref["split"] for ref in read_refs(Path(root) / name / refs_file(name, author))}
    return [split for split in SPLITS[name, author] if any(in_split(each, split) for each in present)]


def author_of(name: str, split_by: str | None = None) -> str:
    """Return the author of a `RefCOCO`'s splits: ``split_by``, or the first one that is known."""
    return split_by or next((by for known, by in SPLITS if known == name), "unc")
