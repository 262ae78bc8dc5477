"""Text-prompted teachers from folders and hub names."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from fastkd.data.tokenizer import has_tokenizer
from fastkd.models import checkpoint, hub
from fastkd.models.teachers.adapter import TeacherConfig, TextPromptedTeacher
from fastkd.models.teachers.clipseg import CLIPSegTeacher
from fastkd.models.teachers.sam3 import SAM3Teacher

CLASSES: tuple[type[TextPromptedTeacher], ...] = (CLIPSegTeacher, SAM3Teacher)
_NETWORKS = {CLIPSegTeacher: "CLIPSegForImageSegmentation", SAM3Teacher: "Sam3Model"}
_FETCHED = ["*.json", "*.safetensors", "*.txt"]  # weights without pickles, the tokenizer's files, nothing else
_WORDS = 32  # sentences of referring sets are shorter; CLIP's 77 places are mostly padding
_OPTIONS = ("image_size", "image_mean", "image_std", "max_words", "tokenizer")


def supported() -> dict[str, type[TextPromptedTeacher]]:
    """transformers' model_type to the class that wraps it."""
    return {model_type: cls for cls in CLASSES for model_type in cls.model_types}


def model_type_of(path: str | Path) -> str | None:
    """The ``model_type`` of a folder's or hub name's configuration; None where there is none, as in fastkd's own.

    Raises:
        ValueError: a hub name whose configuration could not be fetched.
    """
    folder = Path(path).expanduser()
    if hub.is_hub_name(str(path)):
        from huggingface_hub import hf_hub_download

        try:
            folder = Path(hf_hub_download(str(path), checkpoint.CONFIG_FILE)).parent
        except Exception as error:
            raise hub.not_fetched(str(path), error) from error
    if not (folder / checkpoint.CONFIG_FILE).is_file():
        return None
    found = checkpoint.read_config(folder).get("model_type")
    return found if isinstance(found, str) else None


def load(cls: type[TextPromptedTeacher], path: str | Path, options: dict[str, Any]) -> TextPromptedTeacher:
    """Build the adapter for a folder or hub name; see `TextPromptedTeacher.from_pretrained`."""
    import transformers

    folder = _folder(path)
    chosen = _class_for(cls, folder)
    name = _NETWORKS[chosen]  # type: ignore[type-abstract]
    if not hasattr(transformers, name):
        raise ImportError(
            f"{folder} needs transformers' {name}, which transformers {transformers.__version__} does not have: "
            "pip install --upgrade transformers"
        )
    network = _network(getattr(transformers, name), folder)
    given = {key: options.pop(key) for key in _OPTIONS if key in options}
    return chosen(network, _config(chosen, network, folder, given), **options)


def _folder(path: str | Path) -> Path:
    name = str(path)
    if not hub.is_hub_name(name):
        return Path(path).expanduser()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_FETCHED))
    except Exception as error:
        raise hub.not_fetched(name, error) from error


def _class_for(cls: type[TextPromptedTeacher], folder: Path) -> type[TextPromptedTeacher]:
    found = checkpoint.read_config(folder).get("model_type")
    known = {k: v for k, v in supported().items() if issubclass(v, cls)}
    if found in known:
        return known[found]
    everything = ", ".join(map(repr, known))
    if found in supported():
        raise ValueError(f"{folder} has model_type {found!r}, {cls.__name__} takes {everything}")
    if found is None:
        raise ValueError(
            f"{folder}: its {checkpoint.CONFIG_FILE} names no model_type, so it is no folder of transformers (there "
            f"are adapters for {everything}); a student or teacher of fastkd is loaded by RISModel.from_pretrained"
        )
    close = difflib.get_close_matches(str(found), known, n=1)
    raise ValueError(
        f"{folder} has model_type {found!r}, for which there is no adapter; there are {everything}."
        + (f" Did you mean a {close[0]!r} checkpoint?" if close else "")
        + " Any other nn.Module can teach through fastkd.Taps and Term selectors"
    )


def _network(model: Any, folder: Path) -> Any:
    """The network with every weight from the file and every weight of the file in it.

    transformers alone would fill gaps with random numbers, and leave out layers that the configuration lacks.
    """
    import torch

    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"no weights in {folder}: expected safetensors, as save_pretrained writes them")
    try:
        network, report = model.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # a damaged file or a bad configuration raises almost anything
        kind, text = type(error).__name__, (str(error).splitlines() or [""])[0]
        raise ValueError(f"{folder} can't be loaded by transformers ({kind}: {text})") from error
    gaps = [*report["missing_keys"], *report["mismatched_keys"]]
    # Older files hold the numbers of positions, 0, 1, 2, ..., which are no weights.
    left = [key for key in report["unexpected_keys"] if not str(key).endswith("position_ids")]
    for keys, what in ((gaps, "missing or misshapen"), (left, "without a place in it")):
        if keys:
            few = checkpoint.some(sorted(map(str, keys)))
            raise ValueError(
                f"{folder}: its weights do not fit {model.__name__} as its {checkpoint.CONFIG_FILE} describes it: "
                f"{len(keys)} {what} ({few})"
            )
    return network


def _config(cls: type[TextPromptedTeacher], network: Any, folder: Path, given: dict[str, Any]) -> TeacherConfig:
    images = _preprocessor(folder)
    size = given.get("image_size", _side(images.get("size")) or network.config.vision_config.image_size)
    mean = _triple(given.get("image_mean", images.get("image_mean", cls.default_mean)))
    std = _triple(given.get("image_std", images.get("image_std", cls.default_std)))
    limit = network.config.text_config.max_position_embeddings
    words = given.get("max_words", min(_WORDS, limit))
    tokenizer = given.get("tokenizer", str(folder) if has_tokenizer(folder) else None)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"image_size must be a whole number of at least 1, got {size!r}")
    for name, values in (("image_mean", mean), ("image_std", std)):
        numbers = len(values) == 3 and all(isinstance(value, int | float) for value in values)
        if not numbers or (name == "image_std" and min(values) <= 0):
            raise ValueError(f"{name} must be three numbers{' above 0' if name == 'image_std' else ''}, got {values!r}")
    if not isinstance(words, int) or not 3 <= words <= limit:
        raise ValueError(f"max_words must be from 3 to {limit}, the text encoder's places, got {words!r}")
    return TeacherConfig(network.config.model_type, size, tuple(mean), tuple(std), words, tokenizer)


def _preprocessor(folder: Path) -> dict[str, Any]:
    """What the files say about images: ``preprocessor_config.json``, or within ``processor_config.json``."""
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


def _triple(value: Any) -> tuple[Any, ...]:
    """Three of a number, which image processors take for one of each colour."""
    return tuple(value) if isinstance(value, list | tuple) else (value,) * 3


def _side(size: Any) -> int | None:
    if isinstance(size, dict):
        sides = [side for side in size.values() if isinstance(side, int)]
        return max(sides, default=None)
    return size if isinstance(size, int) else None
