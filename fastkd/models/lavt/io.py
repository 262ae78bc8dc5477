"""LAVT in safetensors: weights, configuration and origin in one file."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastkd
from fastkd._console import typed
from fastkd.data.tokenizer import Tokenizer, load_tokenizer
from fastkd.errors import FastKDWarning
from fastkd.models import checkpoint
from fastkd.models.lavt.config import LAVTConfig
from fastkd.models.lavt.model import LAVT
from fastkd.models.lavt.published import read_checkpoint

MODEL = "lavt"
_TOKENIZER = "tokenizer_files"


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    tokenizer: str | None = None,
    image_size: int = 480,
    max_words: int = 20,
    overwrite: bool = False,
) -> dict[str, str]:
    """Turn a published LAVT checkpoint into one safetensors file that needs no pickle to load.

    Optimiser and scheduler are left behind. The file is written beside its destination and renamed into place, so there
    is never half of one.

    Args:
        source: The ``.pth``, in either layout; read as :func:`~fastkd.models.lavt.published.read_checkpoint` does.
        destination: The ``.safetensors`` to write.
        tokenizer: What :func:`fastkd.data.load_tokenizer` should be given for this model, e.g. the path of BERT's
            uncased ``vocab.txt``; its name and its files become part of the file. Where it is not there, a
            `FastKDWarning` says that its name alone was recorded.
        image_size: The size it was trained at; recorded only.
        max_words: Word ids it was trained with; recorded only.
        overwrite: Replace an existing file.

    Returns:
        What was recorded in the file's metadata: ``model``, ``config`` (JSON), ``layout``, ``fusion_heads``,
        ``fastkd_version``, ``source`` (file name) and ``source_sha256``.

    Raises:
        FileNotFoundError: No such source, or no folder to write into.
        FileExistsError: The destination exists and ``overwrite`` is False.
        OSError: The destination is a folder, or can't be written.
        ValueError: A damaged or foreign source, objects other than weights and settings in it (all are named), weights
            that do not fit LAVT exactly or are not finite, a destination that is no ``.safetensors``, or more words
            than the text encoder has places for.

    Example::

        convert("refcoco.pth", "teacher.safetensors")["source_sha256"]
    """
    source, destination = Path(source).expanduser(), Path(destination).expanduser()
    if destination.suffix != ".safetensors":
        raise ValueError(f"the converted file must be named *.safetensors, got {destination}")
    if not destination.parent.is_dir():
        raise FileNotFoundError(f"no folder {destination.parent} to write {destination.name} into")
    if destination.is_dir():
        raise IsADirectoryError(f"{destination} is a folder; name the file to write")
    if destination.exists() and not overwrite:
        raise FileExistsError(f"{destination} exists; choose another name or pass overwrite (--overwrite)")
    found = read_checkpoint(source)
    model = LAVT.from_state_dict(
        found.state,
        found.fusion_heads,
        bert_state_dict=found.bert_state,
        source=str(source),
        tokenizer=tokenizer,
        image_size=image_size,
        max_words=max_words,
    )
    if broken := [k for k, v in model.state_dict().items() if v.is_floating_point() and not bool(v.isfinite().all())]:
        raise ValueError(
            f"{source} holds NaN or Inf in {len(broken)} of its tensors ({checkpoint.some(broken)}): its training went "
            "wrong"
        )
    model.tokenizer = _tokenizer(tokenizer)
    places = (model.config.text or {}).get("max_position_embeddings", max_words)
    if max_words > places:
        raise ValueError(f"max_words must be at most {places}, the places of the text encoder, got {max_words}")
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    origin = {
        "layout": found.layout,
        "fusion_heads": "-".join(map(str, found.fusion_heads)),
        "source": typed(source.name).encode("utf-8", "replace").decode(),
        "source_sha256": digest,
    }
    return write(model, destination, origin)


def write(model: LAVT, path: Path, origin: dict[str, str]) -> dict[str, str]:
    """Write a model, with where it came from in the metadata; whole or not at all.

    Raises:
        OSError: No room, or no permission.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {
        "format": "pt",
        "model": MODEL,
        "fastkd_version": fastkd.__version__,
        "config": json.dumps(model.config.to_dict(), sort_keys=True),
        **origin,
    }
    if model.tokenizer is not None and model.tokenizer.name != "shapes":
        metadata[_TOKENIZER] = model.tokenizer.to_json()
    state = {k: v.detach().to("cpu", copy=False).contiguous() for k, v in model.state_dict().items()}
    fresh = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        os.close(handle)
        fresh = Path(name)
        save_file(state, fresh, metadata=metadata)
        fresh.chmod(0o644)  # temporary files are born private
        fresh.replace(path)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise OSError(f"{path} can't be written ({why}); choose another place, or make room there") from error
    finally:
        if fresh is not None:
            fresh.unlink(missing_ok=True)
    return metadata


def _tokenizer(name: str | None) -> Tokenizer | None:
    if name is None:
        return None
    try:
        return load_tokenizer(name)
    except FileNotFoundError as error:
        warnings.warn(f"only the tokenizer's name is recorded: {error}", FastKDWarning, stacklevel=3)
        return None


def read(path: Path) -> tuple[LAVTConfig, dict[str, Tensor], Tokenizer | None]:
    """Return configuration, weights and tokenizer (None where there is none) of a file that :func:`write` wrote.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A damaged file, or one that was not written by ``fastkd convert``.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            if metadata.get("model") != MODEL or "config" not in metadata:
                raise ValueError(
                    f"{path} was not written by 'fastkd convert': its metadata name no LAVT. Convert the checkpoint "
                    "again, or give its tensors to LAVT.from_state_dict"
                )
            state: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); fetch or save it again") from error
    try:
        values = json.loads(metadata["config"])
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, got {type(values).__name__}")
        config = LAVTConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: the configuration in its metadata does not describe a LAVT ({error})") from error
    tokenizer = None
    if _TOKENIZER in metadata:
        try:
            tokenizer = Tokenizer.from_json(metadata[_TOKENIZER], str(config.tokenizer))
        except ValueError as error:
            raise ValueError(f"{path}: the tokenizer in its metadata can't be read ({error})") from error
    return config, state, tokenizer
