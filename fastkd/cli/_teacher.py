"""Teachers named on the command line: a model that runs, or a cache of its output."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from fastkd.models import RISModel
    from fastkd.train import TeacherCache


def open_teacher(
    student: RISModel, words: str | None, name: str | None, tokenizer: str | None, cache: Path | None = None
) -> tuple[Any, dict[str, Any]]:
    """Return a teacher, or a cache in its place, with `ReferDataset`'s options for its own tokenizer.

    A student without a tokenizer gets the one of a teacher that reads the same word ids.

    Args:
        student: the student.
        words: the tokenizer on the command line, for both models.
        name: the teacher; None for none, or for that of the cache.
        tokenizer: the teacher's own tokenizer on the command line.
        cache: folder of a teacher cache.
    """
    from fastkd.cli._data import teacher_tokenizer_options
    from fastkd.cli._models import load_model

    teacher: nn.Module | None = None
    options: dict[str, Any] = {}
    shared: tuple[Any, Any] = (None, None)  # name, tokenizer
    if cache is not None:
        teacher, options = _open_cache(cache, name)
        shared = teacher.notes.get("tokenizer"), None
    elif name is not None:
        teacher = load_model(name)
        options = teacher_tokenizer_options(student, teacher, tokenizer)
        shared = teacher.config.tokenizer, getattr(teacher, "tokenizer", None)
    student.config.tokenizer = words or student.config.tokenizer
    if student.config.tokenizer is None and not options:
        student.config.tokenizer, student.tokenizer = shared
    return teacher, options


def describe(name: str, teacher: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return what a cache keeps of a teacher, so that it is not needed for training: `TeacherCache.build`'s notes."""
    notes: dict[str, Any] = {"teacher": _source(name), "tokenizer": teacher.config.tokenizer}
    if options:
        own = options["teacher_tokenizer"]
        notes["teacher_tokenizer"] = {
            "name": own.name,
            "files": own.to_json(),
            "keep_end": own.keep_end,
            "max_words": options["teacher_max_words"],
        }
    return notes


def _source(teacher: str) -> dict[str, str | None]:
    """Return a teacher's name on the command line, and a digest of its files if they are local."""
    from fastkd.cli._shipped import teacher_path

    path = teacher_path(teacher)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    if not path.exists():
        return {"name": teacher, "files": None}
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "blake2b").digest())
    return {"name": teacher, "files": digest.hexdigest()}


def _open_cache(folder: Path, teacher: str | None) -> tuple[TeacherCache, dict[str, Any]]:
    """Return a cache and `ReferDataset`'s options for its teacher's tokenizer, without loading the teacher.

    Raises:
        ValueError: the cache is of another teacher than ``teacher``, if that is not None.
    """
    from fastkd.cli._models import load_model
    from fastkd.data import Tokenizer
    from fastkd.train import TeacherCache

    cached = TeacherCache(folder)
    held = cached.notes.get("teacher")
    if teacher is not None and held is None:  # built in Python: the files of its teacher are unknown
        cached = TeacherCache(folder, load_model(teacher))
    elif teacher is not None and held is not None:
        named = _source(teacher)
        key = "files" if named["files"] and held.get("files") else "name"
        if named[key] != held.get(key):
            raise ValueError(
                f"--teacher-cache {folder} holds the output of another teacher, {held.get('name')!r}, than --teacher "
                f"{teacher!r}: omit --teacher, or build a cache of it with fastkd cache"
            )
    own = cached.notes.get("teacher_tokenizer")
    if not own:
        return cached, {}
    tokenizer = Tokenizer.from_json(own["files"], own["name"])
    tokenizer.keep_end = own["keep_end"]
    return cached, {"teacher_tokenizer": tokenizer, "teacher_max_words": own["max_words"]}
