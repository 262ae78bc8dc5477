"""ShapesRef, a procedural benchmark of referring image segmentation, harder than the set of `fastkd.data.shapes`.

Modules: ``generate`` (scenes and the set), ``language`` (kinds of sentences), ``render`` (light, shadows, noise).
Shapes, meanings, wording and files are those of `fastkd.data.shapes`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastkd._lazy import lazy_names

if TYPE_CHECKING:
    from fastkd.data.shapesref.generate import SPLITS, VERSION, make_shapesref
    from fastkd.data.shapesref.language import KIND_SHARES, PLACELESS_SHARES

__all__ = ["KIND_SHARES", "PLACELESS_SHARES", "SPLITS", "VERSION", "make_shapesref"]

__getattr__ = lazy_names(
    __name__,
    {
        "KIND_SHARES": "fastkd.data.shapesref.language",
        "PLACELESS_SHARES": "fastkd.data.shapesref.language",
        "SPLITS": "fastkd.data.shapesref.generate",
        "VERSION": "fastkd.data.shapesref.generate",
        "make_shapesref": "fastkd.data.shapesref.generate",
    },
)
