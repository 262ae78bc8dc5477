"""Plain PyTorch formulas of the losses ("eager"), the same losses from fastkd, and exact gradients in float64.

Each formula is the code a user would write: ``F.log_softmax`` and ``F.kl_div(log_target=True)``, and for relations
``F.normalize`` and the full R×R matrices. It takes the inputs of a workload, in their dtype, and returns a scalar.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workloads import Workload

Loss = Callable[..., Tensor]

CWD_TEMPERATURE = 4.0
RELATION_TEMPERATURE = 0.1
TERMS = {"pixel_to_word": 1.0, "word_to_pixel": 1.0, "pixel_pixel": 1.0, "word_word": 1.0}
BLOCK = 1024  # rows of a relation matrix that the exact gradient computes at a time


def kl(student: Tensor, teacher: Tensor, dim: int = -1) -> Tensor:
    """Return KL(softmax(teacher) ‖ softmax(student)) along ``dim``, summed over everything else."""
    return F.kl_div(F.log_softmax(student, dim), F.log_softmax(teacher, dim), log_target=True, reduction="sum")


# ---- channel_distribution_kd ---------------------------------------------------------------------------------------


def channel_distribution(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the KL between the networks' softmaxes over the pixels of each channel."""
    batch, channels = student.shape[:2]  # (B, C, H, W)
    loss = kl(student.flatten(2) / CWD_TEMPERATURE, teacher.flatten(2) / CWD_TEMPERATURE)
    return loss * CWD_TEMPERATURE**2 / (batch * channels)


# ---- channel_kd and pixel_relation_kd, cosine ----------------------------------------------------------------------


def channel_rows(x: Tensor) -> Tensor:
    return x.flatten(2)  # (B, C, HW)


