// Per-row statistics of relation on a GPU, and the merge of tile sums into them. They are stored in Forward::statistics
// (common/relation.h): double (statistic_planes, others, batch, rows), then scale^S and scale^T. With
// f_x = e^{(v_x - m_x)/tau}, v = sigma E, and m = 1 where the shift is fixed, the planes are:
//
//     kl            z_S = sum f_S,  z_T = sum f_T,  a = sum f_T (v_T - v_S)
//     kl_maxima     m_S,  m_T,  z_S,  z_T,  a = sum f_T (u_T - u_S)  (softmax_kl::KLState)
//     mse           sum d^2,  d = E^S - E^T
//     row_cosine    sum E^S^2,  sum E^T^2,  sum d^2,  sum d (E^S + E^T),  sum E^S E^T
#pragma once

#include "common/softmax_kl.h"
#include "cuda/relation/tile.cuh"

namespace fastkd::cuda::relation {

constexpr float no_direction = 1e12f; // scale of a row with norm <= 1e-12, whose gradient is 0

// The loss 2 - 2c from the five sums. Where sum d^2 <= n m it is (sum d^2 - (n - m)^2)/(n m) with
// n - m = sum d(E^S + E^T)/(n + m): neither form subtracts nearly equal numbers. n and m are at least 1e-12.
struct RowCosine {
    float loss, c, n, m;
    float slope; // (c m - n)/m; where student and teacher are close, (-(n - m) - m loss/2)/m

    FASTKD_DEVICE explicit RowCosine(const float (&sums)[5]) {
        const float n2 = sums[0], m2 = sums[1], d2 = sums[2];
        const bool n_low = n2 <= 1e-24f, m_low = m2 <= 1e-24f; // false for NaN
        n = n_low ? 1e-12f : std::sqrt(n2);
        m = m_low ? 1e-12f : std::sqrt(m2);
        const float norm_difference = n_low || m_low ? n - m : sums[3] / (n + m);
        const float u = n_low ? n2 * 1e24f : 1.0f, v = m_low ? m2 * 1e24f : 1.0f; // |E^S|^2/n^2, |E^T|^2/m^2
        const float near = (d2 - norm_difference * norm_difference) / n / m;
        const bool is_near = d2 <= n * m && u == 1.0f && v == 1.0f;
        c = sums[4] / n / m;
        loss = is_near ? near : u + v - 2.0f * c;
        c = is_near ? 1.0f - 0.5f * near : c;
        slope = (d2 <= n * m && !m_low ? -norm_difference - 0.5f * loss * m : c * m - n) / m;
    }
};

constexpr int rows_of_group = 32, groups = 8; // blockDim of kernels with 32 rows per block

struct MergeArgs {
    LaunchRange range;
    Method method;
    int tile_size;
    float inv_temperature;
    bool unit_scales;   // not a cosine: write 1 as the scales
    const float* sums;  // written by tiles_kernel or derivative_kernel
    double* statistics; // or null: compute only `row_sums`, of one plane
    float* loss;
    float* row_sums;
};

// Add the sums of a launch's tiles to those of earlier launches, in a fixed order. Write the losses of the band's rows,
// whose sums are then complete.
cudaError_t launch_merge(const MergeArgs& args, cudaStream_t stream);

} // namespace fastkd::cuda::relation
