"""Shards of samples: WebDataset tar files or parquet files, and the number of samples in each.

A sample has the fields ``image`` and ``mask`` (encoded images), ``sentence`` (one or several) and ``id``. In a tar they
are the files ``ID.jpg`` (or png, webp), ``ID.mask.png`` and ``ID.txt`` with a sentence per line; in parquet the columns
``image``, ``mask``, ``sentence`` and ``id``.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastkd._atomic import replace_folder
from fastkd.data._confine import check_name
from fastkd.data._values import brief, is_int, sentence_fault
from fastkd.data.images import open_image
from fastkd.data.referring_set import ReferringSet

INDEX = "index.json"
TAR, PARQUET = ".tar", ".parquet"
_TAR_FIELDS = {
    "image": ("jpg", "jpeg", "png", "webp"),
    "mask": ("mask.png", "mask"),
    "sentence": ("txt", "sentence", "sentences.txt"),
    "id": ("__key__",),
}
_URL = re.compile(r"(https?|s3|gs|hf)://[\w./:@%+=&?~#,-]+")
_PARQUET_FIELDS = {name: (name,) for name in _TAR_FIELDS}


@dataclass(frozen=True)
class Shard:
    """A file of samples.

    Attributes:
        path: path or, for a tar, URL that webdataset opens.
        samples: number of samples in it.
    """

    path: str
    samples: int


def find_shards(source: str | os.PathLike[str]) -> list[Shard]:
    """Return the shards of a folder, in the order of their names, or those that an index lists.

    Args:
        source: a folder of .tar or .parquet files, or an ``index.json`` of `write_shards`. Without an index in the
            folder, the samples of every file are counted, which reads all headers.

    Raises:
        FileNotFoundError: there is no such folder, index or shard.
        ValueError: the index is damaged, or there are no samples.
    """
    path = Path(source)
    index = path / INDEX if path.is_dir() else path
    if index.name.endswith(".json") and index.is_file():
        shards = _read_index(index)
    elif path.is_dir():
        files = sorted(file for file in path.absolute().iterdir() if file.suffix in (TAR, PARQUET))
        shards = [Shard(str(file), _count(file)) for file in files]
    else:
        raise FileNotFoundError(f"no folder of shards and no {INDEX} at {path}")
    if not sum(shard.samples for shard in shards):
        raise ValueError(f"{path} holds no samples: expected {TAR} files of WebDataset or {PARQUET} files")
    missing = [shard.path for shard in shards if not is_url(shard.path) and not Path(shard.path).is_file()]
    if missing:
        raise FileNotFoundError(f"{index} lists {missing[0]}, which does not exist: copy the folder again")
    return [shard for shard in shards if shard.samples]


def read_shard(shard: Shard, fields: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard in order: ``image`` and ``mask`` as bytes, ``sentence`` a list, ``id`` a string.

    Args:
        shard: the shard.
        fields: field to file extension (tar) or column (parquet), where they differ from the usual ones.

    Raises:
        ValueError: a sample lacks a field, or the shard has another number of samples than stated.
        ImportError: the reader is not installed.
    """
    is_parquet = shard.path.endswith(PARQUET)
    names = {**(_PARQUET_FIELDS if is_parquet else _TAR_FIELDS), **{k: (v,) for k, v in (fields or {}).items()}}
    count = 0
    for raw in _parquet_rows(shard) if is_parquet else _tar_samples(shard):
        yield _fields(raw, names, f"{shard.path}, sample {count}")
        count += 1
    if count != shard.samples:
        raise ValueError(
            f"{shard.path} holds {count} samples, but {shard.samples} were counted or are stated in {INDEX}: copy the "
            "shard again, or write the index again"
        )


