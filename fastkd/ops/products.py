"""Matrix products in full fp32, independent of ``torch.set_float32_matmul_precision``.

At "high" and "medium" torch rounds the operands of fp32 products to TF32 or bf16 where that is faster. The setting is
global to the process, so changing it would affect other threads and later backwards. Instead, the operands are split
into parts that this rounding leaves unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd.ops.numerics import computes_fp64
from fastkd.ops.torch_state import constant_result

FAST_FP64 = ("cpu",)
"""Device types where an fp64 product takes at most about 3 times as long as fp32; others use six bf16 products."""


def product(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x @ y`` of (batches of) matrices of one dtype, fp32 or fp64, computed in that dtype.

    The setting is read by the forward (torch.compile guards on it) and applies to the derivatives too.
    """
    if x.dtype != torch.float32 or not _may_round(x.device.type):
        return x @ y
    if x.device.type in FAST_FP64 and computes_fp64(x.device):
        return (x.double() @ y.double()).float()
    return (_Parts if torch.compiler.is_compiling() else _TransformedParts).apply(x, y)


@constant_result
def _may_round(device_type: str) -> bool:
    """Return whether torch may round the operands of fp32 products on this type of device."""
    settings = []
    if device_type != "cuda":
        settings.append(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]
    if device_type != "cpu":
        settings.append(torch.backends.cuda.matmul.fp32_precision)
    return any(setting in ("tf32", "bf16") for setting in settings)


class _Parts(torch.autograd.Function):
    """The product of two matrices, and its derivatives, from bf16 parts that sum to the operands."""

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        (x1, x2, x3), (y1, y2, y3) = _parts(x), _parts(y)
        # The parts' products are exact and summed in fp32; the three smallest pairs, below fp32 rounding, are skipped.
        left = torch.cat([x3, x1, x2, x2, x1, x1], -1)
        return left @ torch.cat([y1, y3, y2, y1, y2, y1], -2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, y = ctx.saved_tensors
        apply = _Parts.apply if torch.compiler.is_compiling() else _TransformedParts.apply
        return (
            apply(grad, y.mT).sum_to_size(x.shape) if ctx.needs_input_grad[0] else None,
            apply(x.mT, grad).sum_to_size(y.shape) if ctx.needs_input_grad[1] else None,
        )


class _TransformedParts(_Parts):
    """:class:`_Parts` with the rules of vmap and forward mode, which torch.compile does not trace."""

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor | None, y_tangent: Tensor | None) -> Tensor:
        x, y = ctx.saved_tensors
        tangents = [_TransformedParts.apply(x_tangent, y)] if x_tangent is not None else []
        tangents += [_TransformedParts.apply(x, y_tangent)] if y_tangent is not None else []
        return sum(tangents[1:], start=tangents[0])

    @staticmethod
    def vmap(_: Any, in_dims: tuple[int | None, int | None], x: Tensor, y: Tensor) -> tuple[Tensor, int]:
        x, y = (z.unsqueeze(0) if d is None else z.movedim(d, 0) for z, d in zip((x, y), in_dims, strict=True))
        return _TransformedParts.apply(x, y), 0


def _parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return three tensors of 8 significant bits each, as bf16 has, whose sum is ``x``; NaN where ``x`` is infinite.

    The bits are truncated, because compilers optimise away a conversion to bf16 and back.
    """
    first = _upper(x)
    second = _upper(x - first)
    return first, second, x - first - second


def _upper(x: Tensor) -> Tensor:
    return (x.contiguous().view(torch.int32) & -(2**16)).view(torch.float32)
