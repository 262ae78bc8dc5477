"""Convert an exported network to fp16, or to int8 with ranges measured on data."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fastkd.models.onnx_model import INPUTS, open_session, run

Batches = Iterable[Mapping[str, Tensor]]


def to_fp16(source: Path, target: Path) -> None:
    """Write a network with fp16 weights and products; inputs and logits stay float32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with _folded(source) as folded:
        onnx.save(convert_float_to_float16(onnx.load(str(folded)), keep_io_types=True), str(target))


def to_int8(source: Path, target: Path, batches: Batches) -> None:
    """Write a network whose convolutions and matrix products take int8 weights and uint8 activations.

    Weights are scaled per output channel, symmetrically; activations per tensor, by the smallest and largest value
    that the batches give. Softmax, normalisation and other operations stay in fp32. Weights are from -64 to 64: on x86
    processors without VNNI, onnxruntime adds pairs of products in 16 bits, where two of 255 * 127 saturate.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = ({name: batch[name].numpy() for name in INPUTS} for batch in batches)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    with _folded(source) as folded:
        quantize_static(
            str(folded),
            str(target),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


@contextlib.contextmanager
def _folded(source: Path) -> Iterator[Path]:
    """Yield a copy with constants and batch norms folded and shapes inferred, which both conversions need."""
    import onnxruntime
    from onnxruntime.quantization import quant_pre_process

    logger = logging.getLogger()
    level = logger.level
    with TemporaryDirectory() as folder:
        path = Path(folder, "folded.onnx")
        # Hide notes of the converters about constants that they cannot fold and biases that they compute.
        logger.setLevel(logging.ERROR)
        onnxruntime.set_default_logger_severity(3)
        try:
            # Symbolic inference does not support opsets of recent exports; batch size aside, all shapes are fixed.
            quant_pre_process(str(source), str(path), skip_symbolic_shape=True)
            yield path
        finally:
            logger.setLevel(level)
            onnxruntime.set_default_logger_severity(2)  # its default


def agreement(reference: Path, other: Path, batches: Batches) -> float:
    """Return the IoU of all object pixels of two networks' masks over the batches, 1 if neither has any.

    Raises:
        ArithmeticError: the other network gives logits that are not finite.
    """
    sessions = [open_session(path.read_bytes(), torch.get_num_threads()) for path in (reference, other)]
    both = either = 0
    for batch in batches:
        logits = [run(session, {name: batch[name] for name in INPUTS}) for session in sessions]  # (B, 2, H, W) each
        if not bool(logits[1].isfinite().all()):
            raise ArithmeticError("the converted network gives logits that are not finite; nothing was written")
        first, second = (each[:, 1] > each[:, 0] for each in logits)
        both += int((first & second).sum())
        either += int((first | second).sum())
    return both / either if either else 1.0
