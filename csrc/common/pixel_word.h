// Distances between two networks' pixel-word attention: the kernels' interface and their formulas.
//
// For one sample, student and teacher have logits M (pixels x words), M = V L^T or the cosines of V and L, u = scale M
// with scale = 1/tau (1/(tau sqrt D) for the scaled product). A and B are the softmaxes over words of u_S and u_T, Q_S
// and Q_T those over pixels, D = A - B, n valid pixels, t valid words. The four losses are
//
//     pixel_to_word = 1/n sum_p KL(B[p] || A[p])          word_to_pixel = 1/t sum_j KL(Q_T[:, j] || Q_S[:, j])
//     pixel_pixel   = |A A^T - B B^T|^2 / n^2             word_word     = |A^T A - B^T B|^2 / n^2
//
// The last two come from words x words matrices. Every product contains D, so nothing cancels as the student approaches
// the teacher. With G = A^T A, K = D^T A, E = D^T D: B^T D = K^T - E, B^T B = G - K - K^T + E, and
//
//     |A A^T - B B^T|^2 = <G + B^T B, E> + 2 sum_ij K_ij (B^T D)_ij
//     |A^T A - B^T B|^2 = |W|^2,   W = D^T A + B^T D = K + K^T - E
//
// Gradients, where g_k is the gradient of loss k (pw, wp, pp, ww). The second-order terms give dA = A X + D Z with
//
//     X = 4/n^2 (g_ww W + g_pp K)         Z = 4/n^2 g_pp (G - K)
//
// since d|AA^T - BB^T|^2/dA = 4(D G + B K) and d|W|^2/dA = 4 A W. Then
//
//     du = A (dA - <dA, A>_words) + g_pw/n D + g_wp/t (Q_S - Q_T),   dM = scale du,   dV = dM L,   dL = dM^T V
//
// and for the cosine, with M = V^ L^T^: dV = (dM L^ - V^ <dM, M>_words)/|V|, dL = (dM^T V^ - L^ <dM^T V^, L^>)/|L|.
//
// A word that a network lacks or masks is attended to with probability 0, so pixel_pixel can compare networks with
// different tokenizers.
#pragma once

#include <cmath>

#include "common/dtype.h"

namespace fastkd::pixel_word {

enum Term { pixel_to_word = 1, word_to_pixel = 2, pixel_pixel = 4, word_word = 8 };
constexpr int term_count = 4;
constexpr int second_order = pixel_pixel | word_word;
constexpr int over_words = pixel_to_word | second_order; // terms that need the softmax over words

constexpr double norm_floor = 1e-12; // shorter rows are divided by this and get a zero gradient

// A (batch, pixels, columns) array. Strides count elements; `pixel` or `column` is 1.
struct Array {
    const void* data;
    DType dtype;
    std::int64_t batch;
    std::int64_t pixel;
    std::int64_t column;
};

struct Side {
    Array pixels; // (B, N, width); if `width` is 0 the logits (B, N, words); null in a backward that does not read them
    // (B, words, width) contiguous; on a CPU in the dtype of the arithmetic, on a GPU in the dtype of the pixels.
    const void* words;
    const std::uint8_t* word_mask; // (B, words), or null
    std::int64_t word_count;
    std::int64_t width;
    double scale;
    bool bf16_words; // every element of `words` is exactly representable in bfloat16
};

struct Problem {
    Side student;
    Side teacher;
    const std::uint8_t* pixel_mask; // (B, N), or null
    std::int64_t batch;
    std::int64_t pixels;
    DType dtype; // of the arithmetic, the losses and the saved arrays: Float32 or Float64
    bool cosine;
    int terms;                    // bitwise or of Term
    std::int64_t workspace_limit; // bytes; exceeded only if a single sample needs more
};

// Arrays saved by the forward for the backward; null if not needed.
struct Kept {
    void* logits;  // (B, words of the student + words of the teacher, N): M if computed from features
    void* norms;   // (B, N) of the student's pixels, for the cosine
    void* columns; // softmax over pixels: (B, 2, words) log-sum-exps of u_S and u_T, double; on a GPU (B, 4, words):
                   // for each network the maximum of M and 1/sum e^{u - scale max}
    void* grams;   // (B, 3, words, words): G, K, E, where words is the larger count
};

struct Workspace {
    std::int64_t bytes;
    std::int64_t minimum; // the smallest possible workspace_limit
};

struct Forward {
    Problem problem;
    Kept kept;  // all null if no backward follows
    void* loss; // (B, 4); 0 for terms not requested
    void* workspace;
};

struct Backward {
    Problem problem;
    Kept kept;
    const void* grad_loss; // (B, 4), any strides
    std::int64_t grad_loss_strides[2];
    Array grad_pixels; // in the student's layout; or null
    void* grad_words;  // (B, words, width) contiguous, in the dtype of the words; or null
    void* workspace;
};

// Contributions of entry (i, j) of G, K, E to n^2 pixel_pixel and n^2 word_word; k_t is that entry of K^T.
template <class T>
FASTKD_HD T pixel_pixel_of(T g, T k, T k_t, T e) {
    return (g + (g - k - k_t + e)) * e + 2 * k * (k_t - e);
}
template <class T>
FASTKD_HD T word_word_of(T k, T k_t, T e) {
    return (k + k_t - e) * (k + k_t - e);
}

// Entry (i, j) of X and of Z, with by_pp = 4/n^2 g_pp and by_ww = 4/n^2 g_ww.
template <class T>
FASTKD_HD T slope_x(T k, T k_t, T e, T by_pp, T by_ww) {
    return by_ww * (k + k_t - e) + by_pp * k;
}
template <class T>
FASTKD_HD T slope_z(T g, T k, T by_pp) {
    return by_pp * (g - k);
}

// Running sums of one word's KL over pixels: like softmax_kl's KLState, but with one scale per network, and maxima of M
// instead of u. A maximum over no pixels is never subtracted.
template <class T>
struct ColumnSums {
    T max_s, max_t;
    T z_s, z_t;
    T a;

    static FASTKD_HD ColumnSums empty() {
        return {-static_cast<T>(HUGE_VALF), -static_cast<T>(HUGE_VALF), T(0), T(0), T(0)};
    }

    // Rescale the sums to larger maxima; smaller ones change nothing.
    FASTKD_HD void raise(T new_max_s, T new_max_t, T scale_s, T scale_t) {
        const T to_s = new_max_s > max_s ? new_max_s : max_s, to_t = new_max_t > max_t ? new_max_t : max_t;
        if (z_s != T(0) || z_t != T(0)) {
            const T by_s = to_s == max_s ? T(0) : rounded_product(max_s - to_s, scale_s);
            const T by_t = to_t == max_t ? T(0) : rounded_product(max_t - to_t, scale_t);
            const T factor = std::exp(by_t);
            a = factor == T(0) ? T(0) : factor * (a + z_t * (by_t - by_s)); // 0 log 0 = 0
            z_t *= factor;
            z_s *= std::exp(by_s);
        }
        max_s = to_s;
        max_t = to_t;
    }

    FASTKD_HD void merge(ColumnSums other, T scale_s, T scale_t) {
        raise(other.max_s, other.max_t, scale_s, scale_t);
        other.raise(max_s, max_t, scale_s, scale_t);
        z_s += other.z_s;
        z_t += other.z_t;
        a += other.a;
    }

    FASTKD_HD T loss() const { return a / z_t + std::log(z_s / z_t); }
};

} // namespace fastkd::pixel_word
