"""``fastkd evaluate``: score a saved model."""

from __future__ import annotations

import json
from pathlib import Path

from fastkd._atomic import replace_files
from fastkd.cli._data import Data


def evaluate(
    data: Data,
    model: str,
    split: str = "val",
    protocol: str = "lavt",
    batch_size: int = 32,
    device: str = "auto",
    out: Path | None = None,
) -> None:
    """Score a saved model on every sentence of a split.

    Args:
        data: the dataset.
        model: a folder written by save_pretrained, a LAVT (.safetensors from ``fastkd convert``), a folder or hub name
            of transformers' CLIPSeg or SAM 3, or "shapes" for the shipped teacher of the procedural set.
        split: train, val, test, testA or testB.
        protocol: evaluation protocol, "lavt" (at the model's own size) or "lavt480".
        batch_size: samples per forward.
        device: "auto", "cpu", "cuda", ...
        out: JSON file to also write the result to.
    """
    from fastkd.cli._models import load_model
    from fastkd.evaluate import evaluate as run

    loaded = load_model(model)
    samples = data.open(split, loaded, sentences="all")
    result = run(loaded, samples, batch_size=batch_size, protocol=protocol, device=device)
    if out is not None:
        with replace_files(out) as (partial,):
            partial.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
    print(result)
