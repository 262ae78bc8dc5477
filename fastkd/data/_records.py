"""Records of a referring-expression set."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sentence:
    """One referring expression."""

    sent_id: int
    text: str


@dataclass(frozen=True, slots=True)
class Ref:
    """One referred object with its sentences; refs may share an ``ann_id``, but not a ``ref_id``."""

    ref_id: int
    ann_id: int
    image_id: int
    category_id: int
    split: str
    sentences: tuple[Sentence, ...]
