"""Join refs with images and annotations: an id must name one thing, and facts that are stated twice must agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastkd.data.refcoco import Ref


def index(
    records: Iterable[dict[str, Any]],
    what: str,
    path: Path,
    fields: Sequence[str],
    wanted: Collection[int] | None = None,
) -> dict[int, dict[str, Any]]:
    """Return the records by their ``id``, those ``wanted`` only, if given.

    A record that is repeated exactly, as far as ``fields`` go, is harmless.

    Raises:
        ValueError: two different records of one id.
    """
    found: dict[int, dict[str, Any]] = {}
    for record in records:
        number = record["id"]
        if wanted is not None and number not in wanted:
            continue
        first = found.setdefault(number, record)
        for field in fields:
            if first is not record and first.get(field) != record.get(field):
                raise ValueError(
                    f"{path} has two different entries for {what} {number} ({field} differs: {first.get(field)!r:.60} "
                    f"and {record.get(field)!r:.60}), so refs to it are ambiguous: remove one or number them apart"
                )
    return found


def check_unique(refs: Sequence[Ref], path: Path) -> None:
    """Refuse a ref or sentence id that occurs twice; an exact repetition too, since it would count twice in scores.

    Raises:
        ValueError: naming the id.
    """
    for what, numbers in (
        ("ref_id", [ref.ref_id for ref in refs]),
        ("sent_id", [sentence.sent_id for ref in refs for sentence in ref.sentences]),
    ):
        if len(set(numbers)) != len(numbers):
            twice = Counter(numbers).most_common(1)[0][0]
            raise ValueError(f"{path} has {what} {twice} more than once: remove one or number them apart")


def check_agreement(ref: Ref, annotation: dict[str, Any], path: Path) -> None:
    """Refuse a ref whose image or category is not its annotation's, where the annotation states them.

    Raises:
        ValueError: naming both.
    """
    for field, mine in (("image_id", ref.image_id), ("category_id", ref.category_id)):
        theirs = annotation.get(field)
        if theirs is not None and theirs != mine:
            raise ValueError(
                f"{path}: annotation {ref.ann_id} has {field} {theirs}, but ref {ref.ref_id}, which refers to it, has "
                f"{mine}: refs and instances are of different releases, or one of them is damaged"
            )
