"""Evaluation protocols: scores of referring segmentation are comparable only under the same protocol."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """Rules by which masks are decided and compared.

    Attributes:
        name: name of the protocol.
        resolution: side of the square at which masks are compared, or None for the dataset's own size.
        decision: rule that turns logits into a mask.
        threshold: comparison of P@X.
    """

    name: str
    resolution: int | None
    decision: str = "argmax"
    threshold: str = "IoU >= X"


PROTOCOLS = {"lavt": Protocol("lavt", None), "lavt480": Protocol("lavt480", 480)}
"""Both: all sentences of every ref, argmax, sample IoU = I/U and 0 where U = 0. "lavt480" compares at 480×480, the
published setting, "lavt" at the dataset's own size."""

_PLANNED = {
    "cris_orig": "masks at the original image size, sigmoid > 0.35",
    "gres": "sentences without a target, a no-target head",
}


def protocol(name: str) -> Protocol:
    """Return the named protocol.

    Raises:
        NotImplementedError: a known protocol that is not implemented.
        ValueError: an unknown name.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    available = ", ".join(map(repr, PROTOCOLS))
    if name in _PLANNED:
        raise NotImplementedError(f"protocol {name!r} ({_PLANNED[name]}) is not implemented; available: {available}")
    raise ValueError(f"unknown protocol {name!r}; available: {available}")
