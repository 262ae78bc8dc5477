"""``relation`` over the batches of a group of processes, in plain torch.

Channels: the C×C Gram matrices of all ranks are added. Pixels: K×K Gram matrices are added for "mse" (`reference`), and
the rows of all ranks gathered for the other distances, where every rank compares its own rows with all rows. The
derivatives follow the convention of ``fastkd.ops.collectives``. ``group_costs.py`` counts what is communicated and
computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd.ops.collectives import (
    exchanged,
    gathered,
    once,
    plain_total,
    same_on_every_rank,
    scattered_total,
    share_of_gradient,
)
from fastkd.ops.launch import workspace_limit
from fastkd.ops.numerics import NORM_FLOOR, compute_dtype, computes_fp64, full_precision
from fastkd.ops.products import product
from fastkd.ops.relation.reference import row_distances, scaled_rows
from fastkd.ops.torch_state import outside_graphs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# --- channels ---------------------------------------------------------------------------------------------------------


class Means(NamedTuple):
    """Means over the pixels of all ranks, and the numbers of columns of the C×(B·N) matrices."""

    student_mean: Tensor  # (C,) in fp64: see `_columns`
    teacher_mean: Tensor  # (C,)
    strength: Tensor  # (C,) mean of |F_T|
    student_columns: Tensor  # (1,)
    teacher_columns: Tensor  # (1,)


def channel_means(
    student: Tensor, teacher: Tensor, group: ProcessGroup, masks: tuple[Tensor, Tensor] | None = None
) -> Means:
    """Return means over all pixels of (B, C, N) features of all ranks, without gradient, by one all-reduce.

    With ``masks``, (B, N) of student and teacher, over the valid pixels; the others hold 0.
    """
    dtype, channels, device = compute_dtype(student, teacher), student.shape[1], student.device
    wide = torch.float64 if computes_fp64(device) else dtype
    with torch.no_grad():
        student, teacher = student.detach(), teacher.detach()
        sums = [x.sum((0, 2), dtype=wide) for x in (student, teacher, teacher.abs())]
        if masks is None:
            columns = [torch.full((1,), x.shape[0] * x.shape[2], dtype=wide, device=device) for x in (student, teacher)]
        else:
            columns = [mask.sum(dtype=wide).reshape(1) for mask in masks]
        parts = plain_total(torch.cat([*sums, *columns]), group).split([channels, channels, channels, 1, 1])
        s, t, strength, n_s, n_t = parts
        return Means(s / n_s, t / n_t, (strength / n_t).to(dtype), n_s.to(dtype), n_t.to(dtype))


def channel_relation(
    student: Tensor,
    teacher: Tensor,
    group: ProcessGroup,
    *,
    similarity: str,
    distance: str,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor | None,
    negate: bool,
    centered: bool,
    pooled: Means | None,
    masks: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the distances (1, C), equal on every rank, between the C×C relations over the pixels of all ranks.

    With X the C×n matrix of all columns, X_r those of rank r and G = X Xᵀ = Σ_r X_r X_rᵀ, one all-reduce per network,
    E_ij = G_ij / √(G_ii G_jj) for "cosine", G/n for "mean", G for "dot". For H = ∂L/∂G + (∂L/∂G)ᵀ the gradient by X_r
    is H X_r, computed by rank r from its own features and G. Centring adds no term: the gradient by the mean is
    −H Σ_j x_j, and centred columns sum to 0.

    Args:
        student: (B, C, N_S) features of this rank; B may differ between ranks, and may be 0.
        teacher: (B, C, N_T).
        group: two or more processes.
        similarity, distance, temperature, negate: as in `reference.relation`.
        teacher_temperature: the teacher's τ; None: that of the student.
        centered: subtract each channel's mean over the pixels of all ranks.
        pooled: `channel_means`, needed if ``centered`` and by the similarity "mean".
        masks: the valid pixels (B, N) of student and teacher; the others hold 0.
    """
    dtype = compute_dtype(student, teacher)
    with full_precision(student.device):
        means = (pooled.student_mean, pooled.teacher_mean) if centered and pooled is not None else (None, None)
        counts = (pooled.student_columns, pooled.teacher_columns) if pooled is not None else (None, None)
        tau_s, tau_t = (
            share_of_gradient(tau, group) if isinstance(tau, Tensor) and tau.requires_grad else tau
            for tau in (temperature, teacher_temperature)
        )
        e_s, e_t = (
            _similarities(_PooledGram.apply(x, mean, mask, dtype, similarity == "cosine", group), similarity, count)
            for x, mean, mask, count in zip((student, teacher), means, masks or (None, None), counts, strict=True)
        )  # (C, C)
        assert tau_s is not None
        rows = row_distances(e_s, e_t, distance, tau_s, negate, tau_t)
        return same_on_every_rank(rows.unsqueeze(0), group)


