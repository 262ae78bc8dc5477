"""``attention_kl`` in plain torch, with both attention maps in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.ops.attention_kl.plan import Inputs, arithmetic_dtype
from fastkd.ops.numerics import full_precision
from fastkd.ops.products import product
from fastkd.ops.softmax_kl.reference import kl, tempered


def attention_kl(inputs: Inputs, temperature: float | Tensor, causal: bool) -> Tensor:
    """Return (B, H, N), KL(softmax(E_T/τ) ‖ softmax(E_S/τ)) of every query over its valid keys.

    E = scale · Q Kᵀ + bias per network. The values of masked queries and keys, even NaN, affect neither loss nor
    gradient; a masked query's loss is 0. A query without a valid key gives NaN.
    """
    dtype = arithmetic_dtype(inputs)
    q_s, k_s, q_t, k_t = (x.to(dtype) for x in inputs.features)
    valid = _valid_pairs(inputs, causal)
    with full_precision(q_s.device):
        e_s = _logits(q_s, k_s, inputs.student_scale, inputs.student_bias, inputs)
        e_t = _logits(q_t, k_t, inputs.teacher_scale, inputs.teacher_bias, inputs)
    if valid is not None:
        e_s, e_t = (torch.where(valid, e, torch.full_like(e, -torch.inf)) for e in (e_s, e_t))
    if inputs.query_mask is not None:  # a masked query's row could be all −inf, whose gradient is NaN
        row = inputs.query_mask[:, None, :, None]
        e_s, e_t = (torch.where(row, e, torch.zeros_like(e)) for e in (e_s, e_t))
    log_p_s, log_p_t = (torch.log_softmax(tempered(e, temperature), -1) for e in (e_s, e_t))
    rows = kl(log_p_s, log_p_t)  # (B, H, N)
    return rows if inputs.query_mask is None else torch.where(row[..., 0], rows, torch.zeros_like(rows))


def _logits(q: Tensor, k: Tensor, scale: Tensor, bias: Tensor | None, inputs: Inputs) -> Tensor:
    """Return E (B, H, N, M). Masked rows are set to 0 first: NaN in them would reach the other operand's gradient."""
    if inputs.query_mask is not None:
        q = torch.where(inputs.query_mask[:, None, :, None], q, torch.zeros_like(q))
    if inputs.key_mask is not None:
        k = torch.where(inputs.key_mask[:, None, :, None], k, torch.zeros_like(k))
    e = product(q, k.mT) * scale.to(q.dtype)[:, None, None]
    return e if bias is None else e + bias.to(q.dtype)


def _valid_pairs(inputs: Inputs, causal: bool) -> Tensor | None:
    """Return which keys each query may attend to, bool, broadcastable to (B, H, N, M); None if all."""
    valid = None if inputs.key_mask is None else inputs.key_mask[:, None, None, :]
    if causal:
        n, m = inputs.student_q.shape[2], inputs.student_k.shape[2]
        device = inputs.student_q.device
        below = torch.arange(m, device=device) <= torch.arange(n, device=device)[:, None] + (m - n)  # (N, M)
        valid = below if valid is None else valid & below
    return valid
