"""Records of a referring-expression set."""

from __future__ import annotations

from dataclasses import dataclass

NO_TARGET = -1  # ann_id and category_id of sentences that refer to nothing in the image


@dataclass(frozen=True, slots=True)
class Sentence:
    """One referring expression."""

    sent_id: int
    text: str


@dataclass(frozen=True, slots=True)
class Ref:
    """The target of a ref's sentences; refs may share an ``ann_id``, but not a ``ref_id``.

    Attributes:
        ref_id: The ref; of a `ReferFolder`, an integer or a string.
        ann_id: Its annotation, the first of several, or -1 without a target.
        image_id: The image.
        category_id: Category of ``ann_id``, or -1 without a target.
        split: The split.
        sentences: Its sentences.
        ann_ids: All its annotations (gRefCOCO has several), empty without a target; default: ``ann_id``.
    """

    ref_id: int | str
    ann_id: int
    image_id: int
    category_id: int
    split: str
    sentences: tuple[Sentence, ...]
    ann_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.ann_ids is None:
            object.__setattr__(self, "ann_ids", () if self.ann_id == NO_TARGET else (self.ann_id,))

    @property
    def targets(self) -> tuple[int, ...]:
        """Return the annotations of all targets; empty if the sentences refer to nothing in the image."""
        return self.ann_ids or ()
