"""Checks and conversions of command-line arguments."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from fastkd.train.config import TrainConfig

Config = Annotated[TrainConfig, tyro.conf.arg(name="")]


def parse_terms(terms: Sequence[str]) -> dict[str, float]:
    """Convert ``["first_order=0.5", "logit=0.2"]`` to a dict of name to share.

    Raises:
        ValueError: an entry is not name=share, or a name is repeated.
    """
    shares: dict[str, float] = {}
    for term in terms:
        name, equals, share = term.partition("=")
        try:
            if not equals or name in shares:
                raise ValueError
            shares[name] = float(share)
        except ValueError:
            raise ValueError(f"terms: expected each term once, as name=share (first_order=0.5), got {term!r}") from None
    return shares


def check_folder(option: str, folder: Path) -> None:
    """Raise ``OSError`` before any work is done if an output folder cannot be created or written to."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{option}: {existing} is a file, so {folder} cannot be a folder")
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"{option}: {existing} is not writable")
