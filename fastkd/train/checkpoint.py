"""Write, find and read checkpoints: the student alone, or all that a run needs to continue.

A run's checkpoint is a folder ``checkpoints/step-000500``, which is complete or absent:

- ``student.safetensors``, ``aligners.safetensors`` (all that trains outside the student) and ``average.safetensors``;
- ``optimizer.pt``, the optimiser's state dict, which loads with ``weights_only=True``;
- ``state.json``: step, seconds, settings, term weights, evaluations, and size and CRC-32 of the other files.

Nothing else is needed: learning rate, order of samples and random numbers are functions of the step.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastkd._atomic import replace_folder
from fastkd._wrappers import unwrapped
from fastkd.errors import FastKDWarning
from fastkd.models.checkpoint import write_record

FOLDER = "checkpoints"
WRITE_ERRORS = (OSError, SafetensorError)  # of a full disk, say
_FORMAT = 1
_PARTS = ("student", "aligners", "average")
_NAME = re.compile(r"step-(\d{6,})")


@dataclass
class Checkpoint:
    """State of a run after a step.

    Attributes:
        step: optimiser steps taken.
        tensors: ``"student"``, ``"aligners"`` or ``"average"`` to tensors by name; empty ones are not written.
        optimizer: the optimiser's state dict.
        state: everything else, as JSON values.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Any]
    state: dict[str, Any]


def write_checkpoint(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write ``folder/step-…`` and return it; it appears once it is complete and on the disk."""
    path = folder / f"step-{checkpoint.step:06d}"
    with replace_folder(path, durable=True) as partial:
        for part, tensors in checkpoint.tensors.items():
            if tensors:
                # Copies: safetensors rejects tensors that share memory.
                host = {
                    name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
                    for name, t in tensors.items()
                }
                save_file(host, str(partial / f"{part}.safetensors"))
        save_plain(checkpoint.optimizer, partial / "optimizer.pt")
        files = {file.name: [file.stat().st_size, _crc32(file)] for file in sorted(partial.iterdir())}
        state = {"format": _FORMAT, "step": checkpoint.step, **checkpoint.state, "files": files}
        (partial / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    return path


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint to the CPU.

    Raises:
        ValueError: a file is missing, damaged or of another format.
    """
    state = read_state(path)
    tensors = {
        part: load_file(path / f"{part}.safetensors") for part in _PARTS if f"{part}.safetensors" in state["files"]
    }
    optimizer = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    return Checkpoint(state["step"], tensors, optimizer, state)


def read_state(path: Path) -> dict[str, Any]:
    """Return a checkpoint's ``state.json`` after checking all files against it.

    Raises:
        ValueError: as in `read_checkpoint`.
    """
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state["format"] != _FORMAT:
            raise ValueError(f"format {state['format']!r}, this version of fastkd reads {_FORMAT}")
        for name, expected in state["files"].items():
            found = [(path / name).stat().st_size, _crc32(path / name)]
            if found != expected:
                raise ValueError(f"{name} has (size, CRC-32) {found}, written were {expected}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint {path} is incomplete or damaged: {error!s}") from error
    return state


def find_checkpoints(folder: Path) -> dict[int, Path]:
    """Return step to path of the checkpoints in a folder, the latest first; their content is not checked."""
    found = {int(match[1]): path for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the latest checkpoint that can be read, or None; warn about those that cannot."""
    for path in find_checkpoints(folder).values():
        try:
            read_state(path)
        except ValueError as error:
            warnings.warn(f"{error}; it is skipped", FastKDWarning, stacklevel=2)
        else:
            return path
    return None


class CheckpointWriter:
    """Write the checkpoints of a run and remove old ones.

    Args:
        folder: folder of the checkpoints; None writes none.
        keep: number of latest ones to keep.
        latest: step of the checkpoint that the run continues from.
    """

    def __init__(self, folder: Path | None, keep: int, latest: int | None = None) -> None:
        self.folder, self.keep, self.latest = folder if keep else None, keep, latest

    def write(self, checkpoint: Checkpoint, best: int | None) -> str | None:
        """Write a checkpoint unless that of the step exists; keep that of step ``best`` too.

        Returns:
            Why it could not be written, after a warning, or None.
        """
        if self.folder is None or checkpoint.step == self.latest:
            return None
        try:
            write_checkpoint(checkpoint, self.folder)
        except WRITE_ERRORS as error:
            latest = "there is no earlier one" if self.latest is None else f"that of step {self.latest} is kept"
            warnings.warn(
                f"the checkpoint of step {checkpoint.step} could not be written to {self.folder} ({error}); {latest}",
                FastKDWarning,
                stacklevel=2,
            )
            return str(error)
        self.latest = checkpoint.step
        remove_old_checkpoints(self.folder, self.keep, best, checkpoint.step)
        return None


def remove_old_checkpoints(folder: Path, keep: int, best: int | None, latest: int) -> None:
    """Remove all checkpoints but the ``keep`` latest until step ``latest``, and that of step ``best``.

    Those after ``latest`` are damaged: the run has continued from an earlier one.
    """
    steps = list(find_checkpoints(folder))
    kept = [step for step in steps if step <= latest][:keep]
    for step in steps:
        if step not in (*kept, best):
            shutil.rmtree(folder / f"step-{step:06d}", ignore_errors=True)


def save_student(student: nn.Module, folder: Path, record: Mapping[str, Any] | None = None) -> Path:
    """Save the student to a folder and return the folder; an earlier checkpoint is replaced once this one is complete.

    Calls the model's ``save_pretrained``, or writes ``model.safetensors`` if there is none. Parameter names have no
    wrapper prefixes (``torch.compile``, data parallelism, averaging). ``record``, settings and scores of the run, is
    written to ``training.json``.
    """
    with replace_folder(folder) as partial, unwrapped(student) as model:
        if record is not None and hasattr(model, "training_run"):
            setattr(model, "training_run", dict(record))  # noqa: B010 (the model takes it along, to the hub for example)
        save_pretrained: Any = getattr(model, "save_pretrained", None)
        if save_pretrained is not None:
            save_pretrained(partial)
        else:
            from safetensors.torch import save_model

            save_model(model, str(partial / "model.safetensors"))
        if record is not None:
            write_record(record, partial)
    return folder


def save_plain(content: Any, path: Path) -> None:
    """Save tensors and plain values with torch.

    Raises:
        OSError: the file could not be written; torch itself raises a RuntimeError on a full disk.
    """
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value
