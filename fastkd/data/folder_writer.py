"""Write a split as a JSONL or parquet file that `ReferFolder` reads."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from fastkd._atomic import replace_files
from fastkd.data._confine import check_name
from fastkd.data.referring_set import ReferringSet
from fastkd.data.shards import import_reader

_ROWS = 16  # per row group of a parquet file: what a random access decodes


def write_folder(
    data: ReferringSet,
    folder: str | os.PathLike[str],
    *,
    format: str = "jsonl",
    copy_images: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write ``SPLIT.jsonl`` or ``SPLIT.parquet``; ids, sentences and masks stay as they are.

    Args:
        data: The split to write.
        folder: Where to write; created if missing.
        format: "jsonl": masks are RLEs, images are named; pass their folder to `ReferFolder` as ``image_root``.
            "parquet": images are stored as they are, with their names, masks as PNG.
        copy_images: With "jsonl", copy the image files below ``folder``, which is then complete.
        overwrite: Replace an existing file.

    Returns:
        The path of the file.

    Raises:
        FileExistsError: The file exists.
        ValueError: An image or mask of ``data`` is damaged, or the format is unknown.
        ImportError: Parquet needs ``pip install 'fastkd[stream]'``.

    Example::

        write_folder(RefCOCO("data", "refcoco", "unc", "val"), "data/refcoco-jsonl")
    """
    if format not in ("jsonl", "parquet"):
        raise ValueError(f"format must be 'jsonl' or 'parquet', got {format!r}")
    if copy_images and format == "parquet":
        raise ValueError("copy_images=True is for format='jsonl': a parquet file holds its images")
    path = Path(folder) / f"{check_name(data.split, 'the split')}.{format}"
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another folder, or pass overwrite=True (--overwrite)")
    with replace_files(path) as (partial,):
        if format == "parquet":
            _write_parquet(partial, data)
        else:
            with partial.open("w", encoding="utf-8") as file:
                for ref_id, row in _rows(data):
                    row |= {"image": data.image_name(data.ref(ref_id).image_id), "mask": _rle(row["mask"])}
                    file.write(json.dumps(row) + "\n")
    if copy_images:
        for image_id in {ref.image_id: None for ref in data}:
            target = Path(folder) / check_name(data.image_name(image_id), str(path))
            if overwrite or not target.exists():
                with replace_files(target) as (partial,):
                    partial.write_bytes(data.image_bytes(image_id))
    return path


def _rows(data: ReferringSet) -> Iterator[tuple[int | str, dict[str, Any]]]:
    """Yield the id and row of every ref; its mask is an array, or None without a target."""
    for ref in data:
        yield (
            ref.ref_id,
            {
                "image": None,
                "mask": data.mask(ref.ref_id) if ref.targets else None,
                "sentence": [sentence.text for sentence in ref.sentences],
                "id": ref.ref_id,
                "sent_id": [sentence.sent_id for sentence in ref.sentences],
            },
        )


def _rle(mask: np.ndarray | None) -> dict[str, Any] | None:
    if mask is None:
        return None
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def _write_parquet(path: Path, data: ReferringSet) -> None:
    pyarrow = import_reader("pyarrow")
    number = pyarrow.string() if any(isinstance(ref.ref_id, str) for ref in data) else pyarrow.int64()
    fields = {
        "image": pyarrow.binary(),
        "mask": pyarrow.binary(),
        "sentence": pyarrow.list_(pyarrow.string()),
        "id": number,
        "sent_id": pyarrow.list_(pyarrow.int64()),
        "image_name": pyarrow.string(),
    }
    schema = pyarrow.schema(list(fields.items()))
    with import_reader("pyarrow.parquet").ParquetWriter(path, schema, compression="none") as file:
        rows: list[dict[str, Any]] = []
        for ref_id, row in _rows(data):
            image = data.ref(ref_id).image_id
            row |= {"image": data.image_bytes(image), "image_name": data.image_name(image), "mask": _png(row["mask"])}
            rows.append(row | {"id": ref_id if number == pyarrow.int64() else str(ref_id)})
            if len(rows) == _ROWS:
                file.write_table(pyarrow.Table.from_pylist(rows, schema))
                rows = []
        if rows:
            file.write_table(pyarrow.Table.from_pylist(rows, schema))


def _png(mask: np.ndarray | None) -> bytes | None:
    if mask is None:
        return None
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(buffer, "PNG")
    return buffer.getvalue()
