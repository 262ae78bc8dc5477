// KL(softmax(E^T_i) || softmax(E^S_i)) of two networks' attention maps, for every query i: the kernels' interface and
// their formulas. Per head and network x = S, T, with queries Q (N x D), keys K (M x D) and a temperature tau,
//
//     u_ij = (scale q_i . k_j + bias_ij)/tau,     m_i = max_j u_ij,     z_i = sum_j e^{u_ij - m_i}
//     loss_i = a_i/z^T_i + log(z^S_i/z^T_i),      a_i = sum_j e^{u^T_ij - m^T_i} ((u^T_ij - m^T_i) - (u^S_ij - m^S_i))
//
// over the valid keys j of i. With p_ij = e^{u_ij - m_i}/z_i and the incoming gradient g_i,
//
//     H_ij = g_i (p^S_ij - p^T_ij) scale_S/tau,   dQ_S = H K_S,     dK_S = H^T Q_S
//
// H is 0 where the networks are equal, because each p is rounded before they are subtracted. One block of queries
// against all keys gives the losses and its part of both gradients: the maps are never stored, and with a gradient
// known in advance (such as g = 1) never computed twice.
#pragma once

#include "common/softmax_kl.h"

namespace fastkd::attention_kl {

// (batch, heads, rows, columns), any strides in elements.
struct Array {
    const void* data;
    std::int64_t batch, head, row, col;
};

// Added to the logits; the innermost stride is 1, the others may be 0. `data` may be null.
struct Bias {
    const void* data;
    std::int64_t batch, head, row;
    DType dtype;
};

struct Network {
    Array q, k; // in Problem::dtype
    std::int64_t width;
    const double* scales; // (heads)
    Bias bias;
};

struct Problem {
    std::int64_t batch, heads, queries, keys, student_width, teacher_width;
    bool causal; // query i attends to the keys j <= i + (keys - queries)
    DType dtype;
    double temperature;
    bool for_q, for_k; // the gradients to compute
};

// `loss` and `grad_loss` are float, double for Float64; so are the gradients if `wide`, else in the problem's dtype.
struct Call {
    Problem problem;
    Network student, teacher;
    // Contiguous (batch, keys) and (batch, queries), or null. Masked rows of q and k hold finite numbers.
    const unsigned char* key_mask;
    const unsigned char* query_mask;
    const void* grad_loss; // null: 1
    std::int64_t grad_batch_stride, grad_head_stride, grad_row_stride;
    void* loss;   // (batch, heads, queries), or null
    void* grad_q; // (batch, heads, queries, student_width) contiguous, if for_q
    void* grad_k; // (batch, heads, keys, student_width) contiguous, if for_k
    bool wide;
    void* workspace;
};

} // namespace fastkd::attention_kl