def _similarities(gram: Tensor, similarity: str, columns: Tensor | None) -> Tensor:
    """Return the similarities (C, C) of rows with these products; `normalise_rows` has the rule for short rows."""
    if similarity == "cosine":
        square = gram.diagonal()
        small = square <= NORM_FLOOR**2
        norm = torch.where(small, torch.full_like(square, NORM_FLOOR), torch.where(small, 1.0, square).sqrt())
        return gram / (norm[:, None] * norm)
    if similarity == "mean":
        assert columns is not None
        return gram / columns
    return gram


class _PooledGram(torch.autograd.Function):
    """Σ_r X_r X_rᵀ (C, C) of features (B, C, N), from which a mean (C,) is subtracted; the gradient is H X_r.

    With ``clamped``, a row whose norm over all ranks is below `NORM_FLOOR` gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        mean: Tensor | None,
        mask: Tensor | None,
        dtype: torch.dtype,
        clamped: bool,
        group: ProcessGroup,
    ) -> Tensor:
        rows = _columns(features, mean, mask, dtype)
        gram = plain_total(product(rows, rows.T), group)
        ctx.save_for_backward(features, mean, mask, gram.diagonal().clone() if clamped else None)
        ctx.dtype = dtype
        return gram

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, mean, mask, square = ctx.saved_tensors
        with torch.no_grad(), full_precision(grad.device):
            d = product(grad + grad.T, _columns(features, mean, mask, ctx.dtype))  # (C, B·N)
            if square is not None:
                d = torch.where((square <= NORM_FLOOR**2)[:, None], 0.0, d)
            batch, channels, pixels = features.shape
            d = d.view(channels, batch, pixels).transpose(0, 1).to(features.dtype)
        return once(d, features), None, None, None, None, None


def _columns(features: Tensor, mean: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return features (B, C, N) as (C, B·N), minus each row's mean; 0 at masked pixels, which hold 0.

    The mean is subtracted in two parts. Rounded to fp32 it would leave rows whose sum is not 0, and the gradient by the
    mean would be missing: for features far from 0 several times the error of the plain formula.
    """
    rows = features.to(dtype).transpose(0, 1).flatten(1)
    if mean is None:
        return rows
    nearest = mean.to(dtype)
    rows = (rows - nearest[:, None]).sub_((mean - nearest).to(dtype)[:, None])
    return rows if mask is None else torch.where(mask.flatten(), rows, torch.zeros_like(rows))


# --- pixels -----------------------------------------------------------------------------------------------------------


