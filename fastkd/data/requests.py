"""Records to predict: images of a folder, or rows of a JSONL or parquet file, with sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastkd.data._confine import check_inside, check_name
from fastkd.data._files import read_bytes, read_json
from fastkd.data._parquet import ParquetTable, Stored
from fastkd.data._values import brief, is_int, sentence_fault
from fastkd.data.images import extensions


@dataclass(frozen=True)
class Request:
    """One sentence on one image.

    Attributes:
        name: the image's file name below its folder, with "/" between folders; of one stored in a parquet file, the
            names of file and row.
        source: the image file, or a function that reads the encoded image.
        sentence: the referring expression.
        id: the record's own id, or None.
    """

    name: str
    source: Path | Callable[[], bytes]
    sentence: str
    id: int | str | None = None

    def image(self) -> Path | bytes:
        """Return the image file or its content.

        Raises:
            ValueError: a parquet file holds no image here.
        """
        return self.source if isinstance(self.source, Path) else self.source()


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


def requests_of_folder(folder: Path, sentences: Sequence[str], skip: Path | None = None) -> Iterator[Request | Failed]:
    """Yield every sentence for every image file in a folder and its subfolders, in the order of their names.

    Image files are recognised by their suffix; hidden files and folders, and those in ``skip``, are skipped.

    Raises:
        ValueError: no sentence, an unusable one, or no image.
    """
    if not sentences:
        raise ValueError(f"{folder} is a folder: pass at least one sentence for its images, or a JSONL file with both")
    for sentence in sentences:
        if fault := sentence_fault(sentence):
            raise ValueError(f"the sentence {fault}: pass a referring expression such as 'the left red cup'")
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in extensions()]
    if skip is not None:
        paths = [path for path in paths if skip.resolve() not in path.resolve().parents]
    names = [path.relative_to(folder) for path in paths]
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    if not names:
        raise ValueError(f"{folder} has no image file ({', '.join(sorted(extensions())[:6])}, ...)")
    for name in names:
        for sentence in sentences:
            yield _confined(name.as_posix(), folder, str(folder / name), sentence, None)


def requests_of_file(path: Path, image_root: Path | None = None) -> Iterator[Request | Failed]:
    """Yield the records of a JSONL file, ``{"image": "a.jpg", "sentence": "the red cup"}`` per line, or parquet file.

    ``sentence`` may be a list, ``id`` (an integer or string) is optional and other fields are ignored, so that a split
    of a `ReferFolder` can be read. In parquet, ``image`` may be the encoded image itself. An unusable row yields a
    `Failed` instead of raising.

    Args:
        path: the file, ``.jsonl`` or ``.parquet``.
        image_root: folder of the image files; default: that of ``path``. Names must not lead out of it.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it has no row, or is not a parquet file with these columns.
        ImportError: pyarrow is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}: expected JSONL or parquet with the fields image and sentence")
    folder = path.parent if image_root is None else image_root
    table = ParquetTable(path, ("image", "sentence"), ("image", "sentence", "id")) if is_parquet(path) else None
    rows = list(_lines(path) if table is None else table.contents())
    if not rows:
        raise ValueError(f'{path} is empty: expected rows like {{"image": "a.jpg", "sentence": "the red cup"}}')
    for number, (content, where) in enumerate(rows):
        try:
            found = read_json(content, where) if isinstance(content, bytes) else content
            image, sentences, key = _fields(found, where)
        except ValueError as error:
            yield Failed(where, str(error).removeprefix(f"{where} ").removeprefix(f"{where}: "))
            continue
        for sentence in sentences:
            if fault := sentence_fault(sentence):
                yield Failed(where, f"its sentence {fault}", brief(sentence), key)
            elif isinstance(image, str):
                yield _confined(image, folder, where, sentence, key)
            else:
                assert table is not None
                yield Request(f"{path.name}/{number}", partial(table.stored, number, "image"), sentence, key)


def is_parquet(path: Path) -> bool:
    """Return whether a file's name says that it is a parquet file."""
    return path.suffix.lower() == ".parquet"


def _lines(path: Path) -> Iterator[tuple[bytes, str]]:
    """Yield the lines of a JSONL file and where they are."""
    for number, line in enumerate(read_bytes(path).split(b"\n"), start=1):
        if line.strip():
            yield line, f"{path}, line {number}"


def _fields(content: Any, where: str) -> tuple[str | Stored, list[str], int | str | None]:
    if not isinstance(content, dict) or not {"image", "sentence"} <= set(content):
        raise ValueError(f"{where} must be an object with image and sentence, got {brief(content)}")
    texts, key = content["sentence"], content.get("id")
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: sentence must be a string or a list of strings, got {brief(content['sentence'])}")
    if not (key is None or is_int(key) or (isinstance(key, str) and 0 < len(key) <= 200)):
        raise ValueError(f"{where}: id must be an integer or a short string, got {brief(key)}")
    image = content["image"]
    return image if isinstance(image, Stored) else check_name(image, where), texts, key


def _confined(name: str, folder: Path, where: str, sentence: str, key: int | str | None) -> Request | Failed:
    try:
        check_inside(folder / name, folder)
    except ValueError as error:
        return Failed(where, str(error), sentence, key)
    return Request(name, folder / name, sentence, key)
