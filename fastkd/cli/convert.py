"""``fastkd convert``: turn a published LAVT checkpoint into a safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from fastkd._console import show


def convert(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")],
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")],
    tokenizer: str | None = None,
    image_size: int = 480,
    max_words: int = 20,
    overwrite: bool = False,
) -> None:
    """Convert a published LAVT checkpoint to one safetensors file; loads it strictly and executes no code from it.

    Args:
        source: the checkpoint (.pth), in either published layout.
        destination: the .safetensors file to write.
        tokenizer: path of the vocab.txt (or tokenizer folder) that it was trained with; stored in the file.
        image_size: image size that it was trained at; stored in the file.
        max_words: word ids per sentence that it was trained with; stored in the file.
        overwrite: replace an existing destination.
    """
    from fastkd.models.lavt import convert as run

    facts = run(
        source, destination, tokenizer=tokenizer, image_size=image_size, max_words=max_words, overwrite=overwrite
    )
    show(f"{destination}: LAVT, layout {facts['layout']}, fusion heads {facts['fusion_heads']}")
    show(f"config: {facts['config']}\nsource: {facts['source']}, sha256 {facts['source_sha256']}")
