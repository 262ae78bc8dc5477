"""Look through data sets that hold others: ConcatDataset, Subset, and wrappers that anybody writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset


def set_epoch(dataset: Any, epoch: int) -> None:
    """Tell a data set its epoch; one without ``set_epoch`` hands it on to those that it holds."""
    for part in leaves(dataset, "set_epoch"):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


def declared_values(dataset: Any, name: str) -> list[Any]:
    """Return an attribute of a data set, or else of each that it holds; None stands for one that does not tell."""
    return [getattr(part, name, None) for part in leaves(dataset, name)]


def leaves(dataset: Any, name: str = "") -> list[Any]:
    """Return the innermost data sets; with a name, do not look into one that has the attribute."""
    return list(_walk(dataset, name, {id(dataset): dataset}).values())


def _walk(dataset: Any, name: str, seen: dict[int, Any]) -> dict[int, Any]:
    inside = [] if name and getattr(dataset, name, None) is not None else _held(dataset)
    if not inside:
        return {id(dataset): dataset}
    found: dict[int, Any] = {}
    for part in inside:
        if id(part) not in seen:  # held twice, or in a circle
            seen[id(part)] = part
            found |= _walk(part, name, seen)
    return found


def _held(dataset: Any) -> list[Any]:
    """Return the data sets among an object's attributes, singly or in a list or dict of them."""
    found: list[Any] = []
    for value in getattr(dataset, "__dict__", {}).values():
        several = list(value.values()) if isinstance(value, Mapping) else value
        if isinstance(several, list | tuple):
            if several and _is_dataset(several[0]):  # long lists of anything else are not gone through
                found.extend(one for one in several if _is_dataset(one))
        elif _is_dataset(value):
            found.append(value)
    return found


def _is_dataset(value: Any) -> bool:
    return not isinstance(value, type) and (isinstance(value, Dataset) or hasattr(value, "set_epoch"))
