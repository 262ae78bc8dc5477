"""Hand-made files in the layout of RefCOCO."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 12, 20
LEFT = [1, 2, 7, 2, 7, 8, 1, 8]  # columns 1-6, rows 2-7
RIGHT = [5, 4, 11, 4, 11, 10, 5, 10]  # columns 5-10, rows 4-9
SENTENCES = ("red circle", "leftmost circle", "the one on top")


def make_ref(
    ref_id: int, split: str, image_id: int = 1, ann_id: int = 1, sentences: tuple[str, ...] = SENTENCES
) -> dict:
    """Return one entry of a refs file."""
    entries = [
        {"raw": f"{text.title()}.", "sent": text, "sent_id": 10 * ref_id + k, "tokens": text.split()}
        for k, text in enumerate(sentences)
    ]
    return {
        "ref_id": ref_id,
        "ann_id": ann_id,
        "category_id": 7,
        "image_id": image_id,
        "split": split,
        "file_name": f"COCO_train2014_{image_id:012d}_{ann_id}.jpg",
        "sent_ids": [s["sent_id"] for s in entries],
        "sentences": entries,
    }


def write_set(
    root: Path,
    refs: Any = None,
    segmentations: dict[int, Any] | None = None,
    name: str = "refcoco",
    split_by: str = "unc",
    images: str | None = "images/train2014",
) -> Path:
    """Write a set of two images; ``refs`` may be a pickle's bytes."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    if refs is None:
        refs = [
            make_ref(0, "train"),
            make_ref(1, "val", image_id=2, ann_id=2),
            make_ref(2, "train", image_id=2, ann_id=2),
        ]
    content = refs if isinstance(refs, bytes) else pickle.dumps(refs, protocol=2)
    (folder / f"refs({split_by}).p").write_bytes(content)
    segmentations = {1: [LEFT], 2: [RIGHT], **(segmentations or {})}
    instances = {
        "images": [
            {"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg", "height": HEIGHT, "width": WIDTH} for i in (1, 2)
        ],
        "annotations": [
            {"id": k, "image_id": min(k, 2), "category_id": 7, "segmentation": s} for k, s in segmentations.items()
        ],
        "categories": [{"id": 7, "name": "circle"}],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    if images is not None:
        (root / images).mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        for i in (1, 2):
            picture = Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
            picture.save(root / images / f"COCO_train2014_{i:012d}.jpg", quality=95)
    return root


def prefix_file_names(root: Path, folder: str) -> Path:
    """Prefix every file_name of instances.json with a folder."""
    path = root / "refcoco/instances.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["file_name"] = folder + image["file_name"]
    path.write_text(json.dumps(content))
    return root


def append_instances(root: Path, **more: list[dict]) -> Path:
    """Append entries to the lists of instances.json."""
    path = root / "refcoco/instances.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: entries + more.get(key, []) for key, entries in content.items()}))
    return root


def box_mask(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    """Return the mask of a rectangle."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask
