"""Read and write converted LAVT files: weights, configuration, tokenizer and origin in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import fastkd
from fastkd._atomic import replace_files
from fastkd.data.tokenizer import Tokenizer
from fastkd.models.lavt.config import LAVTConfig

MODEL = "lavt"
_TOKENIZER = "tokenizer_files"


def write(
    path: Path, config: LAVTConfig, state: Mapping[str, Tensor], tokenizer: Tokenizer | None, origin: dict[str, str]
) -> dict[str, str]:
    """Write a LAVT atomically, with ``origin`` in its metadata, and return the metadata.

    Raises:
        OSError: The disk is full or the folder is not writable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {
        "format": "pt",
        "model": MODEL,
        "fastkd_version": fastkd.__version__,
        "config": json.dumps(config.to_dict(), sort_keys=True),
        **origin,
    }
    if tokenizer is not None and tokenizer.name != "shapes":
        metadata[_TOKENIZER] = tokenizer.to_json()
    tensors = {name: tensor.detach().to("cpu", copy=False).contiguous() for name, tensor in state.items()}
    try:
        with replace_files(path) as (partial,):
            save_file(tensors, partial, metadata=metadata)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{path} can't be written ({reason}); free some disk space or choose another path") from error
    return metadata


def read(path: Path) -> tuple[LAVTConfig, dict[str, Tensor], Tokenizer | None]:
    """Return configuration, weights and tokenizer (None if the file has none) of a file written by `write`.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged or was not written by ``fastkd convert``.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            if metadata.get("model") != MODEL or "config" not in metadata:
                raise ValueError(
                    f"{path} was not written by 'fastkd convert': its metadata do not describe a LAVT. Convert the "
                    "checkpoint again, or pass its tensors to LAVT.from_state_dict"
                )
            state: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); download or save it again") from error
    config = _config(path, metadata["config"])
    tokenizer = None
    if _TOKENIZER in metadata:
        try:
            tokenizer = Tokenizer.from_json(metadata[_TOKENIZER], str(config.tokenizer))
        except ValueError as error:
            raise ValueError(f"{path}: the tokenizer in its metadata can't be read ({error})") from error
    return config, state, tokenizer


def _config(path: Path, text: str) -> LAVTConfig:
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, got {type(values).__name__}")
        return LAVTConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: the configuration in its metadata does not describe a LAVT ({error})") from error
