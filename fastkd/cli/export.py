"""``fastkd export``: write a student as ONNX after comparing it with torch."""

from __future__ import annotations

from pathlib import Path

from fastkd._console import show


def export(
    model: str,
    onnx: Path,
    height: int | None = None,
    width: int | None = None,
    tokenizer: str | None = None,
    tolerance: float = 1e-4,
    threads: int | None = None,
) -> None:
    """Write a student as ONNX with fixed image size, any batch size, and logits as output.

    onnxruntime first runs the file on random images and sentences at two batch sizes; if it differs from torch by more
    than the tolerance, nothing is written. NAME.json (calling convention) and NAME.vocab.txt are written next to
    NAME.onnx. Needs ``pip install 'fastkd[export]'``.

    Args:
        model: a folder written by save_pretrained, such as a run's best/; it never contains the teacher.
        onnx: the .onnx file to write; an existing one is replaced.
        height: image height; if omitted, the model's image size.
        width: image width; if omitted, the height.
        tokenizer: path of a vocab.txt or of a tokenizer folder; if omitted, the one in the model's folder or named by
            its configuration, if any.
        tolerance: largest difference accepted, relative to the largest logit.
        threads: threads of torch and onnxruntime for the comparison.
    """
    import torch

    from fastkd.cli._arguments import check_folder
    from fastkd.cli._models import load_local_model
    from fastkd.data import load_tokenizer
    from fastkd.evaluate.prediction import tokenizer_source
    from fastkd.models import RISModel
    from fastkd.models.export import export_onnx

    if threads is not None:
        torch.set_num_threads(threads)
    onnx = onnx.expanduser()
    check_folder("onnx", onnx.parent)
    student = load_local_model(model)
    if not isinstance(student, RISModel):
        raise ValueError(f"{model} is a {type(student).__name__}; only students (RISModel folders) can be exported")
    source = tokenizer or tokenizer_source(student, Path(model).expanduser())
    words = load_tokenizer(source) if source is not None else None  # the tokenizer is optional
    rows = student.config.image_size if height is None else height
    done = export_onnx(
        student, onnx, size=(rows, rows if width is None else width), tokenizer=words, tolerance=tolerance
    )
    show(f"{done.onnx}: {done.parameters:,} parameters, {done.onnx.stat().st_size / 1e6:.1f} MB")
    for batch, difference in done.differences.items():
        show(f"batch of {batch}: differs from torch by {difference:.1e} of the largest logit (tolerance {tolerance:g})")
    show(f"{done.metadata}" + (f", {done.vocabulary}" if done.vocabulary is not None else ""))
