"""Traverse datasets that contain others: ConcatDataset, Subset and custom wrappers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset


def set_epoch(dataset: Any, epoch: int) -> None:
    """Set the epoch of a dataset, or of the datasets inside it if it has no ``set_epoch``."""
    for part in leaves(dataset, "set_epoch"):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


def declared_values(dataset: Any, name: str) -> list[Any]:
    """Return the values of an attribute, one per dataset in `leaves`; None where it is not declared."""
    return [getattr(part, name, None) for part in leaves(dataset, name)]


def named_sets(dataset: Any) -> dict[str, int]:
    """Return the names of the sets in a dataset, with samples per epoch; a set without a name has that of its class."""
    sizes = getattr(dataset, "sizes", None)
    if isinstance(sizes, Mapping):  # a MixedDataset
        return dict(sizes)
    found: dict[str, int] = {}
    for part in leaves(dataset):
        source = getattr(part, "refcoco", part)
        texts = [text for text in (getattr(source, key, None) for key in ("name", "split")) if isinstance(text, str)]
        name = " ".join(texts) or type(part).__name__
        found[name] = found.get(name, 0) + (len(part) if hasattr(part, "__len__") else 0)
    return found


def leaves(dataset: Any, name: str = "") -> list[Any]:
    """Return the innermost datasets; with ``name``, stop at a dataset that has this attribute."""
    return list(_collect(dataset, name, {id(dataset): dataset}).values())


def _collect(dataset: Any, name: str, seen: dict[int, Any]) -> dict[int, Any]:
    inside = [] if name and getattr(dataset, name, None) is not None else _contained(dataset)
    if not inside:
        return {id(dataset): dataset}
    found: dict[int, Any] = {}
    for part in inside:
        if id(part) not in seen:  # shared or cyclic references
            seen[id(part)] = part
            found |= _collect(part, name, seen)
    return found


def _contained(dataset: Any) -> list[Any]:
    """Return the datasets among an object's attributes, including those in lists and dicts."""
    found: list[Any] = []
    for value in getattr(dataset, "__dict__", {}).values():
        items = list(value.values()) if isinstance(value, Mapping) else value
        if isinstance(items, list | tuple):
            if items and _is_dataset(items[0]):  # do not scan long lists of other objects
                found.extend(item for item in items if _is_dataset(item))
        elif _is_dataset(value):
            found.append(value)
    return found


def _is_dataset(value: Any) -> bool:
    """Return whether a value is a dataset instance, by class or by its ``set_epoch``."""
    return not isinstance(value, type) and (isinstance(value, Dataset) or hasattr(value, "set_epoch"))
