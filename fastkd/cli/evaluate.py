"""``fastkd evaluate``."""

from __future__ import annotations

import json
from pathlib import Path

from fastkd.cli.train import Data


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
        data: the data set.
        model: a folder written by save_pretrained, a LAVT (.safetensors from ``fastkd convert``), a folder or hub name
            of transformers' CLIPSeg or SAM 3, or "shapes" for the shipped teacher of the procedural set.
        split: train, val, test, testA or testB.
        protocol: what the numbers mean: "lavt" (at the model's own size) or "lavt480".
        batch_size: samples per forward.
        device: "auto", "cpu", "cuda", ...
        out: also write the result as JSON to this file.
    """
    from fastkd.cli._common import load_model
    from fastkd.evaluate import evaluate as run

    loaded = load_model(model)
    samples = data.open(split, loaded, sentences="all")
    result = run(loaded, samples, batch_size=batch_size, protocol=protocol, device=device)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
    print(result)
