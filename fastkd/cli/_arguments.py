"""Checks and conversions of command-line arguments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import tyro

from fastkd.train.config import TrainConfig

Config = Annotated[TrainConfig, tyro.conf.arg(name="")]


def check_folder(option: str, folder: Path) -> None:
    """Raise ``OSError`` before any work is done if an output folder cannot be created or written to."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{option}: {existing} is a file, so {folder} cannot be a folder")
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"{option}: {existing} is not writable")


def check_file(option: str, file: Path) -> None:
    """Raise ``OSError`` before any work is done if an output file cannot be written."""
    if file.is_dir():
        raise IsADirectoryError(f"{option}: {file} is a folder; pass the name of a file")
    check_folder(option, file.parent)
