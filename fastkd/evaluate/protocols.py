"""Evaluation protocols: a number of referring segmentation means nothing without the name of its protocol."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """How masks are decided and compared.

    Attributes:
        name: its name.
        resolution: side of the square the masks are compared at, or None for the dataset's own size.
        decision: how logits become a mask.
        threshold: how P@X compares.
    """

    name: str
    resolution: int | None
    decision: str = "argmax"
    threshold: str = "IoU >= X"


PROTOCOLS = {"lavt": Protocol("lavt", None), "lavt480": Protocol("lavt480", 480)}
"""All sentences of every ref; argmax; sample IoU = I/U, 0 where U = 0. "lavt480" at 480×480, the published setting;
"lavt" at the dataset's own size."""

_PLANNED = {
    "cris_orig": "masks at the original image size, sigmoid > 0.35",
    "gres": "sentences without a target, a no-target head",
}


def protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        NotImplementedError: a known protocol that is not here yet.
        ValueError: an unknown name.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    here = ", ".join(map(repr, PROTOCOLS))
    if name in _PLANNED:
        raise NotImplementedError(f"protocol {name!r} ({_PLANNED[name]}) is not available yet; available: {here}")
    raise ValueError(f"unknown protocol {name!r}; available: {here}")