def write_shards(
    samples: ReferringSet | Iterable[Mapping[str, Any]],
    folder: str | os.PathLike[str],
    *,
    samples_per_shard: int = 1000,
    format: str = "tar",
    overwrite: bool = False,
) -> list[Shard]:
    """Write samples to shards that `ShardDataset` reads, with an index; the folder appears once it is complete.

    Args:
        samples: a `RefCOCO` split or another `ReferringSet`, one sample per ref; or
            mappings with ``image`` (encoded bytes, or (H, W, 3) uint8),
            ``mask`` (H, W) bool, ``sentence`` (a string, or several) and ``id`` (a string without "." and "/").
        folder: the folder to write.
        samples_per_shard: samples per file. A pass over the data needs at least as many files as loading processes of
            all ranks; a resumed run reads at most the shuffle buffer's files again.
        format: "tar" (WebDataset) or "parquet".
        overwrite: replace an existing folder.

    Returns:
        The shards.

    Raises:
        FileExistsError: the folder exists and is not empty.
        ValueError: an invalid argument, sample or id, or no samples.
        ImportError: parquet needs ``pip install 'fastkd[stream]'``.

    Example:
        >>> write_shards(RefCOCO("data/refer", split="train"), "shards/train")
    """
    if format not in ("tar", "parquet"):
        raise ValueError(f"format must be 'tar' or 'parquet', got {format!r}")
    if not isinstance(samples_per_shard, int) or samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be an integer >= 1, got {samples_per_shard!r}")
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())) and not overwrite:
        raise FileExistsError(f"{path} exists and is not empty; choose another folder or pass overwrite=True")
    write = _write_tar if format == "tar" else _write_parquet
    shards: list[Shard] = []
    with replace_folder(path) as partial:
        for content in _chunks(_encoded(samples), samples_per_shard):
            name = f"shard-{len(shards):05d}.{format}"
            write(partial / name, content)
            shards.append(Shard(name, len(content)))
        if not shards:
            raise ValueError("write_shards got no samples")
        index = {"format": 1, "shards": [{"path": shard.path, "samples": shard.samples} for shard in shards]}
        (partial / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return [Shard(str(path.absolute() / shard.path), shard.samples) for shard in shards]


def is_url(path: str) -> bool:
    """Return whether a shard's path is a URL.

    Raises:
        ValueError: it is one that webdataset might pass to a shell: an index may come from elsewhere.
    """
    if "://" not in path and not path.startswith("pipe:"):
        return False
    if not _URL.fullmatch(path):
        raise ValueError(
            f"{path!r} is not a URL that shards are read from: expected http, https, s3, gs or hf and no "
            "quotes, spaces or other characters that a shell interprets; commands (pipe:) are not run"
        )
    return True


def _read_index(index: Path) -> list[Shard]:
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))["shards"]
        shards = [Shard(str(entry["path"]), entry["samples"]) for entry in entries]
        for shard in shards:
            if not is_int(shard.samples) or shard.samples < 0:
                raise ValueError(f"samples of {shard.path!r} must be an integer >= 0, got {brief(shard.samples)}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f'{index} is not an index of shards ({error!r}): expected {{"shards": [{{"path": …, "samples": …}}]}}'
        ) from error
    for shard in shards:
        if not is_url(shard.path):
            check_name(shard.path, str(index))
    folder = index.parent.absolute()
    return [Shard(s.path if is_url(s.path) else str(folder / s.path), s.samples) for s in shards]


def _count(file: Path) -> int:
    """Return the number of samples in a local file, from its headers."""
    if file.suffix == PARQUET:
        return int(import_reader("pyarrow.parquet").ParquetFile(file).metadata.num_rows)
    split = import_reader("webdataset.tariterators").base_plus_ext
    keys: list[str] = []
    try:
        with tarfile.open(file) as archive:
            for member in archive:
                key = split(member.name)[0] if member.isreg() and not member.name.startswith("__") else None
                if key is not None and (not keys or keys[-1] != key):
                    keys.append(key)
    except tarfile.TarError as error:
        raise ValueError(f"{file} can't be read as a tar file ({error}): copy the shard again") from error
    return len(keys)


def import_reader(name: str) -> Any:
    """Import a package of the extra ``[stream]``."""
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"reading or writing these shards needs the package {error.name!r}: pip install 'fastkd[stream]'"
        ) from error


def _tar_samples(shard: Shard) -> Iterator[dict[str, Any]]:
    dataset = import_reader("webdataset").WebDataset(
        [shard.path], shardshuffle=False, nodesplitter=None, workersplitter=None, empty_check=False
    )
    yield from dataset


def _parquet_rows(shard: Shard) -> Iterator[dict[str, Any]]:
    if is_url(shard.path):
        raise ValueError(f"{shard.path}: parquet shards are read from local files; copy them, or use tar shards")
    for batch in import_reader("pyarrow.parquet").ParquetFile(shard.path).iter_batches(batch_size=16):
        yield from batch.to_pylist()


