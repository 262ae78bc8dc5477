"""Join refs with images and annotations; reject ambiguous ids and contradictions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fastkd.data._records import Ref
from fastkd.data._values import brief, is_int

_LARGEST = 2**30  # pixels per image; pycocotools counts them in 32 bits


def index(
    records: Iterable[dict[str, Any]],
    kind: str,
    path: Path,
    fields: Sequence[str],
    ids: Collection[int] | None = None,
) -> dict[int, dict[str, Any]]:
    """Return the records by ``id``, restricted to ``ids`` if given.

    Duplicates with equal ``fields`` are accepted.

    Raises:
        ValueError: Two records with the same id differ.
    """
    found: dict[int, dict[str, Any]] = {}
    for record in records:
        number = record["id"]
        if ids is not None and number not in ids:
            continue
        if not is_int(number):
            raise TypeError(f"{kind} id {brief(number)} is not an integer")
        first = found.setdefault(number, record)
        for field in fields:
            if first is not record and first.get(field) != record.get(field):
                raise ValueError(
                    f"{path} has two different entries for {kind} {number} ({field} differs: {brief(first.get(field))} "
                    f"and {brief(record.get(field))}), so refs to it are ambiguous: remove one or give them different "
                    "ids"
                )
    return found


def image_fault(image: dict[str, Any]) -> str | None:
    """Return why an image of instances.json is unusable, or None: its size must be one that Pillow opens."""
    height, width = image["height"], image["width"]
    if not (is_int(height) and is_int(width)):
        return f"must have integers as height and width, got {brief(height)} and {brief(width)}"
    if min(height, width) < 1 or height * width > min(2 * (Image.MAX_IMAGE_PIXELS or _LARGEST), _LARGEST):
        return f"cannot be {height} x {width} (height x width)"
    if not isinstance(image["file_name"], str):
        return f"must have a string as file_name, got {brief(image['file_name'])}"
    return None


def check_unique(refs: Sequence[Ref], path: Path) -> None:
    """Reject repeated ref and sentence ids, which would be counted twice in the metrics.

    Raises:
        ValueError: An id occurs more than once.
    """
    for name, numbers in (
        ("ref_id", [ref.ref_id for ref in refs]),
        ("sent_id", [sentence.sent_id for ref in refs for sentence in ref.sentences]),
    ):
        if len(set(numbers)) != len(numbers):
            repeated = Counter(numbers).most_common(1)[0][0]
            raise ValueError(f"{path} has {name} {repeated} more than once: remove one or give them different ids")


class Contradiction(ValueError):
    """Refs and annotations contradict each other, so that skipping one record would not help."""


def check_agreement(ref: Ref, ann_id: int, annotation: dict[str, Any], path: Path) -> None:
    """Reject a ref whose image or category differs from that of one of its annotations.

    Raises:
        Contradiction: The annotation declares a value and it differs.
    """
    expected = {"image_id": ref.image_id}
    if ann_id == ref.ann_id:  # a ref states one category
        expected["category_id"] = ref.category_id
    for field, value in expected.items():
        found = annotation.get(field)
        if found is not None and found != value:
            raise Contradiction(
                f"{path}: annotation {ann_id} has {field} {brief(found)}, but ref {ref.ref_id}, which refers to "
                f"it, has {value}: refs and instances are from different releases, or one of them is damaged"
            )
