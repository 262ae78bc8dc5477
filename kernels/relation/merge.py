"""Last step of the ``relation`` forward: merge the sums of all tiles into each row's statistics and loss."""

from __future__ import annotations

import triton
import triton.language as tl
from fastkd.kernels.common import LOG2E
from fastkd.kernels.relation.tiles import LOWEST


# ---------------------------------------------------------------------------------------------------------------------
# For the columns of one sample, the sums of a row in block I come from the tiles J ≥ Q I of its block (by_row) and from
# the mirrored tiles of earlier blocks (by_col). They are added to those of earlier launches, by_col first, and give the
# loss
#
#     kl            a/(z_T τ) + log z_S − log z_T,   with maxima + (m_S − m_T)/τ
#     mse           Σd²/R
#     row_cosine    2 − 2c,  c = e_S·e_T/(n m);  if Σd² ≤ n m, (Σd² − (n − m)²)/(n m), n − m = Σd(e_S + e_T)/(n + m):
#                   neither subtracts nearly equal numbers. Norms n, m below 1e-12 are replaced by 1e-12.
#
# averaged over the samples.
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit
def _accumulate(total, ptr, slot_stride, begin, end, in_range, SLOTS: tl.constexpr):
    """Return ``total`` plus the slots [begin, end) of each row; ``ptr`` points to slot 0."""
    for start in range(begin, end, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        mask = (slot < end)[:, None] & in_range[None, :]
        total += tl.sum(tl.load(ptr + slot.to(tl.int64)[:, None] * slot_stride, mask=mask, other=0.0), axis=0)
    return total


@triton.jit
def _accumulate_maxima(m, z, a, ptr, plane, slot_stride, begin, end, in_range, kappa, HAS_A: tl.constexpr,
                SLOTS: tl.constexpr):  # fmt: skip
    """Return (m, z, a) merged with the slots [begin, end), whose sums are relative to their own maxima."""
    for start in range(begin, end, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        mask = (slot < end)[:, None] & in_range[None, :]
        at = ptr + slot.to(tl.int64)[:, None] * slot_stride
        m_new = tl.load(at, mask=mask, other=LOWEST)
        z_new = tl.load(at + plane, mask=mask, other=0.0)
        top = tl.maximum(m, tl.max(m_new, axis=0))
        old = tl.exp2((m - top) * kappa)
        new = tl.exp2((m_new - top[None, :]) * kappa)
        z = z * old + tl.sum(z_new * new, axis=0)
        if HAS_A:
            a_new = tl.load(at + 2 * plane, mask=mask, other=0.0)
            a = tl.where(old == 0.0, 0.0, a * old) + tl.sum(tl.where(new == 0.0, 0.0, a_new * new), axis=0)
        m = top
    return m, z, a


@triton.jit
def row_cosine(n2, m2, d2, sum_d, dot):
    """Return (loss, c, n, m, n − m) from the five sums, with n and m at least 1e-12."""
    n_low = n2 <= 1e-24  # False for NaN
    m_low = m2 <= 1e-24
    n = tl.where(n_low, 1e-12, tl.sqrt_rn(n2))
    m = tl.where(m_low, 1e-12, tl.sqrt_rn(m2))
    difference = tl.where(n_low | m_low, n - m, sum_d / (n + m))
    c = dot / n / m
    u = tl.where(n_low, n2 * 1e24, 1.0)  # |e_S|²/n²
    v = tl.where(m_low, m2 * 1e24, 1.0)
    close_loss = (d2 - difference * difference) / n / m
    is_close = (d2 <= n * m) & (u == 1.0) & (v == 1.0)
    return (
        tl.where(is_close, close_loss, u + v - 2.0 * c),
        tl.where(is_close, 1.0 - 0.5 * close_loss, c),
        n,
        m,
        difference,
    )


@triton.jit(do_not_specialize=["rows", "n_rows", "samples", "row_blocks", "first_problem", "first", "last"])
def merge_kernel(
    by_row_ptr,  # as tiles_kernel wrote them
    by_col_ptr,
    statistics_ptr,  # input and output (PLANES, samples, batch · rows)
    loss_ptr,  # output (batch · rows,)
    rows,
    n_rows,  # batch · rows
    samples,
    row_blocks,
    first_problem,
    first,
    last,
    inv_temperature,
    DISTANCE: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,  # divides ROWS
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Merge ``BLOCK`` rows per program; the loss is final after the launch of the last row block."""
    Q: tl.constexpr = ROWS // COLS
    columns = samples * row_blocks * Q
    band = last - first
    part = tl.program_id(0) % (ROWS // BLOCK)
    block = tl.program_id(0) // (ROWS // BLOCK)  # of all problems
    row = block % (samples * row_blocks)
    local_problem = (block // (samples * row_blocks)).to(tl.int64)  # in this launch
    problem = first_problem + local_problem
    within = part * BLOCK + tl.arange(0, BLOCK)
    r = row % row_blocks * ROWS + within
    in_range = r < rows
    index = (problem * samples + row // row_blocks) * rows + r
    kappa = inv_temperature * LOG2E

    row_plane = columns.to(tl.int64) * band * ROWS
    col_plane = columns.to(tl.int64) * band * COLS
    row_slot = band.to(tl.int64) * ROWS
    col_slot = columns.to(tl.int64) * COLS
    by_row = (by_row_ptr + local_problem * PLANES * row_plane + (row - first) * ROWS + within)[None, :]
    by_col = (by_col_ptr + local_problem * PLANES * col_plane - first * col_slot + row * ROWS + within)[None, :]
    in_launch = (row >= first) & (row < last)
    valid = (rows + COLS - 1) // COLS
    loss = tl.full((BLOCK,), 0.0, tl.float32)
    for other in range(0, samples):
        plane = n_rows.to(tl.int64) * samples
        out = statistics_ptr + other * n_rows.to(tl.int64) + index
        old = tl.where(first > 0, r, rows) < rows  # the first launch has nothing to add to
        i_from = tl.maximum(first, other * row_blocks)
        i_to = tl.minimum(tl.minimum(last, (other + 1) * row_blocks), row)
        j_from = tl.maximum(other * row_blocks * Q, row * Q)
        j_to = tl.where(in_launch, other * row_blocks * Q + valid, 0)
        if DISTANCE == "kl maxima":
            m_s = tl.load(out, mask=old, other=LOWEST)
            z_s = tl.load(out + plane, mask=old, other=0.0)
            m_t = tl.load(out + 2 * plane, mask=old, other=LOWEST)
            z_t = tl.load(out + 3 * plane, mask=old, other=0.0)
            a = tl.load(out + 4 * plane, mask=old, other=0.0)
            m_s, z_s, _ = _accumulate_maxima(m_s, z_s, a, by_col, col_plane, col_slot, i_from, i_to, in_range, kappa,
                                      False, SLOTS)  # fmt: skip
            m_s, z_s, _ = _accumulate_maxima(m_s, z_s, a, by_row, row_plane, row_slot, j_from, j_to, in_range, kappa,
                                      False, SLOTS)  # fmt: skip
            m_t, z_t, a = _accumulate_maxima(m_t, z_t, a, by_col + 2 * col_plane, col_plane, col_slot, i_from,
                                      i_to, in_range, kappa, True, SLOTS)  # fmt: skip
            m_t, z_t, a = _accumulate_maxima(m_t, z_t, a, by_row + 2 * row_plane, row_plane, row_slot, j_from,
                                      j_to, in_range, kappa, True, SLOTS)  # fmt: skip
            tl.store(out, m_s, mask=in_range)
            tl.store(out + plane, z_s, mask=in_range)
            tl.store(out + 2 * plane, m_t, mask=in_range)
            tl.store(out + 3 * plane, z_t, mask=in_range)
            tl.store(out + 4 * plane, a, mask=in_range)
            loss += (a / z_t + (m_s - m_t)) * inv_temperature + tl.log(tl.div_rn(z_s, z_t))
        else:
            x0 = tl.load(out, mask=old, other=0.0)
            x0 = _accumulate(x0, by_col, col_slot, i_from, i_to, in_range, SLOTS)
            x0 = _accumulate(x0, by_row, row_slot, j_from, j_to, in_range, SLOTS)
            tl.store(out, x0, mask=in_range)
            if DISTANCE == "mse":
                loss += x0 / rows
            else:
                x1 = tl.load(out + plane, mask=old, other=0.0)
                x1 = _accumulate(x1, by_col + col_plane, col_slot, i_from, i_to, in_range, SLOTS)
                x1 = _accumulate(x1, by_row + row_plane, row_slot, j_from, j_to, in_range, SLOTS)
                tl.store(out + plane, x1, mask=in_range)
                x2 = tl.load(out + 2 * plane, mask=old, other=0.0)
                x2 = _accumulate(x2, by_col + 2 * col_plane, col_slot, i_from, i_to, in_range, SLOTS)
                x2 = _accumulate(x2, by_row + 2 * row_plane, row_slot, j_from, j_to, in_range, SLOTS)
                tl.store(out + 2 * plane, x2, mask=in_range)
                if DISTANCE == "kl":
                    loss += x2 / x1 * inv_temperature + tl.log(tl.div_rn(x0, x1))
                else:
                    x3 = tl.load(out + 3 * plane, mask=old, other=0.0)
                    x3 = _accumulate(x3, by_col + 3 * col_plane, col_slot, i_from, i_to, in_range, SLOTS)
                    x3 = _accumulate(x3, by_row + 3 * row_plane, row_slot, j_from, j_to, in_range, SLOTS)
                    tl.store(out + 3 * plane, x3, mask=in_range)
                    x4 = tl.load(out + 4 * plane, mask=old, other=0.0)
                    x4 = _accumulate(x4, by_col + 4 * col_plane, col_slot, i_from, i_to, in_range, SLOTS)
                    x4 = _accumulate(x4, by_row + 4 * row_plane, row_slot, j_from, j_to, in_range, SLOTS)
                    tl.store(out + 4 * plane, x4, mask=in_range)
                    loss += row_cosine(x0, x1, x2, x3, x4)[0]
    tl.store(loss_ptr + index, loss / samples, mask=in_range)
