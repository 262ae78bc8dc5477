"""A procedural referring-expression set in the layout of RefCOCO.

Modules: ``scene`` (shapes, positions, occlusion), ``render`` (pixels and labels), ``contours`` (labels to polygons),
``meaning`` (semantics of descriptions), ``language`` (sentences that identify one shape), ``write`` (files),
``sidecar`` (data that RefCOCO's files cannot hold), ``vocab`` (the shipped word pieces).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastkd._lazy import lazy_names

if TYPE_CHECKING:
    from fastkd.data.shapes.language import KIND_SHARES
    from fastkd.data.shapes.sidecar import sentence_kinds
    from fastkd.data.shapes.vocab import vocabulary
    from fastkd.data.shapes.write import make_shapes

__all__ = ["KIND_SHARES", "make_shapes", "sentence_kinds", "vocabulary"]

__getattr__ = lazy_names(
    __name__,
    {
        "KIND_SHARES": "fastkd.data.shapes.language",
        "make_shapes": "fastkd.data.shapes.write",
        "sentence_kinds": "fastkd.data.shapes.sidecar",
        "vocabulary": "fastkd.data.shapes.vocab",
    },
)
