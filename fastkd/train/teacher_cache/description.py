"""``cache.json``: what a teacher cache holds, how it was computed, and how two of them differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastkd._atomic import replace_files
from fastkd.data._nested import leaves

FILE = "cache.json"
FORMAT = 1
_TRANSFORM = ("image_size", "image_mean", "image_std", "max_words", "teacher_max_words")
_TOKENIZERS = ("tokenizer", "teacher_tokenizer")
_KINDS = {  # parts of the identity, and what a difference means; the first one that differs is reported
    "format": "written by another version of fastkd",
    "teacher": "of another teacher",
    "transform": "of another transform (image size, normalisation, number of words or tokenizer)",
    "data": "of another dataset",
    "terms": "of other terms or taps",
    "dtype": "in another dtype",
    "computed": "computed in another way",
}


def write_description(
    folder: Path, identity: Mapping[str, Any], measured: Mapping[str, Any], notes: Mapping[str, Any]
) -> None:
    """Write ``cache.json``."""
    content = {**identity, "measured": measured, "notes": notes}
    folder.mkdir(parents=True, exist_ok=True)
    with replace_files(folder / FILE, durable=True) as (partial,):
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_description(folder: Path) -> dict[str, Any]:
    """Return the content of ``cache.json``.

    Raises:
        FileNotFoundError: the folder is not a teacher cache.
        ValueError: the file is damaged or of another format.
    """
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not a teacher cache: it has no {FILE}; pass a folder written by fastkd cache"
        )
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = content["format"]
        if found == FORMAT and not set(_KINDS) <= set(content):
            raise KeyError(*sorted(set(_KINDS) - set(content)))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}): build the cache again with overwrite=True (--overwrite)"
        ) from error
    if found != FORMAT:
        raise ValueError(f"{path} has format {found!r}, this version of fastkd reads {FORMAT}: build the cache again")
    return content


def identity_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of ``cache.json`` that determines the shards."""
    return {kind: content[kind] for kind in _KINDS}


def fingerprint(content: Mapping[str, Any]) -> str:
    """Return a digest of the identity, which every shard carries."""
    text = json.dumps(identity_of(content), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def check_same(folder: Path, held: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` with the first kind of difference if a folder holds another cache than the requested one."""
    for kind, text in _KINDS.items():
        differ = differences(held[kind], requested[kind])
        if differ:
            raise ValueError(
                f"{folder} holds a cache {text} ({differ}): choose another folder, restore the arguments, or pass "
                "overwrite=True (--overwrite)"
            )


def differences(held: Any, requested: Any, name: str = "") -> str:
    """Return the values that differ, as text; empty if there are none."""
    if held == requested:
        return ""
    if isinstance(held, Mapping) and isinstance(requested, Mapping):
        keys = list(dict.fromkeys([*held, *requested]))
        inner = (differences(held.get(key), requested.get(key), f"{name}.{key}" if name else key) for key in keys)
        return ", ".join(text for text in inner if text)
    return f"{name}: {held!r} → {requested!r}" if name else f"{held!r} → {requested!r}"


def declared_transform(dataset: Any) -> dict[str, list[Any]]:
    """Return what the datasets in a dataset declare of their transform, by name; plain JSON values."""
    found: dict[str, list[Any]] = {}
    for part in leaves(dataset, "image_mean"):
        for name in _TRANSFORM:
            value = getattr(part, name, None)
            if isinstance(value, int | float | list | tuple):
                found.setdefault(name, []).append(list(value) if isinstance(value, tuple) else value)
        for name in _TOKENIZERS:
            pieces = getattr(getattr(part, name, None), "pieces", None)
            if callable(pieces):
                text = "\n".join(pieces())
                found.setdefault(name, []).append(hashlib.blake2b(text.encode(), digest_size=8).hexdigest())
    unique = {name: sorted({json.dumps(value) for value in values}) for name, values in found.items()}
    return {name: [json.loads(value) for value in values] for name, values in unique.items()}
