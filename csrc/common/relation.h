// Row-wise distance between the self-relation matrices of two sets of rows: the kernels' interface and their formulas.
//
// With x^_i = scale_i x_i, scale_i = 1/max(|x_i|, 1e-12) ("cosine"), 1/sqrt(width) ("mean") or 1 ("dot"), and
// E_ij = <x^_i, x^_j> for the student (S) and the teacher (T), row i's loss is
//
//     kl          KL(softmax(u^T_i) || softmax(u^S_i)),  u = sigma E/tau,  sigma = -1 if negate else +1
//     mse         mean_j (E^S_ij - E^T_ij)^2
//     row_cosine  |E^S_i/n_i - E^T_i/m_i|^2 = 2 - 2 c_i,  n_i = |E^S_i|, m_i = |E^T_i|
//
// Gradient. E is symmetric, so with H_ij = g_i d loss_i/d E_ij + its transpose,
//
//     H_ij = [a_i f(E^S_ij) - b_i f(E^T_ij)] + [a_j f(E^S_ji) - b_j f(E^T_ji)],
//     kl           f = e^{u - shift}, a_i = g_i sigma/(tau z^S_i), b_i = g_i sigma/(tau z^T_i), z_i = sum_j f(E_ij)
//     mse          f = identity,      a_i = b_i = 2 g_i/rows
//     row_cosine   f = identity,      a_i = 2 g_i c_i/n_i^2,       b_i = 2 g_i/(n_i m_i)
//     d/d x^_i = sum_j H_ij x^_j,     d/d x_i = scale_i (d/d x^_i - x^_i q_i),  q_i = sum_j H_ij E_ij  (cosine)
//
// since x^_i . sum_j H_ij x^_j = q_i. Rows of norm <= 1e-12 get a zero gradient.
//
// With "cross" the rows of sample b are related to the rows of every sample o. Each pair (o, b) is a matrix with its
// own statistics, and a row's loss is the mean over o.
#pragma once

#include <cmath>

#include "common/arena.h"
#include "common/dtype.h"

namespace fastkd::relation {

enum class Similarity { cosine, mean, dot };
enum class Distance { kl, mse, row_cosine };

// (batch, rows, width), any strides, in elements.
struct Rows {
    const void* data;
    std::int64_t width;
    std::int64_t batch_stride;
    std::int64_t row_stride;
    std::int64_t col_stride;
    bool padded = false; // on a GPU: addresses and strides are multiples of 16 bytes, and zeros follow each line
};

struct Options {
    std::int64_t batch;
    std::int64_t rows;
    bool cross;
    Similarity similarity;
    Distance distance;
    double temperature;
    bool negate;
    DType dtype;

    FASTKD_HD std::int64_t others() const { return cross ? batch : 1; }
    // CPU: return whether all rows share the shift 1/tau, since cosine logits lie in [-1/tau, 1/tau]. Below this
    // temperature e^{-2/tau} would leave the range of normal floats, and each row tracks its own maximum.
    FASTKD_HD bool fixed_shift() const { return similarity == Similarity::cosine && temperature >= 0.02; }
};

constexpr double norm_floor = 1e-12;

// `statistics` is double (statistic_planes * others + 2, batch, rows): `statistic_planes` numbers per (o, b, row), then
// scale^S, scale^T. (The form "gram": only the scales.) On a CPU (for a GPU see cuda/relation/rows.cuh):
//     kl, fixed shift    z^S, z^T, sum f^T (u^T - u^S)      kl, else    log-sum-exp^S, log-sum-exp^T
//     row_cosine         n, m, loss, |E^T_i|^2/m^2 (1 unless m is clamped to norm_floor)
constexpr int statistic_planes = 5;

// The form "stored": the forward writes both networks' E, in tiles of 48 x 48 of the upper triangle, for the backward.
constexpr std::int64_t stored_block = 48;
FASTKD_HD std::int64_t stored_elements(std::int64_t rows) {
    const std::int64_t blocks = ceil_div(rows, stored_block);
    return blocks * (blocks + 1) * stored_block * stored_block;
}

// The form "gram": mse without tiles. With A = X^_S, B = X^_T and D = A - B, the narrower one padded with zeros,
//
//     E^S_ij - E^T_ij = e_ij = d_i . a_j + b_i . d_j = w_i . z_j,   W = [D | B],  Z = [A | D],
//
// d_i truncated to the width of A and d_j to the width of B. With the Gram matrix G = sum_j z_j z_j^T
//
//     sum_j e_ij^2 = w_i^T G w_i,     d loss/d a_i = (2/columns) (g_i G_A + sum_j g_j a_j z_j^T) w_i,
//
// where G_A is the rows of G that belong to A. Every product contains D twice, so for equal widths nothing cancels as
// the student approaches the teacher. For different widths channels do not correspond: the relations may agree although
// D is large, and w^T G w then has a rounding error proportional to |E|^2, the plain formula only to |E| |e|. So G
// is double. bfloat16 is the exception: its plain formula rounds E itself to 8 bits, an error far above float's at
// |E|^2. (fp16's 11 bits are not coarse enough for that.)
//
// `stored` holds G, (problems, gram_side, gram_side); a problem is a sample, or with `cross` the batch.
FASTKD_HD bool gram_double(DType dtype, std::int64_t student_width, std::int64_t teacher_width) {
    return dtype == DType::Float64 || (dtype != DType::BFloat16 && student_width != teacher_width);
}
FASTKD_HD std::int64_t gram_padded(std::int64_t width) {
    return round_up(width, 16); // whole vectors of every instruction set
}
FASTKD_HD std::int64_t gram_side(std::int64_t student_width, std::int64_t teacher_width) {
    return gram_padded(student_width) + gram_padded(teacher_width);
}

// `workspace` has the size of the plan.
struct Forward {
    Rows student;
    Rows teacher;
    Options options;
    void* loss;         // (batch, rows) of float, double for Float64
    double* statistics; // as above
    void* stored;       // "stored": (batch, stored_elements(rows)); "gram": G; or null
    void* workspace;
};

struct Backward {
    const void* grad_loss; // (batch, rows), any strides, including 0
    std::int64_t grad_batch_stride;
    std::int64_t grad_row_stride;
    Rows student;
    Rows teacher;
    Options options;
    const double* statistics;
    const void* stored;
    void* grad_student; // any strides that do not overlap
    std::int64_t out_batch_stride;
    std::int64_t out_row_stride;
    std::int64_t out_col_stride;
    void* workspace;
};

} // namespace fastkd::relation
