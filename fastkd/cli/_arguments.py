"""Checks and conversions of command-line arguments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from fastkd.train.config import TrainConfig

Config = Annotated[TrainConfig, tyro.conf.arg(name="")]

PATHS = ConstructorRegistry()
"""Expands ``~`` in paths: of ``--out=~/runs``, shells leave it as it is."""


@PATHS.primitive_rule
def _path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda texts: Path(texts[0]).expanduser(),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


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
