"""What the training commands share: data sets and models from what was typed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastkd.data import ReferDataset
    from fastkd.models import LAVT, RISModel, TextPromptedTeacher


def build_model(what: str, seed: int, tokenizer: str | None = None) -> RISModel:
    """Return a new model from a preset's name or a config.json, or a saved one from its folder.

    A new one pads as its tokenizer does (the one given, or else its configuration's).
    """
    import torch

    from fastkd.data import load_tokenizer
    from fastkd.models import RISConfig, RISModel, list_presets, preset

    path = Path(what)
    if path.is_dir():
        return RISModel.from_pretrained(path)
    torch.manual_seed(seed)
    if path.suffix == ".json":
        if not path.is_file():
            raise FileNotFoundError(f"no model configuration at {path}")
        config = RISConfig.from_dict(_read_json(path))
        if config.tokenizer == ".":  # as in the folders that save_pretrained writes
            config.tokenizer = str(path.parent.absolute())
    elif what not in list_presets() and ("/" in what or "\\" in what):
        raise FileNotFoundError(
            f"no model folder at {path}; give a folder, a .json or a preset ({', '.join(list_presets())})"
        )
    else:
        config = preset(what)
    source = tokenizer or config.tokenizer
    if source is not None:
        pad = load_tokenizer(source).pad_id
        if pad:
            config.text.setdefault("pad_token_id", pad)
    return RISModel(config)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object with RISConfig's fields, got {type(values).__name__}")
    return values


def load_model(what: str) -> RISModel | LAVT | TextPromptedTeacher:
    """A teacher with weights, in eval mode and frozen: its folder or hub name, a LAVT's file, or "shapes"."""
    from fastkd.models import LAVT, RISModel, TextPromptedTeacher
    from fastkd.models.teachers.files import model_type_of

    path = shapes_teacher() if what == "shapes" else Path(what).expanduser()
    teacher: RISModel | LAVT | TextPromptedTeacher
    if path.is_file() or path.suffix in (".safetensors", ".pth"):
        teacher = LAVT.from_pretrained(path)
    elif model_type_of(path) is not None:  # a folder of transformers
        teacher = TextPromptedTeacher.from_pretrained(path)
    else:
        teacher = RISModel.from_pretrained(path)
    return teacher.eval().requires_grad_(False)


def load_local(what: str) -> RISModel | LAVT | TextPromptedTeacher:
    """As :func:`load_model`, but from this machine alone: a folder mistyped is never looked up as a hub's name."""
    if what != "shapes" and not Path(what).expanduser().exists():
        raise FileNotFoundError(f"no model at {what}; give a folder written by save_pretrained (a run's best/ is one)")
    return load_model(what)


def teacher_words(
    student: RISModel, teacher: RISModel | LAVT | TextPromptedTeacher, tokenizer: str | None
) -> dict[str, Any]:
    """`ReferDataset`'s arguments for a teacher with a tokenizer of its own; none where it reads the student's words.

    A teacher whose word ids are not the student's is refused unless its tokenizer is known: it would read another
    sentence.
    """
    from fastkd.data import load_tokenizer
    from fastkd.models import RISModel, TextPromptedTeacher

    config = teacher.config
    if isinstance(teacher, TextPromptedTeacher):
        tokenizer = tokenizer or config.tokenizer
        if tokenizer is None:
            raise ValueError(
                f"the teacher's folder holds no tokenizer, and a {type(teacher).__name__} reads token ids of its own: "
                "save its tokenizer there too, or pass --teacher-tokenizer with that tokenizer's folder"
            )
    else:
        theirs = teacher.text_encoder.vocab_size if isinstance(teacher, RISModel) else teacher.vocab_size
        ours = student.text_encoder.vocab_size
        if tokenizer is None and theirs is not None and theirs != ours:
            raise ValueError(
                f"the student's vocabulary has {ours} words, the teacher's {theirs}: they read the same word ids, so "
                "they need one tokenizer; choose a student with the teacher's, or pass --teacher-tokenizer: terms may "
                "then not compare them word by word"
            )
        if tokenizer is None:
            return {}
    read = load_tokenizer(tokenizer, keep_end=getattr(config, "keep_end", False))
    if isinstance(teacher, TextPromptedTeacher) and read.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer!r} has {read.vocab_size} entries, the teacher reads ids of {teacher.vocab_size}: "
            "it is not its own; pass --teacher-tokenizer with the one that its weights came with"
        )
    return {"teacher_tokenizer": read, "teacher_max_words": config.max_words}


def check_folder(option: str, folder: Path) -> None:
    """Refuse an output folder that can't be made or written into, before any work is done for it."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{option}: {there} is a file, so {folder} can't be a folder to write into")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"{option}: {there} can't be written into")


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
    teacher: dict[str, Any] | None = None,
    **where: Any,
) -> ReferDataset:
    """Return one split, at the size and normalisation that the model was made for, with its tokenizer or the one given.

    ``teacher`` is what `teacher_words` returns.
    """
    from fastkd.data import RefCOCO, ReferDataset, load_tokenizer
    from fastkd.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
    from fastkd.distill.forward import normalisation
    from fastkd.evaluate import tokenizer_of
    from fastkd.models.inputs import check_vocabulary, word_limit

    config = model.config
    if tokenizer is None:
        words = tokenizer_of(model)
    else:
        words = load_tokenizer(tokenizer, keep_end=getattr(config, "keep_end", False))
    check_vocabulary(model, words)
    image_mean, image_std = normalisation(model) or (IMAGENET_MEAN, IMAGENET_STD)
    small = config.image_size <= 128  # decoded images of a small set fit in memory
    return ReferDataset(
        RefCOCO(root, split=split, **where),
        words,
        image_size=config.image_size,
        max_words=word_limit(model),
        sentences=sentences,
        seed=seed,
        cache=small,
        image_mean=image_mean,
        image_std=image_std,
        **(teacher or {}),
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
