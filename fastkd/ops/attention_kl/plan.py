"""Inputs, options, sizes and FLOP of an ``attention_kl`` call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.ops.numerics import compute_dtype

Shape = Sequence[int]


class Inputs(NamedTuple):
    """The tensors of the operators, in the order of their schemas."""

    student_q: Tensor  # (B, H, N, D_S)
    student_k: Tensor  # (B, H, M, D_S)
    teacher_q: Tensor  # (B, H, N, D_T)
    teacher_k: Tensor  # (B, H, M, D_T)
    student_scale: Tensor  # (H,), of Q Kᵀ
    teacher_scale: Tensor  # (H,)
    student_bias: Tensor | None  # broadcastable to (B, H, N, M), 4-d
    teacher_bias: Tensor | None
    key_mask: Tensor | None  # (B, M), True = valid
    query_mask: Tensor | None  # (B, N)

    @property
    def features(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return queries and keys of student and teacher."""
        return self[:4]


class Options(NamedTuple):
    """The operators' options, in the order of their schemas."""

    temperature: float | Tensor
    causal: bool
    row_gradient: float  # of each loss, for the prepared gradients


INPUTS = len(Inputs._fields)


def arithmetic_dtype(inputs: Inputs) -> torch.dtype:
    """Return the dtype of logits, sums and losses: fp64 if queries, keys or biases are, else fp32."""
    biases = [b for b in (inputs.student_bias, inputs.teacher_bias) if b is not None]
    return compute_dtype(*inputs.features, *biases)


def allocate(inputs: Inputs, for_q: bool, for_k: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the unfilled losses (B, H, N) and prepared gradients of a forward; those not requested are empty.

    A prepared gradient stays in the dtype of the arithmetic, because its product with a number is rounded to the
    dtype of the input.
    """
    dtype, device = arithmetic_dtype(inputs), inputs.student_q.device
    empty = lambda shape: torch.empty(shape, dtype=dtype, device=device)
    q, k = inputs.student_q, inputs.student_k
    return empty(q.shape[:3]), empty(q.shape if for_q else (0,)), empty(k.shape if for_k else (0,))


def gradients_like(inputs: Inputs, for_q: bool, for_k: bool) -> tuple[Tensor, Tensor]:
    """Return the unfilled contiguous gradients of the student's queries and keys; those not requested are empty."""
    q, k = (
        torch.empty(x.shape if needed else (0,), dtype=x.dtype, device=x.device)
        for x, needed in ((inputs.student_q, for_q), (inputs.student_k, for_k))
    )
    return q, k


def rounded(number: float, dtype: torch.dtype) -> float:
    """Return ``number`` rounded to float32, or unchanged for float64."""
    exact = number == 1 or dtype == torch.float64  # torch.compile traces 1 and cannot trace ctypes
    return number if exact else ctypes.c_float(number).value


def is_uniform(grad_loss: Tensor) -> bool:
    """Return whether all losses receive the same gradient. Only a CPU tensor is read: this synchronises no device."""
    if all(size == 1 or step == 0 for size, step in zip(grad_loss.shape, grad_loss.stride(), strict=True)):
        return True
    return grad_loss.device.type == "cpu" and bool((grad_loss == grad_loss[0, 0, 0]).all())


# --- FLOP (fastkd/ops/flops.py) ---------------------------------------------------------------------------------------


def forward_flops(*arguments: Any) -> int:
    """Return the FLOP of Q Kᵀ of both networks, and of the prepared gradients H K and Hᵀ Q that are requested."""
    inputs, (for_q, for_k) = Inputs(*arguments[:INPUTS]), arguments[INPUTS + 3 : INPUTS + 5]  # shapes for tensors
    return _pairs(inputs) * 2 * (_widths(inputs) + (for_q + for_k) * inputs.student_q[3])  # type: ignore[operator]


def backward_flops(grad_loss: Shape, *arguments: Any) -> int:
    """Return the FLOP of the gradients of any row gradient; with prepared ones none, as for the sum or the mean.

    Shapes do not tell whether the row gradient is uniform. Gradients are prepared where it is expected to be.
    """
    inputs, prepared = Inputs(*arguments[:INPUTS]), arguments[INPUTS : INPUTS + 2]
    for_q, for_k = arguments[INPUTS + 5 : INPUTS + 7]
    if any(len(shape) > 1 for shape in prepared):
        return 0
    return _pairs(inputs) * 2 * (_widths(inputs) + (for_q + for_k) * inputs.student_q[3])  # type: ignore[operator]


def _pairs(shapes: Any) -> int:
    """Return the number of elements of a network's maps; causal ones are counted in full, as torch does."""
    batch, heads, queries, _ = shapes.student_q
    return batch * heads * queries * shapes.student_k[2]


def _widths(shapes: Any) -> int:
    return shapes.student_q[3] + shapes.teacher_q[3]
