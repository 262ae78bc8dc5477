"""Write the procedural set in the layout of RefCOCO."""

from __future__ import annotations

import json
import os
import pickle
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from fastkd._atomic import replace_folder
from fastkd._messages import shortened
from fastkd.data.shapes.contours import mask_polygons
from fastkd.data.shapes.language import KIND_SHARES, Expression, describe, draw_kinds
from fastkd.data.shapes.render import render
from fastkd.data.shapes.scene import KINDS, Scene, draw_scene

_ENTRIES = {"images", "refcoco", "shapes.json"}


@dataclass(frozen=True)
class Procedure:
    """Definition of a procedural set.

    Args:
        version: Name and version; scenes and images are functions of version, seed and index.
        description: For ``instances.json``.
        shares: Share of each kind of sentence.
        split_of: Split of an image, by index.
        fewest_images: Number of images after which every split has one.
        draw: Scene and sentences, by index and seed.
        render: Image and labels of a scene; see `fastkd.data.shapes.render.render`.
    """

    version: str
    description: str
    shares: Mapping[str, float]
    split_of: Callable[[int], str]
    fewest_images: int
    draw: Callable[[int, int], tuple[Scene, list[Expression]]]
    render: Callable[[Scene, int, Random], tuple[np.ndarray, np.ndarray]]

    def image(self, scene: Scene, image_size: int, index: int, seed: int) -> tuple[np.ndarray, np.ndarray, Random]:
        """Return image and labels of scene ``index``, and the source of random numbers for what follows."""
        rng = Random(f"{self.version}/{seed}/{index}/look")
        return *self.render(scene, image_size, rng), rng