def pixel_rows(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # (B, HW, C)


def relation(distance: str, rows: Callable[[Tensor], Tensor]) -> Loss:
    """Return the distance between the cosine self-relations of two networks, with both R×R matrices in memory."""

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        s, t = F.normalize(rows(student), dim=-1), F.normalize(rows(teacher), dim=-1)
        e_s, e_t = s @ s.transpose(1, 2), t @ t.transpose(1, 2)  # (B, R, R)
        if distance == "mse":
            return F.mse_loss(e_s, e_t)
        batch, count, _ = e_s.shape
        return kl(e_s / RELATION_TEMPERATURE, e_t / RELATION_TEMPERATURE) / (batch * count)

    return loss


def exact_relation(distance: str, rows: Callable[[Tensor], Tensor], student: Tensor, teacher: Tensor) -> Tensor:
    """Return the gradient of :func:`relation` for float64 inputs, computed in blocks of rows."""
    s = F.normalize(rows(student), dim=-1)
    leaf = s.detach().requires_grad_()
    t = F.normalize(rows(teacher), dim=-1)
    grad = torch.zeros_like(leaf)
    batch, count, _ = s.shape
    for b in range(batch):
        for begin in range(0, count, BLOCK):
            block = slice(begin, begin + BLOCK)
            e_s, e_t = leaf[b, block] @ leaf[b].T, t[b, block] @ t[b].T  # (BLOCK, R)
            if distance == "mse":
                part = F.mse_loss(e_s, e_t, reduction="sum") / (batch * count * count)
            else:
                part = kl(e_s / RELATION_TEMPERATURE, e_t / RELATION_TEMPERATURE) / (batch * count)
            grad += torch.autograd.grad(part, leaf)[0]
    return torch.autograd.grad(s, student, grad)[0]


# ---- cross_modal_kd, all four terms --------------------------------------------------------------------------------


def attention(pixels: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pixel–word logits and their softmax over words, both (B, N, T)."""
    if pixels.dim() == 4:
        pixels = pixels.flatten(2).transpose(1, 2)
    logits = pixels @ words.transpose(1, 2) / pixels.shape[-1] ** 0.5
    return logits, torch.softmax(logits, -1)


def _first_order(m_s: Tensor, m_t: Tensor) -> Tensor:
    """Return pixel_to_word + word_to_pixel of logits (B, N, T)."""
    batch, pixels, words = m_s.shape
    return kl(m_s, m_t, 2) / (batch * pixels) + kl(m_s, m_t, 1) / (batch * words)


def cross_modal(v_s: Tensor, l_s: Tensor, v_t: Tensor, l_t: Tensor) -> Tensor:
    """Compute the second-order terms from T×T products of a, b and d = a − b, as derived in docs/maths.md."""
    (m_s, a), (m_t, b) = attention(v_s, l_s), attention(v_t, l_t)
    d = a - b
    a_t, b_t, d_t = (x.transpose(1, 2) for x in (a, b, d))
    d_a, b_d, d_d = d_t @ a, b_t @ d, d_t @ d  # (B, T, T)
    pixel_pixel = ((a_t @ a + b_t @ b) * d_d).sum((1, 2)) + 2 * (d_a * b_d).sum((1, 2))
    word_word = (d_a + b_d).square().sum((1, 2))
    return _first_order(m_s, m_t) + ((pixel_pixel + word_word) / a.shape[1] ** 2).mean()


def cross_modal_nn(v_s: Tensor, l_s: Tensor, v_t: Tensor, l_t: Tensor) -> Tensor:
    """Compute the second-order terms by their definition, with N×N matrices."""
    (m_s, a), (m_t, b) = attention(v_s, l_s), attention(v_t, l_t)
    pixel_pixel = (a @ a.transpose(1, 2) - b @ b.transpose(1, 2)).square().sum((1, 2))
    word_word = (a.transpose(1, 2) @ a - b.transpose(1, 2) @ b).square().sum((1, 2))
    return _first_order(m_s, m_t) + ((pixel_pixel + word_word) / a.shape[1] ** 2).mean()


# ---- attention_kd --------------------------------------------------------------------------------------------------


def attention_maps(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
    """Return the mean KL between the networks' attention maps, with both (B, heads, N, M) maps in memory."""
    e_s, e_t = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5 for q, k in ((q_s, k_s), (q_t, k_t)))
    return kl(e_s, e_t) / e_s[..., 0].numel()


def exact_attention_maps(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the gradients of :func:`attention_maps` for float64 inputs, computed one head at a time."""
    batch, heads = inputs[0].shape[:2]
    grads = [torch.zeros_like(x) for x in inputs[:2]]
    for b in range(batch):
        for h in range(heads):
            head = tuple(x.detach()[b, h][None, None].requires_grad_(x.requires_grad) for x in inputs)
            for grad, part in zip(grads, gradients(attention_maps, head), strict=True):
                grad[b, h] = part[0, 0] / (batch * heads)
    return grads


# ---- by workload ---------------------------------------------------------------------------------------------------

ROWS = {"channel_kd": channel_rows, "pixel_relation_kd": pixel_rows}


def formula(workload: Workload, nn: bool = False) -> Loss:
    """Return the plain formula of a workload; with ``nn``, the one of ``cross_modal_kd`` with N×N matrices."""
    if workload.loss in ROWS:
        return relation(workload.distance, ROWS[workload.loss])
    if workload.loss == "cross_modal_kd":
        return cross_modal_nn if nn else cross_modal
    if workload.loss == "attention_kd":
        return attention_maps
    return channel_distribution


def fastkd(workload: Workload, backend: str) -> Loss:
    """Return fastkd's loss with the options that match the formula."""
    from fastkd import losses

    if workload.loss == "cross_modal_kd":
        return lambda *inputs: losses.cross_modal_kd(*inputs, terms=TERMS, backend=backend)
    if workload.loss == "attention_kd":
        return lambda *inputs: losses.attention_kd(*inputs, backend=backend)
    if workload.loss == "channel_distribution_kd":
        return lambda s, t: losses.channel_distribution_kd(s, t, temperature=CWD_TEMPERATURE, backend=backend)
    function = getattr(losses, workload.loss)
    return lambda s, t: function(
        s, t, similarity="cosine", distance=workload.distance, temperature=RELATION_TEMPERATURE, backend=backend
    )


def gradients(loss: Loss, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the gradients with respect to the inputs that require one (the student's)."""
    return list(torch.autograd.grad(loss(*inputs), [x for x in inputs if x.requires_grad]))


def exact_gradients(workload: Workload, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the gradients of the plain formula in float64."""
    doubles = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in inputs)
    if workload.loss in ROWS:
        return [exact_relation(workload.distance, ROWS[workload.loss], *doubles)]
    if workload.loss == "attention_kd":
        return exact_attention_maps(doubles)
    return gradients(formula(workload), doubles)
