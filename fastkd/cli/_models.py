"""Models named on the command line: presets, folders, hub names and checkpoints."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkd._messages import suggestion
from fastkd.cli._shipped import SHIPPED, teacher_path
from fastkd.errors import FastKDWarning

if TYPE_CHECKING:
    from fastkd.models import LAVT, OnnxModel, RISModel, TextPromptedTeacher

    LoadedModel = RISModel | LAVT | TextPromptedTeacher | OnnxModel


def build_model(
    name: str,
    seed: int,
    tokenizer: str | None = None,
    *,
    backbone_weights: str | None = None,
    text_weights: str | None = None,
) -> RISModel:
    """Return a new model from a preset's name or a config.json, or a saved one from its folder.

    A new model uses the padding id of ``tokenizer`` or, if None, of its configuration's tokenizer. Its weights
    are those of `RISModel`'s arguments, or "random".

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: an unknown preset, or weights for a folder that has its own, or that do not fit.
    """
    import torch

    from fastkd.data import load_tokenizer
    from fastkd.models import RISConfig, RISModel, list_presets, preset

    path = Path(name).expanduser()
    weights = {"backbone_weights": backbone_weights, "text_weights": text_weights}
    if path.is_dir():
        for option, source in weights.items():
            if source is not None:
                raise ValueError(
                    f"--{option.replace('_', '-')} {source}: {name} has its own weights; omit the option, or pass a "
                    "preset or a config.json to start from other weights"
                )
        return RISModel.from_pretrained(path)
    torch.manual_seed(seed)
    if path.suffix == ".json":
        if not path.is_file():
            raise FileNotFoundError(f"no model configuration at {path}")
        config = RISConfig.from_dict(_read_json(path))
        if config.tokenizer == ".":  # as save_pretrained writes it
            config.tokenizer = str(path.parent.absolute())
    elif name not in list_presets() and ("/" in name or "\\" in name):
        raise FileNotFoundError(
            f"no model folder at {path}; pass a folder, a .json or a preset ({', '.join(list_presets())})"
        )
    else:
        config = preset(name)
    source = tokenizer or config.tokenizer
    if source is not None:
        pad = load_tokenizer(source).pad_id
        if pad:
            config.text.setdefault("pad_token_id", pad)
    return RISModel(config, **{option: None if one == "random" else one for option, one in weights.items()})


def warn_of_random_weights(name: str, model: RISModel, backbone_weights: str | None, text_weights: str | None) -> None:
    """Warn once about a new model's towers that begin with random weights unless they were requested.

    Models of the procedural set are meant to learn from nothing; no weights were published for them.
    """
    from fastkd.models.presets import published_text_weights

    if Path(name).is_dir() or model.config.tokenizer == "shapes":
        return
    random, advice = [], []
    if backbone_weights is None:
        random.append("backbone")
        advice.append("--backbone-weights timm (downloads timm's) or FILE")
    if text_weights is None:
        random.append("text encoder")
        hub_name = published_text_weights(model.config)
        advice.append(f"--text-weights {f'{hub_name} (downloads them) or ' if hub_name else ''}FOLDER")
    if random:
        warnings.warn(
            f"{name}: {' and '.join(random)} start from random weights, which takes far more data and steps than "
            f"published ones: pass {' and '.join(advice)}, or the value random to accept it",
            FastKDWarning,
            stacklevel=2,
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object with RISConfig's fields, got {type(values).__name__}")
    return values


def load_model(name: str) -> LoadedModel:
    """Return a model in eval mode and frozen: from a folder, hub name, LAVT file or exported student, or a shipped one.

    Raises:
        FileNotFoundError: no such folder, file or shipped teacher.
    """
    from fastkd.models import LAVT, OnnxModel, RISModel, TextPromptedTeacher
    from fastkd.models.teachers.files import model_type_of

    path = teacher_path(name)
    model: LoadedModel
    if path.suffix == ".onnx":
        model = OnnxModel(path)
    elif path.is_file() or path.suffix in (".safetensors", ".pth"):
        model = LAVT.from_pretrained(path)
    elif model_type_of(path) is not None:  # a folder of transformers
        model = TextPromptedTeacher.from_pretrained(path)
    elif len(path.parts) == 1 and not path.exists():  # nor a hub name, OWNER/NAME
        raise FileNotFoundError(
            f"no model at {name}: pass a folder written by save_pretrained (a run's best/ is one), a file, or the name "
            f"of a shipped teacher.{suggestion(name, SHIPPED)}"
        )
    else:
        model = RISModel.from_pretrained(path)
    return model.eval().requires_grad_(False)


def load_local_model(name: str) -> LoadedModel:
    """Load a local or shipped model like `load_model`; a mistyped path is not looked up on the hub."""
    if not teacher_path(name).exists():
        raise FileNotFoundError(f"no model at {name}; pass a folder written by save_pretrained (a run's best/ is one)")
    return load_model(name)


def shapes_teacher() -> Path:
    """Return the folder of the shipped teacher for the demo's procedural set."""
    return SHIPPED["shapes"]
