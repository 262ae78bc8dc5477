"""Selectors: small paths that pick tensors out of a model's output."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch

Selector = str | Callable[[Any], Any] | tuple[str | Callable[[Any], Any], ...]
"""A path such as ``"stages.3"``, a callable that takes the model's output, or a tuple of either."""


def hint(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'a' or 'b'?`` when something known is close to name, else a list of what there is."""
    names = [str(k) for k in known]
    close = difflib.get_close_matches(name, names, n=3)
    if close:
        return f" Did you mean {' or '.join(map(repr, close))}?"
    if not names:
        return ""
    return f" There is: {', '.join(map(repr, names[:12]))}{', ...' if len(names) > 12 else ''}."


def names_of(value: Any) -> list[str]:
    """The names a path may go on with from this value."""
    if isinstance(value, Mapping):
        return [str(key) for key in value]
    if isinstance(value, torch.Tensor):
        return []
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [*getattr(value, "_fields", ()), *(str(i) for i in range(len(value)))]
    if is_dataclass(value):
        return [f.name for f in fields(value)]
    return [name for name in vars(value) if not name.startswith("_")] if hasattr(value, "__dict__") else []


def follow(value: Any, path: str) -> Any:
    """Follow a dotted path through attributes, mapping keys and list positions.

    A position may be a number (``"stages.3"``, ``"stages.-1"``), ``*`` for all of a list (``"stages.*"``) or a slice
    (``"stages.1:"``); the last two give a list.

    Raises:
        ValueError: the path leads nowhere, or to None; the message says where it stopped and what was there.
    """
    walked = ""
    for part in path.split("."):
        where = f"{type(value).__name__}{f' at {walked!r}' if walked else ''}"
        if isinstance(value, torch.Tensor):
            raise ValueError(f"path {path!r} goes on to {part!r}, but {where} is a tensor: end the path there")
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif is_list and (part == "*" or ":" in part):
            value = list(value[_slice(part, path)])
        elif is_list and part.lstrip("-").isdigit():
            if not -len(value) <= int(part) < len(value):
                has = f"{len(value)} items" if len(value) else "0 items: this network computes none"
                raise ValueError(f"path {path!r} asks for item {part} of {where}, which has {has}")
            value = value[int(part)]
        elif hasattr(value, part) and not callable(getattr(value, part)):
            value = getattr(value, part)
        else:
            raise ValueError(f"path {path!r}: {where} has no {part!r}.{hint(part, names_of(value))}")
        walked = f"{walked}.{part}" if walked else part
        if value is None:
            raise ValueError(f"path {path!r} leads to None at {walked!r}: the model did not return it")
    return value


def _slice(part: str, path: str) -> slice:
    if part == "*":
        return slice(None)
    try:
        return slice(*(int(bound) if bound else None for bound in part.split(":")))
    except (ValueError, TypeError):
        raise ValueError(f"path {path!r}: {part!r} is neither a number, '*' nor a slice such as '1:'") from None


def select(selector: Selector, output: Any, taps: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
    """The values a selector picks, always as a tuple. A path that starts with a tap's name starts from that tap."""
    if isinstance(selector, tuple):
        return tuple(value for one in selector for value in select(one, output, taps))
    if not isinstance(selector, str):
        return (selector(output),)
    head, _, rest = selector.partition(".")
    if taps is not None and head in taps:
        return (follow(taps[head], rest) if rest else taps[head],)
    return (follow(output, selector),)
