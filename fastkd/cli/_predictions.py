"""Predict many records; write masks as COCO annotations, and overlays."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastkd._atomic import replace_files
from fastkd.data.requests import Failed, Request

if TYPE_CHECKING:
    from torch import nn

    from fastkd.data import Tokenizer
    from fastkd.evaluate import Prediction

_NAME = 160  # bytes of an image's name in that of its overlay


class Written(NamedTuple):
    """Numbers of predictions and of failed records, and the first failures."""

    predictions: int
    failed: int
    examples: list[str]


def write_predictions(
    model: nn.Module,
    tokenizer: Tokenizer,
    records: Iterable[Request | Failed],
    out: Path,
    *,
    batch_size: int,
    overlays: bool,
) -> Written:
    """Write ``predictions.json``, a COCO dataset whose annotations are the predicted masks, and overlays.

    Raises:
        ValueError: no record gives a prediction; nothing is written then.
    """
    images: dict[str, dict[str, Any]] = {}
    annotations: list[dict[str, Any]] = []
    errors: list[dict[str, Any]] = []
    for record, found in _predicted(model, tokenizer, records, batch_size):
        if isinstance(found, Exception | None):
            errors.append(_error(record, found))
            continue
        assert isinstance(record, Request)
        height, width = found.mask.shape
        image = images.setdefault(
            record.name, {"id": len(images) + 1, "file_name": record.name, "height": height, "width": width}
        )
        number = len(annotations) + 1
        annotation = {"id": number, "image_id": image["id"], "category_id": 1, "iscrowd": 0, **_coco(found.mask)}
        annotation |= {"score": round(found.score, 6), "sentence": record.sentence}
        if record.id is not None:
            annotation["record"] = record.id
        if overlays:
            annotation["overlay"] = f"overlays/{number:06d}-{_shortened(Path(record.name).stem)}.png"
            _write_overlay(found, out / annotation["overlay"])
        annotations.append(annotation)
    shown = [f"{error['where']}: {error['error']}" for error in errors[:5]]
    if not annotations:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise ValueError(f"none of {len(errors)} records could be predicted: {shown[0]}{more}")
    content = {
        "images": list(images.values()),
        "annotations": annotations,
        "categories": [{"id": 1, "name": "referred object"}],
        "errors": errors,
    }
    with replace_files(out / "predictions.json") as (partial,):
        partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
    return Written(len(annotations), len(errors), shown)


def _predicted(
    model: nn.Module, tokenizer: Tokenizer, records: Iterable[Request | Failed], batch_size: int
) -> Iterator[tuple[Request | Failed, Prediction | Exception | None]]:
    """Yield each record with its prediction or error, in order; None for one that had failed already."""
    from fastkd.evaluate import predict_batches

    waiting: deque[Request | Failed] = deque()

    def pairs() -> Iterator[tuple[Path | bytes, str]]:
        for record in records:
            if isinstance(record, Failed):
                waiting.append(record)
                continue
            try:
                image = record.image()
            except (ValueError, OSError) as error:
                waiting.append(Failed(record.name, str(error), record.sentence, record.id))
                continue
            waiting.append(record)
            yield image, record.sentence

    for found in predict_batches(model, pairs(), tokenizer, batch_size=batch_size):
        while isinstance(waiting[0], Failed):
            yield waiting.popleft(), None
        yield waiting.popleft(), found
    for record in waiting:
        yield record, None


def _error(record: Request | Failed, error: Exception | None) -> dict[str, Any]:
    if isinstance(record, Failed):
        found = {"where": record.where, "sentence": record.sentence, "record": record.id, "error": record.error}
    else:
        found = {"where": record.name, "sentence": record.sentence, "record": record.id, "error": str(error)}
    return {key: value for key, value in found.items() if value is not None}


def _coco(mask: np.ndarray) -> dict[str, Any]:
    """Return the segmentation, area and box of a mask (H, W) as COCO has them: compressed RLE and (x, y, w, h)."""
    from pycocotools import mask as coco_mask

    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    area, box = int(coco_mask.area(rle)), [float(side) for side in coco_mask.toBbox(rle)]
    segmentation = {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}
    return {"segmentation": segmentation, "area": area, "bbox": box}


def _shortened(stem: str) -> str:
    """Return the beginning of a file's name: with a number before it, a long one would exceed what systems allow."""
    name = os.fsencode(stem)
    return name[:_NAME].decode(errors="ignore") if len(name) > _NAME else stem


def _write_overlay(found: Prediction, path: Path) -> None:
    from fastkd.report.overlays import overlay, write_png

    with replace_files(path) as (partial,):
        write_png(overlay(found.image, found.mask, longest=max(*found.mask.shape, 384)), partial)
