"""What the training commands share: data sets and models from what was typed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastkd.data import ReferDataset
    from fastkd.models import LAVT, RISModel


def build_model(what: str, seed: int) -> RISModel:
    """A new model from a preset's name or a config.json, or a saved one from its folder."""
    import torch

    from fastkd.models import RISConfig, RISModel, list_presets, preset

    path = Path(what)
    if path.is_dir():
        return RISModel.from_pretrained(path)
    torch.manual_seed(seed)
    if path.suffix == ".json":
        if not path.is_file():
            raise FileNotFoundError(f"no model configuration at {path}")
        return RISModel(RISConfig.from_dict(_read_json(path)))
    if what not in list_presets() and ("/" in what or "\\" in what):
        raise FileNotFoundError(
            f"no model folder at {path}; give a folder, a .json or a preset ({', '.join(list_presets())})"
        )
    return RISModel(preset(what))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object with RISConfig's fields, got {type(values).__name__}")
    return values


def load_teacher(what: str) -> RISModel | LAVT:
    """A teacher with weights, in eval mode and frozen: its folder, a LAVT's file, or "shapes" for the shipped one."""
    from fastkd.models import LAVT, RISModel

    path = shapes_teacher() if what == "shapes" else Path(what).expanduser()
    is_file = path.is_file() or path.suffix in (".safetensors", ".pth")
    teacher = LAVT.from_pretrained(path) if is_file else RISModel.from_pretrained(path)
    return teacher.eval().requires_grad_(False)


def check_vocabularies(student: RISModel, teacher: RISModel | LAVT) -> None:
    """Refuse a teacher whose word ids are not the student's: it would read another sentence."""
    from fastkd.models import LAVT

    theirs = teacher.vocab_size if isinstance(teacher, LAVT) else teacher.text_encoder.vocab_size
    ours = student.text_encoder.vocab_size
    if theirs is not None and theirs != ours:
        raise ValueError(
            f"the student's vocabulary has {ours} words, the teacher's {theirs}: they read the same word ids, so they "
            "need one tokenizer; choose a student with the teacher's"
        )


def shapes_teacher() -> Path:
    """Folder of the shipped teacher for the procedural set."""
    return Path(__file__).resolve().parent.parent / "models" / "assets" / "shapes-teacher"


def open_split(
    root: Path,
    split: str,
    model: Any,
    *,
    sentences: str,
    seed: int = 0,
    tokenizer: str | None = None,
    **where: Any,
) -> ReferDataset:
    """One split, at the size that the model was made for, and with its tokenizer or the one given."""
    from fastkd.data import RefCOCO, ReferDataset, load_tokenizer

    config = model.config
    source = tokenizer or config.tokenizer
    if source is None:
        raise ValueError(
            "the model's configuration names no tokenizer, and word ids mean nothing without one: pass --tokenizer "
            "with the path of its vocab.txt"
        )
    small = config.image_size <= 128  # decoded images of a small set fit in memory
    return ReferDataset(
        RefCOCO(root, split=split, **where),
        load_tokenizer(source),
        image_size=config.image_size,
        max_words=config.max_words,
        sentences=sentences,
        seed=seed,
        cache=small,
    )


def parse_terms(terms: Sequence[str]) -> dict[str, float]:
    """``["first_order=0.5", "logit=0.2"]`` → name to share."""
    shares: dict[str, float] = {}
    for term in terms:
        name, equals, share = term.partition("=")
        try:
            if not equals or name in shares:
                raise ValueError
            shares[name] = float(share)
        except ValueError:
            raise ValueError(f"terms: expected each term once, as name=share (first_order=0.5), got {term!r}") from None
    return shares
