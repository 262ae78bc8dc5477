"""Weights on disk: read without running anybody's code, loaded whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from fastkd._wrappers import bare, plain_names
from fastkd.models import pickles

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """A state dict from ``.safetensors``, or from a pickle of nothing but tensors, plain containers and settings.

    A training script's checkpoint may hold it under ``state_dict`` or ``model``, next to its ``argparse.Namespace``.
    Names come without what torch's wrappers add to them.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is damaged, holds objects other than those, or holds no state dict.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return plain_names(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error}); fetch or save it again") from error
    state = pickles.load(path)
    for key in ("state_dict", "model"):  # how training scripts commonly wrap it
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no plain state dict of tensors")
    return plain_names(state)


def read_config(folder: Path) -> dict:
    """``config.json`` of a folder written by ``save_pretrained``.

    Raises:
        FileNotFoundError: No such folder, or no such file in it.
        ValueError: The file is not a JSON object.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; from_pretrained needs a folder written by save_pretrained")
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG_FILE}; from_pretrained needs a folder written by save_pretrained"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return values


def load_strictly(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load every tensor or none: missing, unexpected and misshapen names are all told before anything is written.

    Floating tensors stored in lower precision are cast to the model's.

    Raises:
        ValueError: The names or shapes are not exactly the model's.
    """
    with bare(model) as inner:
        _check_names(inner.state_dict(), state, source)
        inner.load_state_dict(state)


def _check_names(own: Mapping[str, Tensor], state: dict[str, Tensor], source: str) -> None:
    problems = []
    for what, names in (("missing", own.keys() - state.keys()), ("unexpected", state.keys() - own.keys())):
        if names:
            problems.append(f"{len(names)} {what} ({some(sorted(names))})")
    shapes = [
        f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}"
        for k in sorted(own.keys() & state.keys())
        if own[k].shape != state[k].shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} of another shape ({some(shapes)})")
    if problems:
        raise ValueError(f"{source} does not fit this model: {'; '.join(problems)}. Nothing was loaded.")


def some(names: list[str], limit: int = 6) -> str:
    """The first of many names, for an error."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