def _fields(raw: Mapping[str, Any], names: Mapping[str, tuple[str, ...]], where: str) -> dict[str, Any]:
    sample: dict[str, Any] = {}
    for field, candidates in names.items():
        name = next((name for name in candidates if raw.get(name) is not None), None)
        if name is None:
            if field == "id":
                sample[field] = where
                continue
            present = ", ".join(repr(key) for key in raw if not key.startswith("__"))
            raise ValueError(
                f"{where} has no {field} (looked for {' or '.join(map(repr, candidates))}; it has {present}): pass "
                f"fields={{{field!r}: ...}}"
            )
        sample[field] = raw[name]
    for field in ("image", "mask"):
        if isinstance(sample[field], Mapping):  # an image column of the library datasets
            sample[field] = sample[field].get("bytes")
        if not isinstance(sample[field], bytes):
            raise ValueError(f"{where}: {field} must be an encoded image, got {type(sample[field]).__name__}")
    text = sample["sentence"]
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape").splitlines()  # reported below if it is not utf-8
    lines = [text] if isinstance(text, str) else text
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"{where}: sentence must be a string or a list of strings, got {brief(text)}")
    sample["sentence"] = [line.strip() for line in lines if line.strip()]
    if not sample["sentence"]:
        raise ValueError(f"{where} has an empty sentence: remove the sample")
    for line in sample["sentence"]:
        if fault := sentence_fault(line):
            raise ValueError(f"{where}: its sentence {fault}: remove the sample")
    sample["id"] = str(sample["id"])
    return sample


def _encoded(samples: ReferringSet | Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield samples with images as bytes, sentences as a list, and ids that are unique."""
    known: set[str] = set()
    for sample in _refs(samples) if isinstance(samples, ReferringSet) else samples:
        name = str(sample["id"])
        if not name or name in known or any(mark in name for mark in "./\\") or name.startswith("__"):
            raise ValueError(
                f"id {name!r} occurs twice, is empty, holds '.', '/' or '\\\\', or begins with '__': a tar names files "
                "after ids; choose others"
            )
        known.add(name)
        sentences = sample["sentence"]
        sentences = [sentences] if isinstance(sentences, str) else list(sentences)
        if not sentences or any(not text.strip() or "\n" in text for text in sentences):
            raise ValueError(f"sample {name!r}: sentence must be one or more lines of text, got {sentences!r}")
        mask = np.asarray(sample["mask"])
        if mask.ndim != 2 or mask.dtype != bool:
            raise ValueError(f"sample {name!r}: mask must be (H, W) bool, got {mask.dtype} {mask.shape}")
        image = sample["image"] if isinstance(sample["image"], bytes) else _png(np.asarray(sample["image"]))
        yield {"id": name, "image": image, "mask": _png(mask.astype(np.uint8) * 255), "sentence": sentences}


def _refs(refcoco: ReferringSet) -> Iterator[dict[str, Any]]:
    for ref in refcoco:
        yield {
            "id": str(ref.ref_id),
            "image": refcoco.image_bytes(ref.image_id),
            "mask": refcoco.mask(ref.ref_id),
            "sentence": [sentence.text for sentence in ref.sentences],
        }


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _chunks(samples: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    for sample in samples:
        chunk.append(sample)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _write_tar(path: Path, samples: list[dict[str, Any]]) -> None:
    with tarfile.open(path, "w") as archive:
        for sample in samples:
            try:
                with open_image(sample["image"]) as image:
                    extension = {"JPEG": "jpg", "WEBP": "webp"}.get(image.format or "", "png")
            except Exception as error:  # Pillow raises many types for damaged files
                raise ValueError(f"sample {sample['id']!r}: its image cannot be read ({error})") from error
            text = "".join(line + "\n" for line in sample["sentence"]).encode()
            for name, content in ((extension, sample["image"]), ("mask.png", sample["mask"]), ("txt", text)):
                member = tarfile.TarInfo(f"{sample['id']}.{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def _write_parquet(path: Path, samples: list[dict[str, Any]]) -> None:
    table = import_reader("pyarrow").Table.from_pylist(samples)
    import_reader("pyarrow.parquet").write_table(table, path, row_group_size=64)
