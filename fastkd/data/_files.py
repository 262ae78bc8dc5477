"""Read the files of a RefCOCO folder, treating them as untrusted."""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

from fastkd.errors import FastKDWarning

LAYOUT = """expected layout:
  <root>/refcoco/{instances.json, refs(unc).p, refs(google).p}
  <root>/refcoco+/{instances.json, refs(unc).p}
  <root>/refcocog/{instances.json, refs(umd).p, refs(google).p}
  <root>/images/train2014/COCO_train2014_*.jpg"""
IMAGE_FOLDERS = ("images/mscoco/images/train2014", "images/train2014", "train2014", "coco/train2014")


class _Damaged(pickle.UnpicklingError, ValueError):
    """The file is not a complete pickle."""


class _Rejected(_Damaged):
    """The file names a class or a function."""


class _PlainUnpickler(pickle.Unpickler):
    """Load lists, dicts, strings and numbers; reject a pickle that names any class or function."""

    path: Path

    def find_class(self, module: str, name: str) -> Any:
        raise _Rejected(
            f"{self.path} names {module}.{name}: a refs file holds only lists, dicts, strings and integers, so this "
            "file is not trusted and nothing in it was run. Download the refs file from its original source"
        )


def read_refs(path: Path) -> list[dict[str, Any]]:
    """Read the refs from a pickle written by Python 2 or 3.

    Raises:
        FileNotFoundError: The file does not exist; the message shows the expected layout.
        pickle.UnpicklingError: The file names a class or function, or is not a pickle; also a ValueError.
        ValueError: The content is not a list of refs.
    """
    content = _read_bytes(path)
    try:
        refs = _unpickle(content, path, "utf-8")
    except UnicodeDecodeError as error:
        warnings.warn(f"{path} is not utf-8 ({error}); read as latin1", FastKDWarning, stacklevel=4)
        refs = _unpickle(content, path, "latin1")
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise ValueError(f"{path} must hold a list of dicts, got {type(refs).__name__}")
    fields = {"ref_id": int, "ann_id": int, "category_id": int, "image_id": int, "split": str, "sentences": list}
    for number, ref in enumerate(refs):
        for field, kind in fields.items():
            if not isinstance(ref.get(field), kind):
                raise ValueError(
                    f"{path}: {field} of ref number {number} must be {kind.__name__}, got {ref.get(field)!r}"
                )
    return refs


def _unpickle(content: bytes, path: Path, encoding: str) -> Any:
    reader = _PlainUnpickler(io.BytesIO(content), encoding=encoding)
    reader.path = path
    try:
        return reader.load()
    except (_Rejected, UnicodeDecodeError):
        raise
    except Exception as error:  # damaged pickles raise many types
        raise _Damaged(f"{path} can't be read as a pickle ({error}): download it again") from error


def read_instances(path: Path) -> dict[str, Any]:
    """Read COCO-style annotations: a dict with the lists ``images``, ``annotations`` and ``categories``."""
    try:
        content = json.loads(_read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path} can't be read as JSON ({error}): download it again") from error
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path} has no list {key!r}: it is not a COCO instances file")
    return content


def find_images(
    root: Path, image_root: str | os.PathLike[str] | None, needed: list[str], partial: bool = False
) -> tuple[Path, set[str]]:
    """Return the image folder, and those of the ``needed`` files that it lacks (none unless ``partial``).

    A name such as "train2014/x.jpg" may also be relative to the parent of a usual folder.

    Raises:
        FileNotFoundError: There is no such folder, or a file is missing and ``partial`` is False.
        ValueError: A name points outside of the folder.
    """
    folders = [root / folder for folder in IMAGE_FOLDERS] if image_root is None else [Path(image_root)]
    with_folder = [name for name in needed if "/" in name]
    for name in with_folder:
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"instances.json has file_name {name!r}, which points outside of the image folder")
    if with_folder:
        folders += [folder.parent for folder in folders]
    best: tuple[set[str], Path] | None = None
    for folder in folders:
        if not folder.is_dir():
            continue
        missing = _missing(folder, needed)
        if not missing:
            return folder, missing
        if best is None or len(missing) < len(best[0]):
            best = missing, folder
    if partial and best is not None and len(best[0]) < len(needed):
        return best[1], best[0]
    tried = "\n".join(f"  {folder}" for folder in folders)
    if best is not None:
        count, example = len(best[0]), best[1] / min(best[0])
        raise FileNotFoundError(f"{count} of {len(needed)} images are missing, such as {example}; tried:\n{tried}")
    hint = "put the images there, or pass image_root" if image_root is None else "image_root is not a folder"
    raise FileNotFoundError(f"no image folder; tried:\n{tried}\n{hint}")


def _missing(folder: Path, needed: list[str]) -> set[str]:
    """Return the names of files that the folder lacks."""
    present: dict[str, set[str]] = {}
    missing = set()
    for name in needed:
        subfolder, _, file = name.rpartition("/")
        if subfolder not in present:
            present[subfolder] = set(os.listdir(folder / subfolder)) if (folder / subfolder).is_dir() else set()
        if file not in present[subfolder]:
            missing.add(name)
    return missing


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} doesn't exist; {LAYOUT}") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{path} is a folder; {LAYOUT}") from None
