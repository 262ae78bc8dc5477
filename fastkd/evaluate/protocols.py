"""Evaluation protocols; scores are comparable only under the same protocol."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """Rules by which masks are decided and compared.

    Attributes:
        name: name of the protocol.
        resolution: side of the square at which masks are compared, or None for the dataset's own size.
        decision: rule that turns logits into a mask.
        threshold: condition for a sample to count in P@X.
    """

    name: str
    resolution: int | None
    decision: str = "argmax"
    threshold: str = "IoU >= X"


PROTOCOLS = {"lavt": Protocol("lavt", None), "lavt480": Protocol("lavt480", 480)}
"""Both: all sentences of every ref, argmax, sample IoU = I/U and 0 where U = 0. "lavt480" compares at 480×480, the
published setting, "lavt" at the dataset's own size."""


def protocol(name: str) -> Protocol:
    """Return the named protocol.

    Raises:
        ValueError: an unknown name.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}; available: {', '.join(map(repr, PROTOCOLS))}")
    return PROTOCOLS[name]
