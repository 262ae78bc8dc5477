"""Reading the files of a RefCOCO folder: nothing in them is trusted."""

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
    """The file is no whole pickle."""


class _Refused(_Damaged):
    """The file names a class or a function."""


class _PlainUnpickler(pickle.Unpickler):
    """Lists, dicts, strings and numbers only: a pickle that names any class or function is refused."""

    path: Path

    def find_class(self, module: str, name: str) -> Any:
        raise _Refused(
            f"{self.path} names {module}.{name}: a refs file holds lists, dicts, strings and integers only, so this "
            "file is not trusted and nothing of it was run. Fetch the refs file from its original source again"
        )


def read_refs(path: Path) -> list[dict[str, Any]]:
    """The refs of a pickle written by Python 2 or 3.

    Raises:
        FileNotFoundError: with the layout that is expected.
        pickle.UnpicklingError: the file names a class, or is not a pickle (this one is a ValueError too).
        ValueError: the content is not a list of refs.
    """
    content = _bytes(path)
    try:
        refs = _unpickle(content, path, "utf-8")
    except UnicodeDecodeError as error:
        warnings.warn(f"{path} is not utf-8 ({error}); read as latin1", FastKDWarning, stacklevel=4)
        refs = _unpickle(content, path, "latin1")
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise ValueError(f"{path} must hold a list of dicts; got {type(refs).__name__}")
    fields = {"ref_id": int, "ann_id": int, "category_id": int, "image_id": int, "split": str, "sentences": list}
    for number, ref in enumerate(refs):
        for field, kind in fields.items():
            if not isinstance(ref.get(field), kind):
                raise ValueError(
                    f"{path}: ref number {number} has {field} = {ref.get(field)!r}, where {kind.__name__} is expected"
                )
    return refs


def _unpickle(content: bytes, path: Path, encoding: str) -> Any:
    reader = _PlainUnpickler(io.BytesIO(content), encoding=encoding)
    reader.path = path
    try:
        return reader.load()
    except (_Refused, UnicodeDecodeError):
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise _Damaged(f"{path} can't be read as a pickle ({error}): fetch it again") from error


def read_instances(path: Path) -> dict[str, Any]:
    """The COCO-style annotations: a dict with the lists ``images``, ``annotations`` and ``categories``."""
    try:
        content = json.loads(_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path} can't be read as JSON ({error}): fetch it again") from error
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path} has no list {key!r}: it is not a COCO instances file")
    return content


def find_images(
    root: Path, image_root: str | os.PathLike[str] | None, needed: list[str], partial: bool = False
) -> tuple[Path, set[str]]:
    """Return the folder that holds the image files ``needed``, and which are missing: none, unless ``partial``.

    A name may have folders in it; then it may also start next to the usual folder, as "train2014/x.jpg" does.

    Raises:
        FileNotFoundError: no such folder; without ``partial``, one with a file missing too.
        ValueError: a name that leads out of its folder.
    """
    folders = [root / folder for folder in IMAGE_FOLDERS] if image_root is None else [Path(image_root)]
    with_folder = [name for name in needed if "/" in name]
    for name in with_folder:
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"instances.json has file_name {name!r}, which leads out of the folder of the images")
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
    raise FileNotFoundError(f"no folder of images; tried:\n{tried}\n{hint}")


def _missing(folder: Path, needed: list[str]) -> set[str]:
    """Return the names that no file of the folder, or of the folder inside that they name, has."""
    there: dict[str, set[str]] = {}
    missing = set()
    for name in needed:
        inside, _, file = name.rpartition("/")
        if inside not in there:
            there[inside] = set(os.listdir(folder / inside)) if (folder / inside).is_dir() else set()
        if file not in there[inside]:
            missing.add(name)
    return missing


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} doesn't exist; {LAYOUT}") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{path} is a folder; {LAYOUT}") from None
