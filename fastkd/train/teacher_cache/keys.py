"""Keys of samples: digests of what the teacher receives.

A key depends on image, sentence, transform and tokenizer, for datasets of any kind. A sample that differs in any of
them, such as one that is augmented at random, has another key and is not found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastkd.train.digest import as_bytes

SIZE = 16  # bytes of the digest of one input


def sample_keys(batch: Mapping[str, Any], names: Sequence[str]) -> list[bytes]:
    """Return the key of each sample of a batch: the digests of the named inputs, one after another.

    Raises:
        ValueError: an input is missing, or does not have one row per sample.
    """
    columns = [_digests(name, batch[name]) for name in names]
    if len({len(column) for column in columns}) != 1:
        found = {name: len(column) for name, column in zip(names, columns, strict=True)}
        raise ValueError(f"the batch must hold one row per sample for each of the teacher's inputs, got rows {found}")
    return [b"".join(row) for row in zip(*columns, strict=True)]


def digest_of(key: bytes, number: int) -> bytes:
    """Return the digest of an input, by its number, from a sample's key."""
    return key[number * SIZE : (number + 1) * SIZE]


def _digests(name: str, value: Any) -> list[bytes]:
    if isinstance(value, Tensor) and value.ndim:
        kind = f"{value.dtype} {tuple(value.shape[1:])}".encode()
        return [hashlib.blake2b(as_bytes(row), digest_size=SIZE, person=_person(kind)).digest() for row in value]
    if isinstance(value, list | tuple):
        return [hashlib.blake2b(repr(item).encode(), digest_size=SIZE).digest() for item in value]
    raise ValueError(
        f"the teacher's input {name!r} must be a tensor or list with one row per sample, got {type(value).__name__}"
    )


def _person(kind: bytes) -> bytes:
    """Return the 16 bytes that distinguish equal values of another dtype or shape."""
    return hashlib.blake2b(kind, digest_size=16).digest()
