"""Evaluation protocols; scores are comparable only under the same protocol."""

from __future__ import annotations

from dataclasses import dataclass

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""The IoUs X of P@X."""

NO_TARGET_PIXELS = 50
"""Pixels below which a predicted mask means "no target" under "gres", for models without a no-target head."""


@dataclass(frozen=True)
class Protocol:
    """Rules by which masks are decided and compared.

    Attributes:
        name: name of the protocol.
        resolution: side of the square at which masks are compared, or None for the dataset's own size.
        original: compare masks at each image's own size instead of the model's square.
        probability: probability above which a pixel belongs to the object, or None for the larger of the two logits.
        strict: a sample counts in P@X if its IoU exceeds X; otherwise also if it equals X.
        epsilon: added to the union of a sample's IoU.
        no_target: sentences may have no target; a model predicts whether they do.
    """

    name: str
    resolution: int | None
    original: bool = False
    probability: float | None = None
    strict: bool = False
    epsilon: float = 0.0
    no_target: bool = False

    @property
    def decision(self) -> str:
        """Return the rule that turns logits into a mask."""
        return "argmax" if self.probability is None else f"sigmoid > {self.probability:g}"

    @property
    def threshold(self) -> str:
        """Return the condition for a sample to count in P@X."""
        return "IoU > X" if self.strict else "IoU >= X"


PROTOCOLS = {
    rules.name: rules
    for rules in (
        Protocol("lavt", None),
        Protocol("lavt480", 480),
        Protocol("cris_orig", None, original=True, probability=0.35, strict=True, epsilon=1e-6),
        Protocol("gres", 480, no_target=True),
    )
}
"""All score every sentence of every ref. I and U are a sample's pixels in intersection and union; its IoU is 0 where
U = 0.

- "lavt": argmax at the dataset's own size; "lavt480" requires 480×480, the setting of LAVT (Yang et al., CVPR 2022).
- "cris_orig": the object's probability, resized bicubically to the image's own size, > 0.35; sample IoU I/(U + 1e-6);
  P@X counts IoU > X. The setting of CRIS (Wang et al., CVPR 2022).
- "gres": argmax at 480×480, and a prediction of whether the sentence has a target. A sample without one has IoU 1 if
  that was predicted, else 0; P@X is over the samples with a target. The setting of GRES (Liu et al., CVPR 2023).
"""


def protocol(name: str) -> Protocol:
    """Return the named protocol.

    Raises:
        ValueError: an unknown name.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}; available: {', '.join(map(repr, PROTOCOLS))}")
    return PROTOCOLS[name]
