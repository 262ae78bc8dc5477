"""``fastkd convert``: a published LAVT checkpoint into one safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from fastkd._console import show


def convert(
    source: Annotated[Path, tyro.conf.Positional],
    destination: Annotated[Path, tyro.conf.Positional],
    tokenizer: str | None = None,
    image_size: int = 480,
    max_words: int = 20,
    overwrite: bool = False,
) -> None:
    """Turn a published LAVT checkpoint into a teacher: one safetensors file, loaded strictly, nobody's code run.

    Args:
        source: the checkpoint (.pth), in either of the published layouts.
        destination: the .safetensors file to write.
        tokenizer: path of the vocab.txt (or tokenizer folder) it was trained with; it becomes part of the file.
        image_size: the size it was trained at; recorded.
        max_words: word ids per sentence it was trained with; recorded.
        overwrite: replace the destination.
    """
    from fastkd.models.lavt import convert as run

    facts = run(
        source, destination, tokenizer=tokenizer, image_size=image_size, max_words=max_words, overwrite=overwrite
    )
    show(f"{destination}: LAVT, layout {facts['layout']}, fusion heads {facts['fusion_heads']}")
    show(f"config: {facts['config']}\nsource: {facts['source']}, sha256 {facts['source_sha256']}")
