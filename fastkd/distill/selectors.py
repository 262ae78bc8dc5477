"""Selectors: short paths that select tensors from a model's output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from fastkd._messages import suggestion
from fastkd.distill.recorded import RecordedOutput

Selector = str | Callable[[Any], Any] | tuple[str | Callable[[Any], Any], ...]
"""A path such as ``"stages.3"``, a callable that takes the model's output, or a tuple of either."""


def select(selector: Selector, output: Any, taps: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
    """Return the selected values, always as a tuple; a path may begin with the name of a tap."""
    if isinstance(selector, tuple):
        return tuple(value for part in selector for value in select(part, output, taps))
    if isinstance(output, RecordedOutput):
        return (output.read(selector),)
    if not isinstance(selector, str):
        return (selector(output),)
    head, _, rest = selector.partition(".")
    if taps is not None and head in taps:
        return (follow(taps[head], rest) if rest else taps[head],)
    return (follow(output, selector, taps or ()),)


def follow(value: Any, path: str, taps: Iterable[str] = ()) -> Any:
    """Follow a dotted path through attributes, mapping keys and list positions.

    A position may be a number (``"stages.3"``, ``"stages.-1"``), ``*`` for a whole list (``"stages.*"``) or a slice
    (``"stages.1:"``); the last two return a list. ``taps`` are other names that a path could have begun with.

    Raises:
        ValueError: the path does not exist or leads to None; the message names the failing part and its alternatives.
    """
    walked = ""
    for part in path.split("."):
        where = f"{type(value).__name__}{f' at {walked!r}' if walked else ''}"
        if isinstance(value, torch.Tensor):
            raise ValueError(f"path {path!r} continues with {part!r}, but {where} is a tensor: end the path there")
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif is_list and (part == "*" or ":" in part):
            value = list(value[_slice(part, path)])
        elif is_list and part.lstrip("-").isdigit():
            if not -len(value) <= int(part) < len(value):
                count = f"{len(value)} items" if len(value) else "0 items: this network does not compute it"
                raise ValueError(f"path {path!r} asks for item {part} of {where}, which has {count}")
            value = value[int(part)]
        elif hasattr(value, part) and not callable(getattr(value, part)):
            value = getattr(value, part)
        else:
            names = [*_names_in(value), *(() if walked else taps)]
            raise ValueError(f"path {path!r}: {where} has no {part!r}.{suggestion(part, names)}")
        walked = f"{walked}.{part}" if walked else part
        if value is None:
            raise ValueError(f"path {path!r} leads to None at {walked!r}: the model did not return it")
    return value


def _names_in(value: Any) -> list[str]:
    """Return the names that can follow this value in a path."""
    if isinstance(value, Mapping):
        return [str(key) for key in value]
    if isinstance(value, torch.Tensor):
        return []
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [*getattr(value, "_fields", ()), *(str(i) for i in range(len(value)))]
    if is_dataclass(value):
        return [f.name for f in fields(value)]
    return [name for name in vars(value) if not name.startswith("_")] if hasattr(value, "__dict__") else []


def _slice(part: str, path: str) -> slice:
    if part == "*":
        return slice(None)
    try:
        return slice(*(int(bound) if bound else None for bound in part.split(":")))
    except (ValueError, TypeError):
        raise ValueError(f"path {path!r}: {part!r} is neither a number, '*' nor a slice such as '1:'") from None
