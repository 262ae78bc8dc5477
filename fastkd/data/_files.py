"""Read the files of a RefCOCO folder, treating them as untrusted."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastkd.data._confine import check_inside, check_name
from fastkd.data._plain_pickle import loads
from fastkd.data._values import brief, is_int
from fastkd.errors import FastKDWarning

LAYOUT = """expected layout:
  <root>/refcoco/{instances.json, refs(unc).p, refs(google).p}
  <root>/refcoco+/{instances.json, refs(unc).p}
  <root>/refcocog/{instances.json, refs(umd).p, refs(google).p}
  <root>/grefcoco/{instances.json, grefs(unc).json}
  <root>/refclef/{instances.json, refs(unc).p, refs(berkeley).p}
  <root>/rrsisd/{instances.json, refs(unc).p}
  <root>/images/train2014/COCO_train2014_*.jpg"""
IMAGE_FOLDERS = ("images/mscoco/images/train2014", "images/train2014", "train2014", "coco/train2014")
_FIELDS = {"ref_id": int, "ann_id": int, "category_id": int, "image_id": int, "split": str, "sentences": list}


def absolute(path: Path) -> Path:
    """Return an absolute path without "..", so that equal places have equal paths; other links are not followed."""
    return path.resolve() if ".." in path.parts else path.absolute()


def read_refs(path: Path) -> list[dict[str, Any]]:
    """Read the refs from a pickle written by Python 2 or 3, or from JSON.

    Raises:
        FileNotFoundError: The file does not exist; the message shows the expected layout.
        pickle.UnpicklingError: The file names a class or function, or is not a pickle; also a ValueError.
        ValueError: The content is not a list of refs.
    """
    refs = load_refs(path)
    if not all(isinstance(ref, dict) for ref in refs):
        raise ValueError(f"{path} must hold a list of dicts")
    for number, ref in enumerate(refs):
        if fault := ref_fault(ref, lists_targets(path)):
            raise ValueError(f"{path}: {fault[0]} of ref number {number} must be {fault[1]}, got {fault[2]}")
    return refs


def lists_targets(path: Path) -> bool:
    """Return whether the refs of a file may have several targets: those in JSON, of gRefCOCO."""
    return path.suffix == ".json"


def load_refs(path: Path) -> list[Any]:
    """Return the content of a refs file, a list whose entries are not checked yet; raise like `read_refs`."""
    content = read_bytes(path)
    refs = read_json(content, path) if lists_targets(path) else _unpickle(content, path)
    if not isinstance(refs, list):
        raise ValueError(f"{path} must hold a list of dicts, got {type(refs).__name__}")
    return refs


def _unpickle(content: bytes, path: Path) -> Any:
    try:
        return loads(content, path)
    except UnicodeDecodeError as error:
        warnings.warn(f"{path} is not utf-8 ({error.reason}); read as latin1", FastKDWarning, stacklevel=5)
        return loads(content, path, "latin1")


def ref_fault(ref: dict[str, Any], several: bool = False) -> tuple[str, str, str] | None:
    """Return the first field of a ref that has another type than expected: its name, that type and its value.

    With ``several``, a ref may list several annotations and categories, as in gRefCOCO.
    """
    for field, kind in _FIELDS.items():
        value = ref.get(field)
        if several and field in ("ann_id", "category_id") and isinstance(value, list):
            if not all(is_int(number) for number in value) or (field == "ann_id" and len(set(value)) != len(value)):
                return field, "a list of different integers", brief(value)
        elif not (is_int(value) if kind is int else isinstance(value, kind)):
            return field, kind.__name__, brief(value)
    return None


def read_instances(path: Path) -> dict[str, Any]:
    """Read COCO-style annotations: a dict with the lists ``images``, ``annotations`` and ``categories``."""
    content = read_json(read_bytes(path), path)
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path} has no list {key!r}: it is not a COCO instances file")
    return content


def read_json(content: bytes, where: object) -> Any:
    """Return the content of a JSON file, or of a line of one; ``where`` begins the message of a ``ValueError``."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} can't be read as JSON ({error}): download it again") from error


def find_images(
    root: Path,
    image_root: str | os.PathLike[str] | None,
    needed: Sequence[str],
    partial: bool = False,
    usual: Sequence[str] = IMAGE_FOLDERS,
) -> tuple[Path, set[str]]:
    """Return the image folder, and those of the ``needed`` files that it lacks (none unless ``partial``).

    A name such as "train2014/x.jpg" may also be relative to the parent of a usual folder.

    Args:
        root: The folder of the set; a usual folder in it must not be a link out of it.
        image_root: The image folder, or None to look for a usual one.
        needed: Names of the files in it.
        partial: Accept a folder that lacks some of them.
        usual: The usual folders below ``root``.

    Raises:
        FileNotFoundError: There is no such folder, or a file is missing and ``partial`` is False.
        ValueError: A name points outside of the folder, or a link leads out of it.
    """
    for name in needed:
        check_name(name, "instances.json")
    folders, best = best_folder(root, image_root, needed, usual)
    tried = "\n".join(f"  {folder}" for folder in folders)
    if best is None:
        hint = "put the images there, or pass image_root" if image_root is None else "image_root is not a folder"
        raise FileNotFoundError(f"no image folder; tried:\n{tried}\n{hint}")
    folder, missing, links = best
    if missing and not (partial and len(missing) < len(needed)):
        example = folder / min(missing)
        raise FileNotFoundError(
            f"{len(missing)} of {len(needed)} images are missing, such as {example}; tried:\n{tried}"
        )
    for name in ("", *sorted(links)):
        check_inside(folder / name, root if image_root is None else folder)
    return folder, missing


def best_folder(
    root: Path, image_root: str | os.PathLike[str] | None, needed: Sequence[str], usual: Sequence[str]
) -> tuple[list[Path], tuple[Path, set[str], set[str]] | None]:
    """Return the folders to look for images in, and the one that lacks the fewest, or None if there are none.

    The second value is the folder, the names that it lacks, and those that are links; see `find_images`.
    """
    folders = [root / folder for folder in usual] if image_root is None else [Path(image_root)]
    if any("/" in name for name in needed):
        folders += [parent for folder in folders if (parent := folder.parent) not in folders]
    best: tuple[Path, set[str], set[str]] | None = None
    for folder in folders:
        if folder.is_dir() and (best is None or best[1]):
            missing, links = find_missing(folder, needed)
            if best is None or len(missing) < len(best[1]):
                best = folder, missing, links
    return folders, best


def find_missing(folder: Path, needed: Sequence[str]) -> tuple[set[str], set[str]]:
    """Return the names of files that the folder lacks, and of files and folders in it that are links."""
    present: dict[str, dict[str, bool]] = {}  # folder to the names of its files, and whether each is a link
    missing, links = set(), set()
    for name in needed:
        subfolder, _, file = name.rpartition("/")
        if subfolder not in present:
            present[subfolder] = _entries(folder / subfolder)
            if os.path.realpath(folder / subfolder) != os.path.join(os.path.realpath(folder), *subfolder.split("/")):
                links.add(subfolder)
        if file not in present[subfolder]:
            missing.add(name)
        elif present[subfolder][file]:
            links.add(name)
    return missing, links


def _entries(folder: Path) -> dict[str, bool]:
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry.is_symlink() for entry in entries}


def read_bytes(path: Path) -> bytes:
    """Return the content of a regular file of a set; a named pipe would block, a device never end."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; {LAYOUT}")
    if not path.exists():
        raise FileNotFoundError(f"{path} doesn't exist; {LAYOUT}")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file: expected a copy of the published file")
    return path.read_bytes()
