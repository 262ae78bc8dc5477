"""Call the C++ kernel of ``attention_kl`` with addresses and strides: one build serves every torch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.ops.attention_kl.plan import Inputs, Options, arithmetic_dtype, is_uniform
from fastkd.ops.launch import allocate_workspace, dtype_name, launch_on, native, workspace_limit
from fastkd.ops.registration import number_of


def forward(
    inputs: Inputs, options: Options, loss: Tensor, prepared_q: Tensor, prepared_k: Tensor, backend: str
) -> None:
    """Fill ``loss`` and the prepared gradients that are not empty."""
    row_gradient = (ctypes.c_double if loss.dtype == torch.float64 else ctypes.c_float)(options.row_gradient)
    per_row = (ctypes.addressof(row_gradient), (0, 0, 0))
    _run(inputs, options, per_row, loss, (prepared_q, prepared_k), backend)


def backward(
    inputs: Inputs,
    options: Options,
    prepared: Sequence[Tensor],
    grad_loss: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    backend: str,
) -> None:
    """Fill the gradients that are not empty, from the prepared ones if all losses receive the same gradient."""
    grads = (grad_q, grad_k)
    if all(x.shape == grad.shape for x, grad in zip(prepared, grads, strict=True)) and is_uniform(grad_loss):
        factor = grad_loss[0, 0, 0] / options.row_gradient
        for x, grad in zip(prepared, grads, strict=True):
            torch.mul(x, factor, out=grad)
        return
    dtype = _storage_dtype(inputs)
    # Gradients in the dtype that the kernel reads, which is wider than the input's if dtypes are mixed.
    results = [g if g.dtype == dtype else torch.empty_like(g, dtype=dtype) for g in grads]
    _run(inputs, options, (grad_loss.data_ptr(), grad_loss.stride()), None, results, backend)
    for result, grad in zip(results, grads, strict=True):
        if result is not grad:
            grad.copy_(result)


def _storage_dtype(inputs: Inputs) -> torch.dtype:
    """Return the dtype in which the kernel reads queries and keys: their common one, fp64 if a bias is."""
    if arithmetic_dtype(inputs) == torch.float64:
        return torch.float64
    q, k, *teacher = inputs.features
    dtype = torch.promote_types(q.dtype, k.dtype)
    for x in teacher:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def _run(
    inputs: Inputs,
    options: Options,
    per_row: tuple[int, Sequence[int]],
    loss: Tensor | None,
    grads: Sequence[Tensor],
    backend: str,
) -> None:
    """Fill ``loss`` and the gradients that are not empty; ``per_row`` is the address and strides of the losses'."""
    dtype = _storage_dtype(inputs)
    q_s, k_s, q_t, k_t = (x.to(dtype) for x in inputs.features)
    # Zeros in masked rows: a product with NaN there would be NaN although the other factor is 0.
    q_s, q_t = (_zero_masked(x, inputs.query_mask) for x in (q_s, q_t))
    k_s, k_t = (_zero_masked(x, inputs.key_mask) for x in (k_s, k_t))
    scales = [x.double().contiguous() for x in (inputs.student_scale, inputs.teacher_scale)]
    biases = [_bias(x, k_s.shape[2]) for x in (inputs.student_bias, inputs.teacher_bias)]
    masks = [None if x is None else x.contiguous() for x in (inputs.key_mask, inputs.query_mask)]
    batch, heads, queries, student_width = q_s.shape
    sizes = (batch, heads, queries, k_s.shape[2], student_width, q_t.shape[3])
    needs = [bool(g.numel()) for g in grads]
    settings = (sizes, options.causal, dtype_name(dtype), number_of(options.temperature), *needs)
    with launch_on(q_s) as extra:
        limit = workspace_limit(q_s.device)
        call = native(backend).AttentionKL(*settings, extra, limit)
        workspace = allocate_workspace(call, False, q_s, limit)
        call.run(
            _network(q_s, k_s, scales[0], biases[0]),
            _network(q_t, k_t, scales[1], biases[1]),
            *(_address(x) for x in masks),
            *per_row,
            _address(loss),
            *(_address(x) for x in grads),
            loss is not None,
            workspace.data_ptr(),
        )


def _network(q: Tensor, k: Tensor, scales: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    given = (0, (0, 0, 0), "float32") if bias is None else (bias.data_ptr(), _strides(bias), dtype_name(bias.dtype))
    return (q.data_ptr(), q.stride()), (k.data_ptr(), k.stride()), scales.data_ptr(), given


def _bias(bias: Tensor | None, keys: int) -> Tensor | None:
    """Return a bias whose rows have all keys, with stride 1; the other dimensions may be broadcast."""
    if bias is None:
        return None
    bias = bias.expand(*bias.shape[:3], keys)
    return bias if bias.stride(3) == 1 else bias.contiguous()


def _strides(bias: Tensor) -> tuple[int, ...]:
    """Return the strides of a bias except the last, 0 along broadcast dimensions."""
    return tuple(0 if size == 1 else step for size, step in zip(bias.shape[:3], bias.stride()[:3], strict=True))


def _zero_masked(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows if mask is None else torch.where(mask[:, None, :, None], rows, rows.new_zeros(()))


def _address(x: Tensor | None) -> int:
    return 0 if x is None or x.numel() == 0 else x.data_ptr()
