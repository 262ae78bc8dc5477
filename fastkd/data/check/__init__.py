"""Check a dataset on disk and list everything that is wrong with it; nothing is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fastkd.data._known_sets import SPLITS, refs_file
from fastkd.data.check.findings import CheckReport, Finding, SetReport
from fastkd.data.check.folder import check_folder
from fastkd.data.check.refs import check_refs
from fastkd.data.refer_folder import folder_files

__all__ = ["CheckReport", "Finding", "SetReport", "check_set"]


def check_set(
    root: str | os.PathLike[str],
    *,
    image_root: str | os.PathLike[str] | None = None,
    images: bool = True,
    max_words: int = 20,
) -> CheckReport:
    """Check every set in a folder: those in the layout of RefCOCO, and JSONL and parquet files.

    Args:
        root: The folder.
        image_root: Folder of the image files; default: the usual ones.
        images: Decode every image once.
        max_words: Word limit, [CLS] and [SEP] included, beyond which a sentence is reported as cut.

    Raises:
        FileNotFoundError: The folder holds no set.
        ValueError: None of its sets can be read.

    Example::

        report = check_set("data")
        print(report)
    """
    folder = Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: pass the folder that holds refcoco/, or train.jsonl")
    known = [key for key in SPLITS if (folder / key[0] / refs_file(*key)).exists()]
    files = folder_files(folder)
    if not known and not files:
        raise FileNotFoundError(
            f"{folder} holds no set: no refs file such as refcoco/refs(unc).p, and no JSONL or parquet file"
        )
    images_in = None if image_root is None else Path(image_root)
    checks: list[Callable[..., SetReport]] = [partial(check_refs, folder, key) for key in known]
    checks += [partial(check_folder, folder, file) for file in files]
    sets: list[SetReport] = []
    errors: list[Exception] = []
    for check in checks:
        try:
            sets.append(check(image_root=images_in, images=images, max_words=max_words))
        except (ValueError, OSError) as error:  # not readable at all
            errors.append(error)
    if not sets:
        raise errors[0]
    for unreadable in errors:
        sets[0].problem("unreadable set", unreadable)
    return CheckReport(folder, sets)
