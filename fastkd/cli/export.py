"""``fastkd export``: write a student as ONNX after comparing it with torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastkd._console import show
from fastkd.cli._data import DataArgs

_BATCH = 16


@dataclass
class CalibrationData(DataArgs):
    """`DataArgs` of which no folder is required."""

    data: Path | None = None  # type: ignore[assignment]


_NO_DATA = CalibrationData()


def export(
    model: str,
    onnx: Path,
    data: Annotated[CalibrationData, tyro.conf.arg(name="")] = _NO_DATA,
    height: int | None = None,
    width: int | None = None,
    tolerance: float = 1e-4,
    threads: int | None = None,
    dtype: Literal["fp32", "fp16", "int8"] = "fp32",
    calibrate_samples: int = 256,
) -> None:
    """Write a student as ONNX with fixed image size, any batch size, and logits as output.

    onnxruntime first runs the file on random images and sentences at two batch sizes; if it differs from torch by more
    than the tolerance, nothing is written. NAME.json (calling convention) and NAME.vocab.txt are written next to
    NAME.onnx. ``fastkd evaluate`` and ``predict`` take the file as a model. Needs ``pip install 'fastkd[export]'``.

    Args:
        model: a folder written by save_pretrained, such as a run's best/; it never contains the teacher.
        onnx: the .onnx file to write; an existing one is replaced.
        data: the dataset, as in ``fastkd train``: sentences drawn from its training set give the ranges of activations
            for int8, and the agreement of masks with fp32's.
        height: image height; if omitted, the model's image size.
        width: image width; if omitted, the height.
        tolerance: largest difference accepted, relative to the largest logit.
        threads: threads of torch and onnxruntime for the comparison.
        dtype: fp32; fp16 (weights and products); or int8 (convolutions and matrix products, weights scaled per output
            channel), which needs --data.
        calibrate_samples: number of sentences to draw.
    """
    import torch

    from fastkd.cli._arguments import check_folder
    from fastkd.cli._models import load_local_model
    from fastkd.evaluate.prediction import load_tokenizer_for, tokenizer_source
    from fastkd.models import RISModel
    from fastkd.models.export import export_onnx

    if threads is not None:
        torch.set_num_threads(threads)
    check_folder("--onnx", onnx.parent)
    _check_data(data, dtype)
    student = load_local_model(model)
    if not isinstance(student, RISModel):
        raise ValueError(f"{model} is a {type(student).__name__}; only students (RISModel folders) can be exported")
    source = data.tokenizer or tokenizer_source(student, Path(model).expanduser())
    words = load_tokenizer_for(student, source) if source is not None else None  # the tokenizer is optional
    rows = student.config.image_size if height is None else height
    size = (rows, rows if width is None else width)
    if data.data is not None and size != (student.config.image_size,) * 2:
        raise ValueError(
            f"--data gives images of the model's size, {student.config.image_size}: omit --height and --width, or "
            "call fastkd.models.export.export_onnx with batches of your own"
        )
    done = export_onnx(
        student,
        onnx,
        size=size,
        tokenizer=words,
        tolerance=tolerance,
        dtype=dtype,
        calibration=None if data.data is None else calibration_batches(student, data, samples=calibrate_samples),
    )
    show(f"{done.onnx}: {done.parameters:,} parameters, {done.onnx.stat().st_size / 1e6:.2f} MB")
    for batch, difference in done.differences.items():
        show(
            f"fp32, batch of {batch}: differs from torch by {difference:.1e} of the largest logit "
            f"(tolerance {tolerance:g})"
        )
    if done.agreement is not None:
        show(f"{dtype}: masks have IoU {done.agreement:.4f} with those of fp32")
    show(", ".join(str(file) for file in (done.metadata, done.vocabulary, done.tokenizer) if file is not None))


def _check_data(data: CalibrationData, dtype: str) -> None:
    """Raise ``ValueError`` for a dataset that int8 lacks, or that would be ignored."""
    if data.data is None:
        if dtype == "int8":
            raise ValueError("--dtype int8 needs --data, a dataset whose sentences give the ranges of activations")
        given = replace(data, tokenizer=None)
        ignored = [one.name for one in fields(data) if getattr(given, one.name) != getattr(_NO_DATA, one.name)]
        if ignored:
            named = ", ".join(f"--{name.replace('_', '-')}" for name in ignored)
            raise ValueError(f"{named}: needs --data, the dataset that it is about")
    elif dtype == "fp32":
        raise ValueError(f"--data {data.data} gives ranges for int8 and the agreement of fp16; fp32 needs no dataset")


def calibration_batches(student: Any, data: DataArgs, *, samples: int) -> Iterator[dict[str, Any]]:
    """Yield batches of sentences drawn from the training set, always the same ones."""
    import torch
    from torch.utils.data import DataLoader, Subset

    from fastkd.data import collate
    from fastkd.data._loading import batches

    if samples < 1:
        raise ValueError(f"--calibrate-samples must be at least 1, got {samples}")
    train: Any = data.open_every_sentence(student)
    drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:samples].tolist()
    yield from batches(DataLoader(Subset(train, drawn), batch_size=_BATCH, collate_fn=collate))
