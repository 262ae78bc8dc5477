"""A procedural referring-expression set, written in the layout of RefCOCO.

Rooms: ``scene`` (which shapes, where, who hides whom), ``render`` (pixels and labels), ``contours`` (labels to
polygons), ``meaning`` (what a sentence says about a scene), ``language`` (sentences that single out one shape),
``write`` (the files), ``sidecar`` (what RefCOCO's files have no place for), ``vocab`` (the word pieces that ship).
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
