"""Records to predict: images of a folder or lines of a JSONL file, with sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd.data._confine import check_inside, check_name
from fastkd.data._files import read_bytes, read_json
from fastkd.data._values import brief, is_int, sentence_fault
from fastkd.data.images import extensions


@dataclass(frozen=True)
class Request:
    """One sentence on one image.

    Attributes:
        name: the image's file name below its folder, with "/" between folders.
        path: the image file.
        sentence: the referring expression.
        id: the record's own id, or None.
    """

    name: str
    path: Path
    sentence: str
    id: int | str | None = None


@dataclass(frozen=True)
class Failed:
    """A record that gives no prediction.

    Attributes:
        where: the file, or file and line, for messages.
        error: the reason.
        sentence: the referring expression, if one is known.
        id: the record's own id, or None.
    """

    where: str
    error: str
    sentence: str | None = None
    id: int | str | None = None


def requests_of_folder(folder: Path, sentences: Sequence[str]) -> Iterator[Request | Failed]:
    """Yield every sentence for every image file in a folder and its subfolders, in the order of their names.

    Image files are recognised by their suffix; hidden files and folders are skipped.

    Raises:
        ValueError: no sentence, an unusable one, or no image.
    """
    if not sentences:
        raise ValueError(f"{folder} is a folder: pass at least one sentence for its images, or a JSONL file with both")
    for sentence in sentences:
        if fault := sentence_fault(sentence):
            raise ValueError(f"the sentence {fault}: pass a referring expression such as 'the left red cup'")
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.suffix.lower() in extensions()]
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    if not names:
        raise ValueError(f"{folder} has no image file ({', '.join(sorted(extensions())[:6])}, ...)")
    for name in names:
        for sentence in sentences:
            yield _confined(name.as_posix(), folder, str(folder / name), sentence, None)


def requests_of_file(path: Path, image_root: Path | None = None) -> Iterator[Request | Failed]:
    """Yield the records of a JSONL file, ``{"image": "a.jpg", "sentence": "the red cup"}`` per line.

    ``sentence`` may be a list, ``id`` (an integer or string) is optional and other fields are ignored, so that a split
    of a `ReferFolder` can be read. An unusable line yields a `Failed` instead of raising.

    Args:
        path: the file.
        image_root: folder of the image files; default: that of ``path``. Names must not lead out of it.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it has no line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}: expected JSONL with the fields image and sentence")
    folder = path.parent if image_root is None else image_root
    lines = [(n, line) for n, line in enumerate(read_bytes(path).split(b"\n"), start=1) if line.strip()]
    if not lines:
        raise ValueError(f'{path} is empty: expected lines like {{"image": "a.jpg", "sentence": "the red cup"}}')
    for number, line in lines:
        where = f"{path}, line {number}"
        try:
            name, sentences, key = _fields(read_json(line, where), where)
        except ValueError as error:
            yield Failed(where, str(error).removeprefix(f"{where} ").removeprefix(f"{where}: "))
            continue
        for sentence in sentences:
            if fault := sentence_fault(sentence):
                yield Failed(where, f"its sentence {fault}", brief(sentence), key)
            else:
                yield _confined(name, folder, where, sentence, key)


def _fields(content: Any, where: str) -> tuple[str, list[str], int | str | None]:
    if not isinstance(content, dict) or not {"image", "sentence"} <= set(content):
        raise ValueError(f"{where} must be an object with image and sentence, got {brief(content)}")
    texts, key = content["sentence"], content.get("id")
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: sentence must be a string or a list of strings, got {brief(content['sentence'])}")
    if not (key is None or is_int(key) or (isinstance(key, str) and 0 < len(key) <= 200)):
        raise ValueError(f"{where}: id must be an integer or a short string, got {brief(key)}")
    return check_name(content["image"], where), texts, key


def _confined(name: str, folder: Path, where: str, sentence: str, key: int | str | None) -> Request | Failed:
    try:
        check_inside(folder / name, folder)
    except ValueError as error:
        return Failed(where, str(error), sentence, key)
    return Request(name, folder / name, sentence, key)
