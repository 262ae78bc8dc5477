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


def find_images(root: Path, image_root: str | os.PathLike[str] | None, needed: list[str]) -> Path:
    """The folder that holds the image files ``needed``; all must be there."""
    folders = [root / folder for folder in IMAGE_FOLDERS] if image_root is None else [Path(image_root)]
    best: tuple[int, Path] | None = None
    for folder in folders:
        if not folder.is_dir():
            continue
        missing = set(needed) - set(os.listdir(folder))
        if not missing:
            return folder
        if best is None or len(missing) < best[0]:
            best = (len(missing), folder / min(missing))
    tried = "\n".join(f"  {folder}" for folder in folders)
    if best is not None:
        raise FileNotFoundError(f"{best[0]} of {len(needed)} images are missing, such as {best[1]}; tried:\n{tried}")
    mend = "put the images there, or pass image_root" if image_root is None else "image_root is not a folder"
    raise FileNotFoundError(f"no folder of images; tried:\n{tried}\n{mend}")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} doesn't exist; {LAYOUT}") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{path} is a folder; {LAYOUT}") from None
