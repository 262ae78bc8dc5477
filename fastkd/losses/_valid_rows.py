"""Rows of pixels whose relation, computed by operators without masks, is that of the valid pixels alone.

Masked rows hold 0, so their similarities are 0. That is all that "row_cosine" needs; "kl" and "mse" need more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastkd.losses._temperatures import fp64_where_supported
from fastkd.ops.collectives import plain_total
from fastkd.ops.numerics import compute_dtype
from fastkd.ops.relation.reference import scaled_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LOGIT = 800.0
"""Distance of a masked column below the row's maximum: e^-800 is 0 in fp32 and in fp64."""


def without_columns(
    rows: Tensor,
    mask: Tensor,
    similarity: str,
    dtype: torch.dtype,
    temperature: float | Tensor,
    cross: bool,
    group: ProcessGroup | None,
) -> Tensor:
    """Return rows (B, N, K + 1) whose dot products / τ are the logits, without probability at masked columns.

    The additional element is b at valid and −c at masked pixels. It adds b²/τ = 1/64 to the logits of valid columns,
    which a softmax ignores, and bc is so large that masked columns have probability 0. No NaN can arise: masked rows
    are finite too.

    Args:
        rows: (B, N, K), 0 at masked pixels.
        mask: (B, N).
        similarity: that of the loss; the operator's is then "dot".
        dtype: of the arithmetic.
        temperature: τ of this network.
        cross: whether rows are also compared with other samples, so that all logits of a row may be negative. (Within
            a sample, that of the pixel with itself is not.)
        group: processes of the samples, or None.
    """
    x = scaled_rows(rows.to(dtype), similarity)
    tau = fp64_where_supported(rows.device) * (temperature.detach() if isinstance(temperature, Tensor) else temperature)
    lowest = torch.zeros_like(tau)  # a row's maximum is at least −lowest
    if cross and similarity == "cosine":
        lowest = lowest + 1
    elif cross:
        square = x.detach().square().sum(2).flatten()
        lowest = torch.cat([square, square.new_zeros(1)]).amax()  # a process may have no samples
        if group is not None:
            lowest = plain_total(lowest, group)  # at least the maximum
    b = tau.sqrt() / 8
    c = (LOGIT * tau + lowest) / b
    return torch.cat([x, torch.where(mask, b, -c).to(dtype).unsqueeze(2)], 2)


def columns_per_valid_one(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return N/n (B, 1) of a mask (B, N) with n valid pixels: the mean over all columns times it is that over n."""
    return mask.shape[1] / mask.sum(1, keepdim=True, dtype=dtype).clamp_min(1)


def mean_over_columns(student: Tensor, teacher: Tensor, mask: Tensor, similarity: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows of student and teacher, for the similarity "dot", and a factor (B, 1) of their "mse" with ``cross``.

    Each sample has its own n. With w² = N/n and rows times w, similarities of samples i and j are multiplied by
    w_i w_j, and squared differences by w_i² w_j². The factor 1/w_i² leaves the mean over the valid pixels of sample j.
    """
    dtype = compute_dtype(student, teacher)
    square = columns_per_valid_one(mask, dtype)
    x_s, x_t = (scaled_rows(x.to(dtype), similarity) * square.sqrt().unsqueeze(2) for x in (student, teacher))
    return x_s, x_t, 1 / square
