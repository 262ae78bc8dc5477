"""Paths of the files that ship with fastkd.data."""

from pathlib import Path

SHAPES_VOCABULARY_FILE = Path(__file__).parent / "assets" / "shapes_vocab.txt"