def make_shapes(
    root: str | os.PathLike[str],
    *,
    images: int = 5000,
    image_size: int = 128,
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a procedural referring-expression set under ``root`` in the layout of RefCOCO.

    Each image shows 3 to 8 textured, partly occluded shapes. Each sentence identifies one of them by attribute, place,
    relation, superlative or ordinal, in the fixed proportions of ``KIND_SHARES``; its meaning is evaluated on the
    scene, so that exactly one shape matches, by a margin. The layout::

        root/refcoco/instances.json     COCO style: polygons of the visible part of every shape
        root/refcoco/refs(unc).p        pickled list of dicts, 1 to 4 sentences each
        root/images/train2014/COCO_train2014_%012d.jpg
        root/shapes.json                settings, attributes by annotation id, kinds by sentence id

    Of every 20 images 16 are train, 2 val, 1 testA and 1 testB (crowded: 6 to 8 shapes). Image i depends only on
    ``seed``, i and ``image_size``, so a larger set starts with the smaller one; scenes and sentences do not depend on
    ``image_size``. Two runs write identical bytes (with the same version of Pillow).

    Args:
        root: The folder to create, atomically.
        images: Number of images, at least 4, so that every split has one.
        image_size: Side of the square images in pixels, at least 32.
        seed: Random seed, any integer.
        overwrite: Replace an earlier set at ``root``; a folder with other files is never replaced.
        progress: Called as ``progress(done, images)`` after each image.

    Returns:
        Counts: images, objects, refs, sentences, ``refs_by_split``, ``sentences_by_kind``.

    Example::

        fastkd.data.make_shapes("data/shapes", images=2000, image_size=64)
        train = fastkd.data.RefCOCO("data/shapes", split="train")
    """
    return write_set(SHAPES, root, images, image_size, seed, overwrite, progress)


def write_set(
    procedure: Procedure,
    root: str | os.PathLike[str],
    images: int,
    image_size: int,
    seed: int,
    overwrite: bool,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Write a set by a procedure and return its counts; see `make_shapes`."""
    least = procedure.fewest_images
    if isinstance(images, bool) or not isinstance(images, int) or images < least:
        raise ValueError(f"images must be an integer of at least {least}, so that every split has one, got {images!r}")
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 32:
        raise ValueError(f"image_size must be an integer of at least 32 pixels, got {image_size!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an integer, got {seed!r}")
    root = Path(root).absolute()
    _check_target(root, overwrite)
    with replace_folder(root) as partial:
        counts = _write(procedure, partial, images, image_size, seed, progress)
        _check_target(root, overwrite)  # another process may have written there meanwhile
    return counts


def _check_target(root: Path, overwrite: bool) -> None:
    if not root.exists():
        return
    if not root.is_dir():
        raise FileExistsError(f"root {str(root)!r} is a file; pass the folder to create")
    names = {entry.name for entry in root.iterdir()}
    if not names:
        return
    if names - _ENTRIES or "shapes.json" not in names:
        raise FileExistsError(
            f"root {str(root)!r} holds files that are not a shapes set ({shortened(sorted(names))}): pass another "
            "folder (overwrite replaces an earlier set only)"
        )
    if not overwrite:
        raise FileExistsError(
            f"root {str(root)!r} already holds a shapes set: pass overwrite=True (--overwrite) or another folder"
        )


def split_of(index: int) -> str:
    """Return the split of image ``index``: per 20, 16 train, 2 val, 1 testA, 1 testB; the first four differ."""
    return {1: "val", 2: "testA", 3: "testB", 11: "val"}.get(index % 20, "train")


def draw(index: int, seed: int) -> tuple[Scene, list[Expression]]:
    """Return scene ``index`` of the set and its sentences, independent of the number of images."""
    rng = Random(f"{SHAPES.version}/{seed}/{index}/scene")
    kinds = draw_kinds(rng)
    for _ in range(500):
        scene = draw_scene(rng, crowded=split_of(index) == "testB")
        expressions = describe(scene, kinds, rng)
        if expressions is not None:
            return scene, expressions
    raise RuntimeError(f"no scene for the sentence kinds {kinds} in 500 attempts (seed {seed}, image {index})")


SHAPES = Procedure(
    version="fastkd-shapes-1",
    description="fastkd procedural referring shapes",
    shares=KIND_SHARES,
    split_of=split_of,
    fewest_images=4,
    draw=draw,
    render=render,
)


def _write(
    procedure: Procedure,
    folder: Path,
    images: int,
    image_size: int,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    image_folder = folder / "images" / "train2014"
    image_folder.mkdir(parents=True)
    instances: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    refs: list[dict[str, Any]] = []
    sidecar: dict[str, dict[str, Any]] = {"objects": {}, "sentences": {}}
    for index in range(images):
        scene, expressions = procedure.draw(index, seed)
        pixels, labels, appearance = procedure.image(scene, image_size, index, seed)
        name = f"COCO_train2014_{index + 1:012d}.jpg"
        Image.fromarray(pixels).save(image_folder / name, format="JPEG", quality=92, subsampling=0)
        instances["images"].append(
            {
                "license": 1,
                "file_name": name,
                "coco_url": "",
                "height": image_size,
                "width": image_size,
                "date_captured": "",
                "flickr_url": "",
                "id": index + 1,
            }
        )
        first = len(instances["annotations"]) + 1
        instances["annotations"] += [
            _annotation(first + k, index + 1, scene, k, labels == k + 1) for k in range(len(scene))
        ]
        for k, shape in enumerate(scene.shapes):
            sidecar["objects"][str(first + k)] = {
                "kind": shape.kind,
                "colour": shape.colour,
                "texture": shape.texture,
                "size": shape.size,
                "visible": round(scene.visible[k], 4),
                "depth": k,
            }
        split = procedure.split_of(index)
        _add_refs(refs, sidecar["sentences"], scene, expressions, index, split, first, appearance)
        if progress is not None:
            progress(index + 1, images)
    _save(procedure, folder, instances, refs, sidecar, {"images": images, "image_size": image_size, "seed": seed})
    kinds = Counter(sidecar["sentences"].values())
    return {
        "images": images,
        "objects": len(instances["annotations"]),
        "refs": len(refs),
        "sentences": len(sidecar["sentences"]),
        "refs_by_split": dict(Counter(ref["split"] for ref in refs)),
        "sentences_by_kind": {kind: kinds[kind] for kind in procedure.shares},
    }


def _annotation(ann_id: int, image_id: int, scene: Scene, k: int, mask: np.ndarray) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = float(columns[0]), float(rows[0])
    return {
        "segmentation": mask_polygons(mask),
        "area": float(np.count_nonzero(mask)),
        "iscrowd": 0,
        "image_id": image_id,
        "bbox": [left, top, float(columns[-1]) + 1 - left, float(rows[-1]) + 1 - top],
        "category_id": KINDS.index(scene.shapes[k].kind) + 1,
        "id": ann_id,
    }


def _add_refs(
    refs: list[dict[str, Any]],
    kinds: dict[str, str],
    scene: Scene,
    expressions: list[Expression],
    index: int,
    split: str,
    first_ann_id: int,
    rng: Random,
) -> None:
    by_target: dict[int, list[Expression]] = {}
    for expression in expressions:
        by_target.setdefault(expression.target, []).append(expression)
    for target, group in sorted(by_target.items()):
        sentences: list[dict[str, Any]] = []
        for expression in group:
            sent_id, text = len(kinds), expression.text
            kinds[str(sent_id)] = expression.kind
            raw = text.capitalize() + "." if rng.random() < 0.5 else text
            sentences.append({"tokens": text.split(), "raw": raw, "sent_id": sent_id, "sent": text})
        refs.append(
            {
                "sent_ids": [sentence["sent_id"] for sentence in sentences],
                # As in RefCOCO, not the name of a file: it includes the annotation id.
                "file_name": f"COCO_train2014_{index + 1:012d}_{first_ann_id + target}.jpg",
                "ann_id": first_ann_id + target,
                "ref_id": len(refs),
                "image_id": index + 1,
                "split": split,
                "sentences": sentences,
                "category_id": KINDS.index(scene.shapes[target].kind) + 1,
            }
        )


def _save(
    procedure: Procedure,
    folder: Path,
    instances: dict[str, list[dict[str, Any]]],
    refs: list[dict[str, Any]],
    sidecar: dict[str, dict[str, Any]],
    settings: dict[str, int],
) -> None:
    (folder / "refcoco").mkdir()
    content: dict[str, Any] = {
        "info": {"description": procedure.description, "version": procedure.version, **settings},
        "licenses": [{"id": 1, "name": "Apache License 2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}],
        **instances,
        "categories": [{"supercategory": "shape", "id": k + 1, "name": kind} for k, kind in enumerate(KINDS)],
    }
    (folder / "refcoco" / "instances.json").write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
    # The published files use protocol 2.
    (folder / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    extra: dict[str, Any] = {"format": procedure.version, **settings, "shares": dict(procedure.shares), **sidecar}
    (folder / "shapes.json").write_text(json.dumps(extra, separators=(",", ":")), encoding="utf-8")
