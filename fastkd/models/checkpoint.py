"""Read weights without running code from the file; load all of them or none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastkd._atomic import replace_files
from fastkd._messages import shortened
from fastkd._wrappers import plain_names, unwrapped
from fastkd.models import pickles

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
RECORD_FILE = "training.json"


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict from ``.safetensors``, or from a pickle of tensors, plain containers and settings only.

    It may be nested under ``state_dict`` or ``model``, as in training checkpoints with an ``argparse.Namespace``. The
    prefixes of torch's wrappers are removed from the names.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, holds other objects, or does not hold a state dict.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return plain_names(load_file(path))
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a readable safetensors file ({error}); download or save it again"
            ) from error
    state = pickles.load(path)
    for key in ("state_dict", "model"):  # common layouts of training checkpoints
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} does not hold a plain state dict of tensors")
    return plain_names(state)


def read_config(folder: Path) -> dict:
    """Read ``config.json`` from a folder written by ``save_pretrained``.

    Raises:
        FileNotFoundError: The folder or the file does not exist.
        ValueError: The file is not a JSON object.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; from_pretrained needs a folder written by save_pretrained")
    path = folder / CONFIG_FILE
    if not path.is_file():
        best = folder / "best"
        hint = f". Did you mean {best}?" if (best / CONFIG_FILE).is_file() else ""  # the folder of a run
        raise FileNotFoundError(
            f"{folder} has no {CONFIG_FILE}; from_pretrained needs a folder written by save_pretrained{hint}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return values


def write_record(record: Mapping[str, Any], folder: Path) -> None:
    """Write settings and scores of the run that trained a model into its folder."""
    with replace_files(folder / RECORD_FILE) as (partial,):
        partial.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return what `write_record` wrote, or None; nothing depends on it, so an unreadable file is not an error."""
    try:
        values = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def load_strictly(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load all tensors, or none if names or shapes differ; cast lower precisions to the model's.

    Raises:
        ValueError: Names are missing or unexpected, or shapes differ; the message lists them.
    """
    with unwrapped(model) as inner:
        _check_names(inner.state_dict(), state, source)
        inner.load_state_dict(state)


def _check_names(own: Mapping[str, Tensor], state: dict[str, Tensor], source: str) -> None:
    problems = []
    for problem, names in (("missing", own.keys() - state.keys()), ("unexpected", state.keys() - own.keys())):
        if names:
            problems.append(f"{len(names)} {problem} ({shortened(sorted(names), 6)})")
    shapes = [
        f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}"
        for k in sorted(own.keys() & state.keys())
        if own[k].shape != state[k].shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} of another shape ({shortened(shapes, 6)})")
    if problems:
        raise ValueError(f"{source} does not match this model: {'; '.join(problems)}. Nothing was loaded.")
