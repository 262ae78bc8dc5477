// How two networks' pixels attend to words, compared: the interface of the kernels and what they compute.
//
// Of one sample: logits M (pixels x words) of student and teacher, M = V L^T or the cosines of V and L, u = scale M
// with scale = 1/tau (1/(tau sqrt D) for the scaled product). A and B are the softmaxes over words of u_S and u_T, Q_S
// and Q_T those over pixels, D = A - B, n valid pixels, t valid words. The four losses are
//
//     pixel_to_word = 1/n sum_p KL(B[p] || A[p])          word_to_pixel = 1/t sum_j KL(Q_T[:, j] || Q_S[:, j])
//     pixel_pixel   = |A A^T - B B^T|^2 / n^2             word_word     = |A^T A - B^T B|^2 / n^2
//
// The second two come from words x words matrices, of which every product holds D, so that nothing cancels as the
// student nears the teacher. With G = A^T A, K = D^T A, E = D^T D: B^T D = K^T - E, B^T B = G - K - K^T + E, and
//
//     |A A^T - B B^T|^2 = <G + B^T B, E> + 2 sum_ij K_ij (B^T D)_ij
//     |A^T A - B^T B|^2 = |W|^2,   W = D^T A + B^T D = K + K^T - E
//
// Gradients, with g_k the gradient of loss k: of the second order, dA = A X + D Z where
//
//     X = 4/n^2 (g_ww W + g_pp K)         Z = 4/n^2 g_pp (G - K)
//
// since d|AA^T - BB^T|^2/dA = 4(D G + B K) and d|W|^2/dA = 4 A W. Then
//
//     du = A (dA - <dA, A>_words) + g_pw/n D + g_wp/t (Q_S - Q_T),   dM = scale du,   dV = dM L,   dL = dM^T V
//
// and for the cosine, with M = V^ L^T^: dV = (dM L^ - V^ <dM, M>_words)/|V|, dL = (dM^T V^ - L^ <dM^T V^, L^>)/|L|.
//
// Words that one network alone has or has masked are words to which it attends with probability 0: that is how
// pixel_pixel compares networks of different tokens.
#pragma once

#include <cmath>

#include "common/dtype.h"

namespace fastkd::pixel_word {

enum Term { pixel_to_word = 1, word_to_pixel = 2, pixel_pixel = 4, word_word = 8 };
constexpr int term_count = 4;
constexpr int second_order = pixel_pixel | word_word;
constexpr int over_words = pixel_to_word | second_order; // those that need the softmax over words

constexpr double norm_floor = 1e-12; // shorter rows have no direction: they are divided by this, and get no gradient

// A (batch, pixels, columns) array, strides in elements: `pixel` or `column` is 1.
struct Array {
    const void* data;
    DType dtype;
    std::int64_t batch;
    std::int64_t pixel;
    std::int64_t column;
};

struct Side {
    Array pixels; // (B, N, width), the logits (B, N, words) if `width` is 0, or nothing in a backward without words
    const void* words; // (B, words, width) contiguous, in the dtype of the arithmetic; on a GPU in that of the pixels
    const std::uint8_t* word_mask; // (B, words), or null
    std::int64_t word_count;
    std::int64_t width;
    double scale;
    bool bf16_words; // each element of `words` is a bfloat16, widened
};

struct Problem {
    Side student;
    Side teacher;
    const std::uint8_t* pixel_mask; // (B, N), or null
    std::int64_t batch;
    std::int64_t pixels;
    DType dtype; // of the arithmetic, the losses and all that is kept: Float32 or Float64
    bool cosine;
    int terms;                    // of Term, or-ed
    std::int64_t workspace_limit; // bytes; exceeded only where one sample takes more
};

// What a backward needs, each null where it does not.
struct Kept {
    void* logits;  // (B, words of the student + words of the teacher, N): M, if it was computed from features
    void* norms;   // (B, N) of the student's pixels, for the cosine
    void* columns; // over pixels: (B, 2, words) log-sum-exps of u_S, u_T, double; on a GPU (B, 4, words), for either
                   // network the maximum of M and 1/sum e^{u - scale max}
    void* grams;   // (B, 3, words, words): G, K, E, words the larger of both counts
};

struct Workspace {
    std::int64_t bytes;
    std::int64_t minimum; // what workspace_limit must be, at least
};

struct Forward {
    Problem problem;
    Kept kept;  // all null: no backward will follow
    void* loss; // (B, 4); 0 where a term was not asked for
    void* workspace;
};

struct Backward {
    Problem problem;
    Kept kept;
    const void* grad_loss; // (B, 4), any strides
    std::int64_t grad_loss_strides[2];
    Array grad_pixels; // the student's layout, which is one of Array's; or null
    void* grad_words;  // (B, words, width) contiguous, in the dtype of the words; or null
    void* workspace;
};

// What entry (i, j) of G, K, E, with k_t that of K^T, adds to n^2 pixel_pixel and to n^2 word_word.
template <class T>
FASTKD_HD T pixel_pixel_of(T g, T k, T k_t, T e) {
    return (g + (g - k - k_t + e)) * e + 2 * k * (k_t - e);
}
template <class T>
FASTKD_HD T word_word_of(T k, T k_t, T e) {
    return (k + k_t - e) * (k + k_t - e);
}

// Entry (i, j) of X and of Z, by_pp = 4/n^2 g_pp and by_ww = 4/n^2 g_ww.
template <class T>
FASTKD_HD T slope_x(T k, T k_t, T e, T by_pp, T by_ww) {
    return by_ww * (k + k_t - e) + by_pp * k;
}
template <class T>
FASTKD_HD T slope_z(T g, T k, T by_pp) {
    return by_pp * (g - k);
}

// The KL over pixels of one word, as far as some pixels have been seen: softmax_kl's KLState with a scale for either
// network and maxima of M, not of u. Of a maximum of nothing no use is made: it is 0 where it is subtracted.
template <class T>
struct ColumnSums {
    T max_s, max_t;
    T z_s, z_t;
    T a;

    static FASTKD_HD ColumnSums of_nothing() {
        return {-static_cast<T>(HUGE_VALF), -static_cast<T>(HUGE_VALF), T(0), T(0), T(0)};
    }

    // Makes the sums relative to larger maxima; smaller ones change nothing.
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
