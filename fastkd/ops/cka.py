"""Centred kernel alignment (CKA) of two batches of features, in plain torch.

With K = Z Zᵀ for the n×D features Z of a network and its centred form C(K), CKA is the cosine of C(K_S) and C(K_T) as
vectors of n² entries. The biased estimator subtracts row and column means (Kornblith et al., "Similarity of Neural
Network Representations Revisited", arXiv 1905.00414). The debiased one is U-centred: zeros on the diagonal and in all
row sums. ⟨C(K_S), C(K_T)⟩ / (n (n − 3)) is then the unbiased estimator of HSIC of Song et al., "Feature Selection via
Dependence Maximization" (JMLR 2012), and its cosine lies in [−1, 1].

Neither form changes if one vector is subtracted from all rows of Z, so their mean is subtracted: a common offset then
costs no digits. The first row is subtracted first, so that identical samples give K = 0 without rounding errors.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd.ops.collectives import exchanged, gathered, once, same_on_every_rank
from fastkd.ops.numerics import NORM_FLOOR, full_precision
from fastkd.ops.products import product
from fastkd.ops.torch_state import outside_graphs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LEAST_SAMPLES = {True: 4, False: 2}
"""Samples that the estimator needs, by ``debiased``."""

TANGENT_BELOW = {True: 0.1, False: 1e-3}
"""CKA below which −log CKA is continued by its tangent, by ``debiased``."""


def negative_log_cka(student: Tensor, teacher: Tensor, debiased: bool, group: ProcessGroup | None = None) -> Tensor:
    """Return −log CKA (1,) of features (n, D_S) and (n, D_T) of one dtype, fp32 or fp64.

    Below ``TANGENT_BELOW`` the logarithm is continued by its tangent, so that a debiased CKA ≤ 0, which unrelated
    features have half of the time, has a finite loss and a slope. Where all samples of a network are equal, CKA counts
    as 0 and has no gradient. With ``group`` the samples are those of all its processes; the result is then the same on
    every rank.

    Raises:
        ValueError: too few samples over all ranks, or widths that differ between ranks; the same on every rank.
    """
    with full_precision(student.device):
        if group is None:
            kernels = [_kernel(_shifted(x)) for x in (student, teacher)]
        else:
            kernels = list(_gathered_kernels(student, teacher, debiased, group))
        (a, a_is_0), (b, b_is_0) = (_unit(k, debiased) for k in kernels)
        # 1 − ⟨a, b⟩ for unit vectors: nothing cancels as the student approaches the teacher.
        distance = (a - b).square().sum() / 2
        distance = torch.where(a_is_0 | b_is_0, 0 * distance + 1, distance)  # NaN stays NaN
        value = _negative_log(distance, TANGENT_BELOW[debiased]).reshape(1)
        return value if group is None else same_on_every_rank(value, group)


def check_samples(count: int, debiased: bool, fix: str) -> None:
    """Raise ``ValueError`` if ``count`` samples are too few."""
    if count < LEAST_SAMPLES[debiased]:
        raise ValueError(
            f"distance: 'cka' compares the samples of a batch with each other; debiased={debiased} needs at least "
            f"{LEAST_SAMPLES[debiased]}, got {count}; {fix}"
        )


def _shifted(rows: Tensor) -> Tensor:
    """Return rows (n, D) minus their mean, which is a constant: no gradient reaches the loss through it."""
    rows = rows - rows[:1].detach()
    return rows - rows.detach().mean(0)


def _kernel(rows: Tensor) -> Tensor:
    """Return K (n, n) of rows (n, D)."""
    return product(rows, rows.T)


def _unit(kernel: Tensor, debiased: bool) -> tuple[Tensor, Tensor]:
    """Return the centred kernel (n, n) scaled to norm 1, and whether it is 0 up to rounding."""
    centred = _u_centred(kernel) if debiased else _centred(kernel)
    size = centred.detach().abs().amax()
    rounding = 8 * torch.finfo(kernel.dtype).eps * kernel.detach().abs().amax() + NORM_FLOOR**2
    is_0 = size <= rounding
    scaled = centred / torch.where(is_0, torch.ones_like(size), size)  # so that squares do not overflow
    square = scaled.square().sum()
    norm = torch.where(is_0, torch.ones_like(square), square).sqrt()
    return torch.where(is_0, torch.zeros_like(scaled), scaled / norm), is_0


def _centred(kernel: Tensor) -> Tensor:
    return kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()


def _u_centred(kernel: Tensor) -> Tensor:
    n = kernel.shape[0]
    diagonal = torch.eye(n, dtype=torch.bool, device=kernel.device)
    kernel = kernel.masked_fill(diagonal, 0.0)
    sums = kernel.sum(0)
    centred = kernel - (sums + sums[:, None]) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
    return centred.masked_fill(diagonal, 0.0)


def _negative_log(distance: Tensor, tangent_below: float) -> Tensor:
    """Return −log(1 − distance), continued by its tangent where 1 − distance is below a bound."""
    inside = distance <= 1 - tangent_below
    logarithm = -torch.log1p(-torch.where(inside, distance, torch.zeros_like(distance)))
    return torch.where(inside, logarithm, 1 - math.log(tangent_below) - (1 - distance) / tangent_below)


@outside_graphs("it reads the batch sizes of other processes; call the loss outside torch.compile")
def _gathered_kernels(student: Tensor, teacher: Tensor, debiased: bool, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return K_S and K_T over the samples of all ranks."""
    everyone = exchanged([*student.shape, teacher.shape[1]], student.device, group)  # n, D_S, D_T of each rank
    counts, *widths = zip(*everyone, strict=True)
    for side, values in zip(("student", "teacher"), widths, strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"group: the sizes C·N of the {side}'s samples differ between ranks, {list(values)}; give all the same"
            )
    check_samples(sum(counts), debiased, "use more samples per step, or debiased=False")
    result: list[Tensor] = [_GatheredKernel.apply(x, counts, group) for x in (student, teacher)]
    return result[0], result[1]


class _GatheredKernel(torch.autograd.Function):
    """K (Σ n, Σ n) of the rows (n, D) of all ranks.

    Every rank has all rows, so the gradient (G + Gᵀ) Z by its own needs no communication.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: tuple[int, ...], group: ProcessGroup) -> Tensor:
        everyone = _shifted(gathered(rows, counts, group))
        ctx.save_for_backward(everyone, rows)
        rank = dist.get_rank(group)
        ctx.own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        return _kernel(everyone)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        everyone, rows = ctx.saved_tensors
        with torch.no_grad(), full_precision(grad.device):
            d = product((grad + grad.T)[ctx.own], everyone)
        return once(d, rows), None, None
