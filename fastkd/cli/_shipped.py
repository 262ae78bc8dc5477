"""Teachers that ship with fastkd, by their names on the command line."""

from __future__ import annotations

from pathlib import Path

_ASSETS = Path(__file__).resolve().parent.parent / "models" / "assets"
SHIPPED = {"shapes": _ASSETS / "shapes-teacher", "shapesref": _ASSETS / "shapesref-teacher"}


def teacher_path(name: str) -> Path:
    """Return the folder of a shipped teacher, or ``name`` as a path."""
    return SHIPPED.get(name) or Path(name).expanduser()
