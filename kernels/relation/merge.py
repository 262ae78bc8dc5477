"""The end of ``relation``'s forward: the sums of all tiles merged into each row's statistics and loss."""

from __future__ import annotations

import triton
import triton.language as tl
from fastkd.kernels.common import LOG2E
from fastkd.kernels.relation.tiles import LOWEST


# ---------------------------------------------------------------------------------------------------------------------
# Merging. A row of block I, against the columns of one sample, has the tiles J ≥ Q I of its own block (by_row) and,
# mirrored, those of the blocks before it (by_col). They are added in this order to what earlier launches left:
#
#     kl            a/(z_T τ) + log z_S − log z_T,   with maxima + (m_S − m_T)/τ
#     mse           Σd²/R
#     row_cosine    2 − 2c,  c = e_S·e_T/(n m);  where Σd² ≤ n m, (Σd² − (n − m)²)/(n m), n − m = Σd(e_S + e_T)/(n + m):
#                   in either case no difference of close numbers. Below 1e-12 n and m are divided by that instead.
#
# and averaged over the samples.
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit
def _add(total, ptr, slot_stride, begin, end, here, SLOTS: tl.constexpr):
    """``total`` + the slots [begin, end) of each row, from ``ptr`` of slot 0."""
    for start in range(begin, end, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        mask = (slot < end)[:, None] & here[None, :]
        total += tl.sum(tl.load(ptr + slot.to(tl.int64)[:, None] * slot_stride, mask=mask, other=0.0), axis=0)
    return total


@triton.jit
def _add_maxima(m, z, a, ptr, plane, slot_stride, begin, end, here, kappa, HAS_A: tl.constexpr,
                SLOTS: tl.constexpr):  # fmt: skip
    """The same for sums relative to maxima."""
    for start in range(begin, end, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        mask = (slot < end)[:, None] & here[None, :]
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
    """(loss, c, n, m, n − m), n and m at least 1e-12, from the five sums."""
    n_low = n2 <= 1e-24  # not where it is NaN
    m_low = m2 <= 1e-24
    n = tl.where(n_low, 1e-12, tl.sqrt_rn(n2))
    m = tl.where(m_low, 1e-12, tl.sqrt_rn(m2))
    apart = tl.where(n_low | m_low, n - m, sum_d / (n + m))
    c = dot / n / m
    u = tl.where(n_low, n2 * 1e24, 1.0)  # |e_S|²/n²
    v = tl.where(m_low, m2 * 1e24, 1.0)
    near = (d2 - apart * apart) / n / m
    is_near = (d2 <= n * m) & (u == 1.0) & (v == 1.0)
    return tl.where(is_near, near, u + v - 2.0 * c), tl.where(is_near, 1.0 - 0.5 * near, c), n, m, apart


@triton.jit(do_not_specialize=["rows", "n_rows", "samples", "row_blocks", "first_problem", "first", "last"])
def merge_kernel(
    by_row_ptr,  # as tiles_kernel wrote them
    by_col_ptr,
    statistics_ptr,  # (PLANES, samples, batch · rows)
    loss_ptr,  # (batch · rows,)
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
    """``BLOCK`` rows to a program; their loss is right once ``last`` is the last block."""
    Q: tl.constexpr = ROWS // COLS
    columns = samples * row_blocks * Q
    band = last - first
    part = tl.program_id(0) % (ROWS // BLOCK)
    block = tl.program_id(0) // (ROWS // BLOCK)  # of all problems
    row = block % (samples * row_blocks)
    here_problem = (block // (samples * row_blocks)).to(tl.int64)  # in this launch
    problem = first_problem + here_problem
    within = part * BLOCK + tl.arange(0, BLOCK)
    r = row % row_blocks * ROWS + within
    here = r < rows
    index = (problem * samples + row // row_blocks) * rows + r
    kappa = inv_temperature * LOG2E

    row_plane = columns.to(tl.int64) * band * ROWS
    col_plane = columns.to(tl.int64) * band * COLS
    row_slot = band.to(tl.int64) * ROWS
    col_slot = columns.to(tl.int64) * COLS
    by_row = (by_row_ptr + here_problem * PLANES * row_plane + (row - first) * ROWS + within)[None, :]
    by_col = (by_col_ptr + here_problem * PLANES * col_plane - first * col_slot + row * ROWS + within)[None, :]
    mine = (row >= first) & (row < last)
    valid = (rows + COLS - 1) // COLS
    loss = tl.full((BLOCK,), 0.0, tl.float32)
    for other in range(0, samples):
        plane = n_rows.to(tl.int64) * samples
        out = statistics_ptr + other * n_rows.to(tl.int64) + index
        old = tl.where(first > 0, r, rows) < rows  # nothing before the first launch
        i_from = tl.maximum(first, other * row_blocks)
        i_to = tl.minimum(tl.minimum(last, (other + 1) * row_blocks), row)
        j_from = tl.maximum(other * row_blocks * Q, row * Q)
        j_to = tl.where(mine, other * row_blocks * Q + valid, 0)
        if DISTANCE == "kl maxima":
            m_s = tl.load(out, mask=old, other=LOWEST)
            z_s = tl.load(out + plane, mask=old, other=0.0)
            m_t = tl.load(out + 2 * plane, mask=old, other=LOWEST)
            z_t = tl.load(out + 3 * plane, mask=old, other=0.0)
            a = tl.load(out + 4 * plane, mask=old, other=0.0)
            m_s, z_s, _ = _add_maxima(m_s, z_s, a, by_col, col_plane, col_slot, i_from, i_to, here, kappa,
                                      False, SLOTS)  # fmt: skip
            m_s, z_s, _ = _add_maxima(m_s, z_s, a, by_row, row_plane, row_slot, j_from, j_to, here, kappa,
                                      False, SLOTS)  # fmt: skip
            m_t, z_t, a = _add_maxima(m_t, z_t, a, by_col + 2 * col_plane, col_plane, col_slot, i_from,
                                      i_to, here, kappa, True, SLOTS)  # fmt: skip
            m_t, z_t, a = _add_maxima(m_t, z_t, a, by_row + 2 * row_plane, row_plane, row_slot, j_from,
                                      j_to, here, kappa, True, SLOTS)  # fmt: skip
            tl.store(out, m_s, mask=here)
            tl.store(out + plane, z_s, mask=here)
            tl.store(out + 2 * plane, m_t, mask=here)
            tl.store(out + 3 * plane, z_t, mask=here)
            tl.store(out + 4 * plane, a, mask=here)
            loss += (a / z_t + (m_s - m_t)) * inv_temperature + tl.log(z_s / z_t)
        else:
            x0 = tl.load(out, mask=old, other=0.0)
            x0 = _add(x0, by_col, col_slot, i_from, i_to, here, SLOTS)
            x0 = _add(x0, by_row, row_slot, j_from, j_to, here, SLOTS)
            tl.store(out, x0, mask=here)
            if DISTANCE == "mse":
                loss += x0 / rows
            else:
                x1 = tl.load(out + plane, mask=old, other=0.0)
                x1 = _add(x1, by_col + col_plane, col_slot, i_from, i_to, here, SLOTS)
                x1 = _add(x1, by_row + row_plane, row_slot, j_from, j_to, here, SLOTS)
                tl.store(out + plane, x1, mask=here)
                x2 = tl.load(out + 2 * plane, mask=old, other=0.0)
                x2 = _add(x2, by_col + 2 * col_plane, col_slot, i_from, i_to, here, SLOTS)
                x2 = _add(x2, by_row + 2 * row_plane, row_slot, j_from, j_to, here, SLOTS)
                tl.store(out + 2 * plane, x2, mask=here)
                if DISTANCE == "kl":
                    loss += x2 / x1 * inv_temperature + tl.log(x0 / x1)
                else:
                    x3 = tl.load(out + 3 * plane, mask=old, other=0.0)
                    x3 = _add(x3, by_col + 3 * col_plane, col_slot, i_from, i_to, here, SLOTS)
                    x3 = _add(x3, by_row + 3 * row_plane, row_slot, j_from, j_to, here, SLOTS)
                    tl.store(out + 3 * plane, x3, mask=here)
                    x4 = tl.load(out + 4 * plane, mask=old, other=0.0)
                    x4 = _add(x4, by_col + 4 * col_plane, col_slot, i_from, i_to, here, SLOTS)
                    x4 = _add(x4, by_row + 4 * row_plane, row_slot, j_from, j_to, here, SLOTS)
                    tl.store(out + 4 * plane, x4, mask=here)
                    loss += row_cosine(x0, x1, x2, x3, x4)[0]
    tl.store(loss_ptr + index, loss / samples, mask=here)
