"""Each loss as users write it in plain torch, in the inputs' dtype, and as fastkd's function.

A formula takes the inputs of a work (see workloads.py) and returns the scalar loss. ``exact`` is the same in double
precision, row block by row block where the matrices would not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

if TYPE_CHECKING:
    from benchmarks.workloads import Work

Loss = Callable[..., Tensor]

CWD_TEMPERATURE = 4.0
RELATION_TEMPERATURE = 0.1
TERMS = {"pixel_to_word": 1.0, "word_to_pixel": 1.0, "pixel_pixel": 1.0, "word_word": 1.0}
BLOCK = 1024  # rows of a relation that the exact loss takes at a time


def kl_rows(student: Tensor, teacher: Tensor, temperature: float, dim: int = -1) -> Tensor:
    s, t = student / temperature, teacher / temperature
    return (torch.softmax(t, dim) * (torch.log_softmax(t, dim) - torch.log_softmax(s, dim))).sum(dim)


# ---- channel_distribution_kd ---------------------------------------------------------------------------------------


def channel_distribution(student: Tensor, teacher: Tensor) -> Tensor:
    return kl_rows(student.flatten(2), teacher.flatten(2), CWD_TEMPERATURE).mean() * CWD_TEMPERATURE**2


# ---- channel_kd and pixel_relation_kd, cosine ----------------------------------------------------------------------


def channel_rows(x: Tensor) -> Tensor:
    return x.flatten(2)


def pixel_rows(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def relation(distance: str, rows: Callable[[Tensor], Tensor]) -> Loss:
    """Both networks' R×R matrices held, as users do."""

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        s, t = normalize(rows(student), dim=-1), normalize(rows(teacher), dim=-1)
        e_s, e_t = s @ s.transpose(1, 2), t @ t.transpose(1, 2)
        if distance == "mse":
            return (e_s - e_t).square().mean()
        return kl_rows(e_s, e_t, RELATION_TEMPERATURE).mean()

    return loss


def exact_relation(distance: str, rows: Callable[[Tensor], Tensor], student: Tensor, teacher: Tensor) -> Tensor:
    """The gradient of :func:`relation` in double, from blocks of rows."""
    s = normalize(rows(student), dim=-1)
    held = s.detach().requires_grad_()
    t = normalize(rows(teacher), dim=-1)
    grad = torch.zeros_like(held)
    batch, count, _ = s.shape
    for b in range(batch):
        for begin in range(0, count, BLOCK):
            block = slice(begin, begin + BLOCK)
            e_s, e_t = held[b, block] @ held[b].T, t[b, block] @ t[b].T
            if distance == "mse":
                part = (e_s - e_t).square().sum() / (batch * count * count)
            else:
                part = kl_rows(e_s, e_t, RELATION_TEMPERATURE).sum() / (batch * count)
            grad += torch.autograd.grad(part, held)[0]
    return torch.autograd.grad(s, student, grad)[0]


# ---- cross_modal_kd, all four terms --------------------------------------------------------------------------------


def attention(pixels: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    if pixels.dim() == 4:
        pixels = pixels.flatten(2).transpose(1, 2)
    logits = pixels @ words.transpose(1, 2) / pixels.shape[-1] ** 0.5
    return logits, torch.softmax(logits, -1)


def _first_order(m_s: Tensor, m_t: Tensor) -> Tensor:
    return kl_rows(m_s, m_t, 1.0, 2).mean() + kl_rows(m_s, m_t, 1.0, 1).mean()


def cross_modal(v_s: Tensor, l_s: Tensor, v_t: Tensor, l_t: Tensor) -> Tensor:
    """The second order through T×T matrices of a, b and d = a − b, as docs/maths.md has it."""
    (m_s, a), (m_t, b) = attention(v_s, l_s), attention(v_t, l_t)
    d = a - b
    a_t, b_t, d_t = (x.transpose(1, 2) for x in (a, b, d))
    d_a, b_d, d_d = d_t @ a, b_t @ d, d_t @ d
    pixel_pixel = ((a_t @ a + b_t @ b) * d_d).sum((1, 2)) + 2 * (d_a * b_d).sum((1, 2))
    word_word = (d_a + b_d).square().sum((1, 2))
    return _first_order(m_s, m_t) + ((pixel_pixel + word_word) / a.shape[1] ** 2).mean()


def cross_modal_nn(v_s: Tensor, l_s: Tensor, v_t: Tensor, l_t: Tensor) -> Tensor:
    """The second order as it is defined, with N×N matrices."""
    (m_s, a), (m_t, b) = attention(v_s, l_s), attention(v_t, l_t)
    pixel_pixel = (a @ a.transpose(1, 2) - b @ b.transpose(1, 2)).square().sum((1, 2))
    word_word = (a.transpose(1, 2) @ a - b.transpose(1, 2) @ b).square().sum((1, 2))
    return _first_order(m_s, m_t) + ((pixel_pixel + word_word) / a.shape[1] ** 2).mean()


# ---- by name -------------------------------------------------------------------------------------------------------

ROWS = {"channel_kd": channel_rows, "pixel_relation_kd": pixel_rows}


def formula(work: Work, nn: bool = False) -> Loss:
    """The plain formula of a work; ``nn``: with the N×N matrices where there is a cheaper algebra."""
    if work.loss in ROWS:
        return relation(work.distance, ROWS[work.loss])
    if work.loss == "cross_modal_kd":
        return cross_modal_nn if nn else cross_modal
    return channel_distribution


def fastkd(work: Work, backend: str) -> Loss:
    """fastkd's function with the same options."""
    from fastkd import losses

    if work.loss == "cross_modal_kd":
        return lambda *inputs: losses.cross_modal_kd(*inputs, terms=TERMS, backend=backend)
    if work.loss == "channel_distribution_kd":
        return lambda s, t: losses.channel_distribution_kd(s, t, temperature=CWD_TEMPERATURE, backend=backend)
    function = getattr(losses, work.loss)
    return lambda s, t: function(
        s, t, similarity="cosine", distance=work.distance, temperature=RELATION_TEMPERATURE, backend=backend
    )


def gradients(loss: Loss, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The gradients with respect to those inputs that require one: the student's."""
    return list(torch.autograd.grad(loss(*inputs), [x for x in inputs if x.requires_grad]))


def exact_gradients(work: Work, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The same of the plain formula in double precision."""
    doubles = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in inputs)
    if work.loss in ROWS:
        return [exact_relation(work.distance, ROWS[work.loss], *doubles)]
    return gradients(formula(work), doubles)
