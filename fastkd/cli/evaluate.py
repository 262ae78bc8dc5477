"""``fastkd evaluate``: score a saved model, and compare it with another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastkd._atomic import replace_files
from fastkd._console import show
from fastkd.cli._data import Data


def evaluate(
    data: Data,
    model: str,
    split: str = "val",
    protocol: str = "lavt",
    batch_size: int = 32,
    device: str = "auto",
    out: Path | None = None,
    out_samples: Path | None = None,
    against: Path | None = None,
    no_target_pixels: int = 50,
) -> None:
    """Score a saved model on every sentence of a split.

    Under torchrun or accelerate launch, every process scores its share of the sentences; the result is that of one
    process.

    Args:
        data: the dataset.
        model: a folder written by save_pretrained, a LAVT (.safetensors from ``fastkd convert``), an exported student
            (.onnx), a folder or hub name of transformers' CLIPSeg or SAM 3, or a shipped teacher: "shapes" or
            "shapesref".
        split: train, val, test, testA, testB or testC.
        protocol: evaluation protocol: "lavt" (at the model's own size), "lavt480", "cris_orig" (at each image's own
            size) or "gres" (sentences without a target).
        batch_size: samples per forward.
        device: "auto", "cpu", "cuda", ...
        out: JSON file to also write the result to.
        out_samples: .jsonl or .parquet file to write the scores of every sentence to.
        against: such a file of another model, on the same sentences: print how much higher this one scores, with
            bootstrap intervals.
        no_target_pixels: under "gres", a predicted mask with fewer pixels means that there is no target, unless the
            model predicts that itself.
    """
    from fastkd.cli._arguments import check_file
    from fastkd.cli._models import load_model
    from fastkd.evaluate import compare, read_samples, write_samples
    from fastkd.evaluate import evaluate as run
    from fastkd.evaluate.comparison import check_conditions
    from fastkd.evaluate.evaluation import conditions_of
    from fastkd.evaluate.samples import check_suffix
    from fastkd.train import TrainConfig
    from fastkd.train.launch import join

    files: dict[Path, str] = {}
    for option, path in (("--against", against), ("--out", out), ("--out-samples", out_samples)):
        if path is None:
            continue
        if option != "--against":
            check_file(option, path)
        if (other_option := files.setdefault(path.resolve(), option)) != option:
            raise ValueError(f"{other_option} and {option} are the same file, {path}: choose another name for one")
    if data.mix:
        raise ValueError(
            f"--mix is for training sets, got {', '.join(data.mix)}; evaluate one set at a time, with --dataset"
        )
    if out_samples is not None:
        check_suffix(out_samples, "--out-samples")
    other = None if against is None else read_samples(against)
    processes, used_device, precision = join(TrainConfig(device=device, precision="fp32"))
    loaded = load_model(model)
    samples = data.open(split, loaded, sentences="all")
    if other is not None:  # before the work
        check_conditions(conditions_of(samples, protocol), other)
    result = run(
        loaded,
        samples,
        batch_size=batch_size,
        protocol=protocol,
        device=used_device,
        precision=precision,
        no_target_pixels=no_target_pixels,
    )
    if not processes.is_main_process:
        return
    if out_samples is not None:
        write_samples(result, out_samples)
    if out is not None:
        _write(out, result.to_dict())
    show(str(result))
    if other is not None:
        comparison = compare(result, other)
        show(str(comparison))
        if out is not None:
            _write(out, {**result.to_dict(), "comparison": comparison.to_dict()})


def _write(path: Path, content: dict[str, Any]) -> None:
    with replace_files(path) as (partial,):
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
