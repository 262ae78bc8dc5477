// What relation keeps of each row, and the merging of the tiles' sums to it. Statistics are those of
// common/relation.h's Forward, double (statistic_planes, others, batch, rows), then scale^S and scale^T, and hold, with
// f_x = e^{(v_x - m_x)/tau}, v = sigma E, m = 1 where the shift is fixed:
//
//     kl            z_S = sum f_S,  z_T = sum f_T,  a = sum f_T (v_T - v_S)
//     kl_maxima     m_S,  m_T,  z_S,  z_T,  a = sum f_T (u_T - u_S)  (softmax_kl::KLState)
//     mse           sum d^2,  d = E^S - E^T
//     row_cosine    sum E^S^2,  sum E^T^2,  sum d^2,  sum d (E^S + E^T),  sum E^S E^T
#pragma once

#include "common/softmax_kl.h"
#include "cuda/relation/tile.cuh"

namespace fastkd::cuda::relation {

constexpr float no_direction = 1e12f; // the scale of a row of norm <= 1e-12, which gets no gradient

// 2 - 2c from the five sums. Where sum d^2 <= n m it is (sum d^2 - (n - m)^2)/(n m), n - m = sum d(E^S + E^T)/(n + m),
// so that in neither case close numbers are subtracted. n and m are at least 1e-12.
struct RowCosine {
    float loss, c, n, m;
    float slope; // (c m - n)/m, of which near each other -(n - m) - m loss/2 is left

    FASTKD_DEVICE explicit RowCosine(const float (&sums)[5]) {
        const float n2 = sums[0], m2 = sums[1], d2 = sums[2];
        const bool n_low = n2 <= 1e-24f, m_low = m2 <= 1e-24f; // not where it is NaN
        n = n_low ? 1e-12f : std::sqrt(n2);
        m = m_low ? 1e-12f : std::sqrt(m2);
        const float apart = n_low || m_low ? n - m : sums[3] / (n + m);
        const float u = n_low ? n2 * 1e24f : 1.0f, v = m_low ? m2 * 1e24f : 1.0f; // |E^S|^2/n^2, |E^T|^2/m^2
        const float near = (d2 - apart * apart) / n / m;
        const bool is_near = d2 <= n * m && u == 1.0f && v == 1.0f;
        c = sums[4] / n / m;
        loss = is_near ? near : u + v - 2.0f * c;
        c = is_near ? 1.0f - 0.5f * near : c;
        slope = (d2 <= n * m && !m_low ? -apart - 0.5f * loss * m : c * m - n) / m;
    }
};

constexpr int rows_of_group = 32, groups = 8; // blockDim of the kernels that take 32 rows to a block

struct MergeArgs {
    Cut cut;
    Method method;
    int side; // of a tile
    float inv_temperature;
    bool unit_scales;   // they are not cosines: scales are written as 1
    const float* sums;  // as the tiles' kernel wrote them
    double* statistics; // or null: `row_sums` alone are wanted, of one plane
    float* loss;
    float* row_sums;
};

// Adds the sums of a launch's tiles to what earlier launches left, in a fixed order; losses are written where the sums
// are complete, in the band.
cudaError_t launch_merge(const MergeArgs& args, cudaStream_t stream);

} // namespace fastkd::cuda::relation