@outside_graphs("it reads the batch sizes of other processes; call the loss outside torch.compile")
def gathered_relation(
    student: Tensor,
    teacher: Tensor,
    group: ProcessGroup,
    *,
    similarity: str,
    distance: str,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor | None = None,
) -> Tensor:
    """Return the distances (B, R) of this rank's rows to the samples of all ranks: the mean over the samples.

    Every rank gathers the rows of all, computes tiles of E_rq = X_r X_qᵀ for its own rows, and discards them. For
    G_rq = ∂(Σ ℓ)/∂E_rq, the gradient by X_r is Σ_q (G_rq X_q + G_qrᵀ X_q): rank r computes the first term, and the
    second arrives by a reduce-scatter of the G_qrᵀ X_q of all ranks q. The number of samples may differ between ranks.

    Raises:
        ValueError: numbers of rows or widths differ between ranks; the same on every rank.
    """
    result: Tensor = _Gathered.apply(student, teacher, temperature, teacher_temperature, similarity, distance, group)
    return result


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        temperature: float | Tensor,
        teacher_temperature: float | Tensor | None,
        similarity: str,
        distance: str,
        group: ProcessGroup,
    ) -> Tensor:
        ctx.counts = _batch_sizes(student, teacher, group)
        ctx.similarity, ctx.distance, ctx.group = similarity, distance, group
        ctx.dtype = compute_dtype(student, teacher)
        every_s, every_t = (gathered(x, ctx.counts, group) for x in (student, teacher))  # (Σ B, R, K)
        taus = (temperature, teacher_temperature)
        ctx.temperatures = [None if isinstance(tau, Tensor) else (tau,) for tau in taus]  # None: a saved tensor
        ctx.save_for_backward(student, every_s, every_t, *(tau for tau in taus if isinstance(tau, Tensor)))
        rows = torch.zeros(student.shape[:2], dtype=ctx.dtype, device=student.device).flatten()
        with full_precision(student.device):
            for own, _, x, y in _tiles(ctx, every_s, every_t):
                rows[own] += row_distances(
                    _product(*x), _product(*y), distance, temperature, False, teacher_temperature
                ).sum(-1)
        return (rows / sum(ctx.counts)).view(student.shape[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, every_s, every_t, *saved = ctx.saved_tensors
        with full_precision(student.device):
            learned = [tau.detach().requires_grad_() for tau in saved]
            d_learned = [torch.zeros_like(tau) for tau in saved]
            in_order = iter(learned)
            tau_s, tau_t = (next(in_order) if number is None else number[0] for number in ctx.temperatures)
            d_every = torch.zeros(every_s.shape, dtype=ctx.dtype, device=student.device).flatten(0, 1)  # (Σ B·R, K)
            d_own = d_every.new_zeros((student.shape[0] * student.shape[1], student.shape[2]))  # (B·R, K)
            weight = grad.detach().flatten()[:, None] / sum(ctx.counts)  # (B·R, 1)
            for own, columns, x, y in _tiles(ctx, every_s, every_t):
                with torch.enable_grad():
                    e = _product(*x).requires_grad_()  # (rows, samples, R)
                    loss = row_distances(e, _product(*y), ctx.distance, tau_s, False, tau_t)  # (rows, samples)
                    g = weight[own].expand_as(loss)
                    d_e, *rest = torch.autograd.grad(loss, [e, *learned], g, allow_unused=True)
                for total_of, part in zip(d_learned, rest, strict=True):
                    if part is not None:  # distances other than "kl" have no temperature
                        total_of += part
                d_e = d_e.flatten(1)  # (rows, samples·R)
                d_own[own] += product(d_e, x[1].flatten(0, 1))
                d_every[columns] += product(d_e.T, x[0])
            d_scaled = scattered_total(d_every.view(every_s.shape), ctx.counts, ctx.group) + d_own.view(student.shape)
            with torch.enable_grad():
                own_rows = student.detach().to(ctx.dtype).requires_grad_()
                scaled = scaled_rows(own_rows, ctx.similarity)
            (d_student,) = torch.autograd.grad(scaled, own_rows, d_scaled)
        in_order = iter(d_learned)
        d_temperatures = (next(in_order) if number is None else None for number in ctx.temperatures)
        return once(d_student.to(student.dtype), student), None, *d_temperatures, None, None, None


def _batch_sizes(student: Tensor, teacher: Tensor, group: ProcessGroup) -> list[int]:
    """Return the batch sizes of all ranks; raise on every rank if the other sizes differ."""
    everyone = exchanged([*student.shape, teacher.shape[2]], student.device, group)  # B, R, K_S, K_T of each rank
    for name, *values in zip(
        ("pixels", "student channels", "teacher channels"), *(e[1:] for e in everyone), strict=True
    ):
        if len(set(values)) > 1:
            raise ValueError(f"group: the numbers of {name} differ between ranks, {values}; give all the same")
    return [sizes[0] for sizes in everyone]


def _tiles(
    ctx: Any, every_s: Tensor, every_t: Tensor
) -> Iterator[tuple[slice, slice, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Yield slices of own rows and of all rows, and per network their scaled rows (r, K) and (samples, R, K).

    A tile and the temporaries of its distances fit the workspace.
    """
    samples, pixels = every_s.shape[:2]
    first = sum(ctx.counts[: dist.get_rank(ctx.group)])
    scale = lambda x: scaled_rows(x.to(ctx.dtype), ctx.similarity)
    own_s, own_t = (
        scale(x[first : first + ctx.counts[dist.get_rank(ctx.group)]]).flatten(0, 1) for x in (every_s, every_t)
    )
    rows, width = tile_shape(len(own_s), samples, pixels, workspace_limit(every_s.device) // own_s.element_size())
    for start in range(0, samples, width):
        stop = min(start + width, samples)
        others_s, others_t = scale(every_s[start:stop]), scale(every_t[start:stop])  # (samples, R, K)
        columns = slice(start * pixels, stop * pixels)
        for top in range(0, len(own_s), rows):
            own = slice(top, min(top + rows, len(own_s)))
            yield own, columns, (own_s[own], others_s), (own_t[own], others_t)


TILE_COPIES = 12
"""Tensors of a tile's size that exist at once: similarities, logarithms, probabilities, products and gradients."""


def tile_shape(own: int, samples: int, pixels: int, elements: int) -> tuple[int, int]:
    """Return own rows and samples of a tile whose temporaries have at most ``elements`` elements, at least one each."""
    rows = max(1, min(own, elements // (TILE_COPIES * pixels)))
    return rows, max(1, min(samples, elements // (TILE_COPIES * pixels * rows)))


def _product(own: Tensor, others: Tensor) -> Tensor:
    """Return the similarities (r, samples, R) of rows (r, K) and (samples, R, K)."""
    return product(own, others.flatten(0, 1).T).view(len(own), *others.shape[:2])
