"""Read text-prompted teachers from folders and the hub: weights, configuration, preprocessing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd._messages import shortened
from fastkd.data.tokenizer import has_tokenizer
from fastkd.models import checkpoint, hub

_FETCHED = ["*.json", "*.safetensors", "*.txt"]  # weights (no pickles) and tokenizer files
_MAX_WORDS = 32  # referring expressions are shorter; most of CLIP's 77 positions would be padding
OPTIONS = ("image_size", "image_mean", "image_std", "max_words", "tokenizer")
"""Fields of `TeacherConfig` that a caller may override."""


@dataclass
class TeacherConfig:
    """Inputs that a text-prompted teacher expects.

    Attributes:
        model_type: transformers' name of the architecture.
        image_size: Side of the square that images are resized to.
        image_mean: Mean of red, green and blue, for values in [0, 1], that the network was trained with.
        image_std: Their standard deviations.
        max_words: Token ids per sentence, at most the text encoder's position embeddings.
        tokenizer: Folder of its tokenizer for `fastkd.data.load_tokenizer`, or None.
        keep_end: Whether the tokenizer must keep the end token of a truncated sentence.
    """

    model_type: str
    image_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    max_words: int
    tokenizer: str | None = None
    keep_end: bool = True


def model_type_of(path: str | Path) -> str | None:
    """Return the ``model_type`` in the configuration of a folder or hub name; None for fastkd's own models.

    Raises:
        ValueError: The configuration of a hub name could not be fetched.
    """
    folder = Path(path).expanduser()
    if hub.is_hub_name(str(path)):
        from huggingface_hub import hf_hub_download

        try:
            folder = Path(hf_hub_download(str(path), checkpoint.CONFIG_FILE)).parent
        except Exception as error:
            raise hub.fetch_error(str(path), error) from error
    if not (folder / checkpoint.CONFIG_FILE).is_file():
        return None
    return read_model_type(folder)


def read_model_type(folder: Path) -> str | None:
    """Return the ``model_type`` that a folder's configuration declares, or None.

    Raises:
        FileNotFoundError: The folder or its configuration does not exist.
        ValueError: The configuration is not a JSON object.
    """
    found = checkpoint.read_config(folder).get("model_type")
    return found if isinstance(found, str) else None


def fetch(path: str | Path) -> Path:
    """Return the folder of ``path``; download it if it is a hub name.

    Raises:
        ValueError: A hub name could not be fetched.
    """
    name = str(path)
    if not hub.is_hub_name(name):
        return Path(path).expanduser()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_FETCHED))
    except Exception as error:
        raise hub.fetch_error(name, error) from error


def load_network(class_name: str, folder: Path) -> Any:
    """Load a transformers network in float32; require a one-to-one match of parameters and weights.

    transformers itself would fill missing weights with random numbers and drop layers that the configuration lacks.

    Raises:
        FileNotFoundError: The folder holds no safetensors.
        ValueError: The weights are damaged or do not match the network.
        ImportError: The installed transformers does not have this class.
    """
    import torch
    import transformers

    if not hasattr(transformers, class_name):
        raise ImportError(
            f"{folder} needs transformers' {class_name}, which transformers {transformers.__version__} does not have: "
            "pip install --upgrade transformers"
        )
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"no weights in {folder}: expected safetensors, as save_pretrained writes them")
    try:
        network, report = getattr(transformers, class_name).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # damaged files and bad configurations raise many types
        kind, text = type(error).__name__, (str(error).splitlines() or [""])[0]
        raise ValueError(f"{folder} can't be loaded by transformers ({kind}: {text})") from error
    missing = [*report["missing_keys"], *report["mismatched_keys"]]
    # Older files also hold position ids 0, 1, 2, ..., which are not weights.
    unexpected = [key for key in report["unexpected_keys"] if not str(key).endswith("position_ids")]
    for keys, problem in ((missing, "missing or of another shape"), (unexpected, "unexpected")):
        if keys:
            raise ValueError(
                f"{folder}: its weights do not match {class_name} as its {checkpoint.CONFIG_FILE} describes it: "
                f"{len(keys)} {problem} ({shortened(sorted(map(str, keys)), 6)})"
            )
    return network


def read_config(
    network: Any,
    folder: Path,
    overrides: dict[str, Any],
    default_mean: tuple[float, ...],
    default_std: tuple[float, ...],
) -> TeacherConfig:
    """Return the teacher's configuration: ``overrides`` take precedence over the folder's files, then defaults.

    Raises:
        ValueError: A value is out of range, or a file is not JSON.
    """
    images = _read_preprocessor(folder)
    size = overrides.get("image_size", _side(images.get("size")) or network.config.vision_config.image_size)
    mean = _per_channel(overrides.get("image_mean", images.get("image_mean", default_mean)))
    std = _per_channel(overrides.get("image_std", images.get("image_std", default_std)))
    limit = network.config.text_config.max_position_embeddings
    words = overrides.get("max_words", min(_MAX_WORDS, limit))
    tokenizer = overrides.get("tokenizer", str(folder) if has_tokenizer(folder) else None)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"image_size must be an integer of at least 1, got {size!r}")
    for name, values in (("image_mean", mean), ("image_std", std)):
        numbers = len(values) == 3 and all(isinstance(value, int | float) for value in values)
        if not numbers or (name == "image_std" and min(values) <= 0):
            raise ValueError(f"{name} must be three numbers{' above 0' if name == 'image_std' else ''}, got {values!r}")
    if not isinstance(words, int) or not 3 <= words <= limit:
        raise ValueError(f"max_words must be from 3 to {limit}, the text encoder's position embeddings, got {words!r}")
    return TeacherConfig(network.config.model_type, size, tuple(mean), tuple(std), words, tokenizer)


def _read_preprocessor(folder: Path) -> dict[str, Any]:
    """Return the image settings in ``preprocessor_config.json`` or ``processor_config.json``."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.is_file():
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} is not JSON: {error}") from error
            values = values.get("image_processor", values) if isinstance(values, dict) else {}
            if values.get("do_normalize") is False:
                values = {**values, "image_mean": 0.0, "image_std": 1.0}
            if "image_mean" in values or "size" in values:
                return values
    return {}


def _per_channel(value: Any) -> tuple[Any, ...]:
    """Repeat a single number for the three channels, as image processors do."""
    return tuple(value) if isinstance(value, list | tuple) else (value,) * 3


def _side(size: Any) -> int | None:
    """Return the longest side of an image processor's ``size``, or None."""
    if isinstance(size, dict):
        sides = [side for side in size.values() if isinstance(side, int)]
        return max(sides, default=None)
    return size if isinstance(size, int) else None
