"""``softmax_kl`` in plain torch: the KL divergence between the softmaxes of matching rows of two arrays."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.ops.numerics import compute_dtype


def softmax_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float | Tensor,
    dim: int = -1,
    teacher_temperature: float | Tensor | None = None,
) -> Tensor:
    """Return KL(softmax(teacher/τ) ‖ softmax(student/τ)) over ``dim``, without the factor τ².

    Args:
        student: logits, any shape and floating dtype.
        teacher: logits of the same shape.
        temperature: τ > 0.
        dim: the dimension of the softmax.
        teacher_temperature: the teacher's τ; None: that of the student.

    Returns:
        The divergences, of the shape of ``student`` without ``dim``, in fp32 (fp64 if an input is fp64). Where the
        teacher's probability is 0 the summand is 0 (0·log 0 = 0), also where both logits are −inf; a student
        probability of 0 with a positive teacher probability gives inf. NaN, +inf, and a row of only −inf give NaN.
    """
    dtype = compute_dtype(student, teacher)
    log_p_s = torch.log_softmax(tempered(student.to(dtype), temperature), dim)
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    log_p_t = torch.log_softmax(tempered(teacher.to(dtype), teacher_temperature), dim)
    return kl(log_p_s, log_p_t, dim)


def tempered(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Return ``logits / temperature``; logits that are not finite add nothing to the gradient of the temperature.

    A logit of −inf has probability 0 at every temperature, but the derivative of −inf/τ times 0 is NaN.
    """
    if not isinstance(temperature, Tensor):
        return logits / temperature
    finite = logits.isfinite()
    return torch.where(
        finite,
        torch.where(finite, logits, torch.zeros_like(logits)) / temperature,
        logits / temperature.detach(),
    )


def kl(log_p_s: Tensor, log_p_t: Tensor, dim: int = -1) -> Tensor:
    """Return Σ p_t (log p_t − log p_s) over ``dim``; a summand is 0 where p_t is 0."""
    p_t = log_p_t.exp()
    # Mask the difference, not the product: 0·(−inf + inf) is NaN, and so would be its gradient.
    ratio = torch.where(p_t == 0, torch.zeros_like(p_t), log_p_t - log_p_s)
    return (p_t * ratio).sum(dim)
