// Second half of relation's backward: the gradient from H (product.cu).
#pragma once

#include "cuda/relation/rows.cuh"

namespace fastkd::cuda::relation {

// The storage type of H. For bfloat16 rows H is rounded to bfloat16. For fp16 rows it is the sum of two bfloat16
// matrices, since it has fp32's range, and the rows are split likewise. For floats it stays fp32.
template <class S>
struct StoredH {
    using Type = BFloat16;
    static constexpr int planes = std::is_same<S, Half>::value ? 2 : 1;
};
template <>
struct StoredH<float> {
    using Type = float;
    static constexpr int planes = 1;
};

struct Gradient {
    void* data;
    std::int64_t batch_stride, row_stride, col_stride;
    bool mn_major; // rows are contiguous, as in a feature map viewed as rows of pixels
    bool packs;    // the gradient and the student's rows are accessed 16 bytes at a time
};

struct ProductArgs {
    Side student;
    LaunchRange range;
    const void* h;
    const float* row_sums; // q
    const double* scales;
    Gradient gradient;
    // [problem of the launch][row block of the band][block of columns][split][tile_size][block_n]; or null.
    float* partials;
    float* totals; // [row block][block of columns][tile_size][block_n]; or null where the launch is whole
    std::int64_t width_blocks, splits;
    bool cosine;
};

// Launch the product of H's tiles with the student's rows and, where it is split, the sum of its parts.
cudaError_t launch_product(const ProductArgs& args, DType dtype, int tile_size, cudaStream_t stream);

} // namespace fastkd::cuda::relation
