"""``fastkd export``: a student as ONNX, compared with torch before it is kept."""

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
    """Write a student as ONNX: fixed image size, any batch size, logits out.

    onnxruntime runs the file on random images and sentences at two batch sizes; where it differs from torch by more
    than the tolerance nothing is written. Beside NAME.onnx come NAME.json (how to call it) and NAME.vocab.txt.
    Needs ``pip install 'fastkd[export]'``.

    Args:
        model: a folder written by save_pretrained, such as a run's best/; the teacher is never part of it.
        onnx: the .onnx file to write; an earlier one is replaced.
        height: of the image; left out: the size the model was made for.
        width: of the image; left out: as the height.
        tokenizer: path of a vocab.txt or of a tokenizer folder; left out: the one in the model's folder, or the one its
            configuration names, if any.
        tolerance: largest difference allowed, as a share of the largest logit.
        threads: of torch and onnxruntime while comparing.
    """
    import torch

    from fastkd.cli._common import check_folder, load_local
    from fastkd.data import load_tokenizer
    from fastkd.evaluate.prediction import tokenizer_source
    from fastkd.models import RISModel
    from fastkd.models.export import export_onnx

    if threads is not None:
        torch.set_num_threads(threads)
    onnx = onnx.expanduser()
    check_folder("onnx", onnx.parent)
    student = load_local(model)
    if not isinstance(student, RISModel):
        raise ValueError(f"{model} is a {type(student).__name__}; only students (RISModel folders) are exported")
    source = tokenizer or tokenizer_source(student, Path(model).expanduser())
    words = load_tokenizer(source) if source is not None else None  # the file is whole without it
    rows = student.config.image_size if height is None else height
    done = export_onnx(
        student, onnx, size=(rows, rows if width is None else width), tokenizer=words, tolerance=tolerance
    )
    show(f"{done.onnx}: {done.parameters:,} parameters, {done.onnx.stat().st_size / 1e6:.1f} MB")
    for batch, difference in done.differences.items():
        show(f"batch of {batch}: differs from torch by {difference:.1e} of the largest logit (allowed: {tolerance:g})")
    show(f"{done.metadata}" + (f", {done.vocabulary}" if done.vocabulary is not None else ""))
