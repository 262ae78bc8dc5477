// The arithmetic of pixel_word on one panel, vectorised along the pixels: a softmax over words runs down the rows, and
// lanes are combined only in sums over pixels.
#pragma once

#include "common/pixel_word.h"
#include "common/softmax_kl.h"
#include "cpu/exp.h"
#include "cpu/pixel_word/panel.h"

namespace fastkd::cpu::FASTKD_ISA {

using softmax_kl::KLState;
using softmax_kl::LogSoftmax;

// Both networks' logits, one row per word.
template <class T>
struct Logits {
    const T* student;
    const T* teacher;
    std::int64_t words;
    std::int64_t stride;
    ScaledExp<T> exp_student;
    ScaledExp<T> exp_teacher;
};

template <class T>
FASTKD_INLINE Vec<T> shift_of(Vec<T> max) {
    return max == softmax_kl::minus_infinity<T>() ? Vec<T>{} : max;
}

// The log of the product of many positive numbers, multiplied lane by lane. 64 factors must not overflow a double.
template <class T>
struct LogProduct {
    using Doubles = typename VectorOf<double, lanes<T>>::type;
    Doubles product = Doubles{} + 1.0;
    double total = 0;
    int pending = 0;

    FASTKD_INLINE void operator*=(Vec<T> factors) {
        product *= __builtin_convertvector(factors, Doubles);
        if (++pending == 64) {
            flush();
        }
    }
    FASTKD_INLINE void flush() {
        for (int i = 0; i < lanes<T>; ++i) {
            total += __builtin_log(product[i]);
        }
        product = Doubles{} + 1.0;
        pending = 0;
    }
};

// Write A and D unless null, prefetching `fetch`. With `kl`, return the sum of KL(B[p] || A[p]) over valid pixels.
template <class T, bool kl>
double attend(const Logits<T>& logits, const Pixels<T>& pixels, T* a, T* d, Prefetch fetch = {}) {
    fetch.spread(pixels.width / lanes<T>);
    const T scale_s = logits.exp_student.scale, ratio_t = logits.exp_teacher.scale / scale_s;
    Vec<T> sum_a{};
    LogProduct<T> ratios; // z_s/z_t, between 1/words and words
    for (std::int64_t p = 0; p < pixels.width; p += lanes<T>) {
        const T* s = logits.student + p;
        const T* t = logits.teacher + p;
        fetch.step();
        Vec<T> max_s = broadcast(softmax_kl::minus_infinity<T>()), max_t = max_s;
        for (std::int64_t k = 0; k < logits.words; ++k) {
            max_s = max(load(s + k * logits.stride), max_s);
            max_t = max(load(t + k * logits.stride), max_t);
        }
        max_s = shift_of<T>(max_s);
        max_t = shift_of<T>(max_t);
        Vec<T> z_s{}, z_t{}, sum{};
        for (std::int64_t k = 0; k < logits.words; ++k) {
            const Vec<T> d_s = load(s + k * logits.stride) - max_s;
            const Vec<T> d_t = load(t + k * logits.stride) - max_t;
            const Vec<T> e_s = logits.exp_student(d_s, T(0), T(0));
            const Vec<T> e_t = logits.exp_teacher(d_t, T(0), T(0));
            z_s += e_s;
            z_t += e_t;
            if constexpr (kl) { // 0 * log 0 = 0; equal logits give exactly 0 even with fused multiply-adds
                sum += e_t == T(0) ? Vec<T>{} : e_t * (d_t * ratio_t - d_s);
            }
            if (a != nullptr) {
                store(a + k * logits.stride + p, e_s);
                store(d + k * logits.stride + p, e_t);
            }
        }
        const Vec<T> inv_s = T(1) / z_s;
        Vec<T> ratio = z_s / z_t;
        if (a != nullptr) {
            for (std::int64_t k = 0; k < logits.words; ++k) {
                const Vec<T> e_s = load(a + k * logits.stride + p), e_t = load(d + k * logits.stride + p);
                store(a + k * logits.stride + p, e_s * inv_s);
                store(d + k * logits.stride + p, (e_s - e_t * ratio) * inv_s);
            }
        }
        if constexpr (kl) {
            Vec<T> per_pixel = sum / z_t * scale_s;
            if (pixels.valid != nullptr) {
                const Vec<T> valid = load(pixels.valid + p);
                per_pixel = valid == T(0) ? Vec<T>{} : per_pixel;
                ratio = valid == T(0) ? broadcast(T(1)) : ratio;
            }
            sum_a += per_pixel;
            ratios *= ratio;
        }
    }
    ratios.flush();
    return ratios.total + sum(sum_a);
}

// The running maxima of a word's unscaled logits.
template <class T>
struct Maxima {
    T student, teacher;
};

// Add the panel's pixels to each word's state; the states refer to the scaled logits.
template <class T>
void accumulate_columns(const Logits<T>& logits, const Pixels<T>& pixels, KLState<double>* states, Maxima<T>* maxima) {
    const T nothing = softmax_kl::minus_infinity<T>();
    const T scale_s = logits.exp_student.scale, scale_t = logits.exp_teacher.scale, ratio_t = scale_t / scale_s;
    for (std::int64_t k = 0; k < logits.words; ++k) {
        const T* s = logits.student + k * logits.stride;
        const T* t = logits.teacher + k * logits.stride;
        const auto masked = [&](const T* row, std::int64_t p) __attribute__((always_inline)) {
            const Vec<T> x = load(row + p);
            return pixels.valid == nullptr ? x : (load(pixels.valid + p) == T(0) ? broadcast(nothing) : x);
        };
        Vec<T> most_s = broadcast(maxima[k].student), most_t = broadcast(maxima[k].teacher);
        for (std::int64_t p = 0; p < pixels.width; p += lanes<T>) {
            most_s = max(masked(s, p), most_s);
            most_t = max(masked(t, p), most_t);
        }
        maxima[k] = {max<T>(most_s), max<T>(most_t)};
        states[k].raise(static_cast<double>(maxima[k].student) * scale_s,
                        static_cast<double>(maxima[k].teacher) * scale_t, 1.0);
        const T shift_s = softmax_kl::shift_of(maxima[k].student), shift_t = softmax_kl::shift_of(maxima[k].teacher);
        Vec<T> z_s{}, z_t{}, sum_a{};
        for (std::int64_t p = 0; p < pixels.width; p += lanes<T>) {
            const Vec<T> d_s = masked(s, p) - shift_s;
            const Vec<T> d_t = masked(t, p) - shift_t;
            const Vec<T> e_t = logits.exp_teacher(d_t, T(0), T(0));
            z_s += logits.exp_student(d_s, T(0), T(0));
            z_t += e_t;
            sum_a += e_t == T(0) ? Vec<T>{} : e_t * (d_t * ratio_t - d_s);
        }
        states[k].add(sum(z_s), sum(z_t), sum(sum_a) * scale_s);
    }
}

// Coefficients of the gradient with respect to the logits. `mix` is X stacked on Z, (2 words, words), or null without
// second-order terms.
template <class T>
struct Coefficients {
    const T* mix;
    bool mixes_d; // Z is not zero
    T pixel_to_word;
    T word_to_pixel;
};

// Write d/dM of the terms over words. `a` is A followed by D; `out` temporarily holds dA.
template <class T>
void gradient_over_words(const Coefficients<T>& by, const T* a, const T* d, std::int64_t words, std::int64_t stride,
                         std::int64_t width, T* out) {
    if (by.mix != nullptr) { // dA = X^T A + Z^T D, words down the rows
        multiply<T>({by.mix, 1, words}, a, stride, out, stride, words, width, by.mixes_d ? 2 * words : words,
                    Walk::down, Store::set);
    }
    for (std::int64_t p = 0; p < width; p += lanes<T>) {
        Vec<T> along{};
        if (by.mix != nullptr) {
            for (std::int64_t k = 0; k < words; ++k) {
                along += load(a + k * stride + p) * load(out + k * stride + p);
            }
        }
        for (std::int64_t k = 0; k < words; ++k) {
            Vec<T> g = by.pixel_to_word * load(d + k * stride + p);
            if (by.mix != nullptr) {
                g += load(a + k * stride + p) * (load(out + k * stride + p) - along);
            }
            store(out + k * stride + p, g);
        }
    }
}

// Write d/dM of word_to_pixel to `out`, or add it if `add`.
template <class T>
void gradient_over_pixels(const Logits<T>& logits, T by, const double* lse_student, const double* lse_teacher,
                          std::int64_t width, bool add, T* out) {
    for (std::int64_t k = 0; k < logits.words; ++k) {
        const double scale_s = logits.exp_student.scale, scale_t = logits.exp_teacher.scale;
        const LogSoftmax<T> log_s(lse_student[k], 1 / scale_s, scale_s), log_t(lse_teacher[k], 1 / scale_t, scale_t);
        const T* s = logits.student + k * logits.stride;
        const T* t = logits.teacher + k * logits.stride;
        T* to = out + k * logits.stride;
        for (std::int64_t p = 0; p < width; p += lanes<T>) {
            const Vec<T> q_s = logits.exp_student(load(s + p) - log_s.center, log_s.high, log_s.low);
            const Vec<T> q_t = logits.exp_teacher(load(t + p) - log_t.center, log_t.high, log_t.low);
            const Vec<T> g = by * (q_s - q_t);
            store(to + p, add ? load(to + p) + g : g);
        }
    }
}

// Write the norms of the pixels; 0 if at most norm_floor.
template <class T>
void pixel_norms(const Panel<T>& panel, std::int64_t columns, std::int64_t padded, std::int64_t width, T* norms) {
    if (panel.by_pixel) {
        for (std::int64_t p = 0; p < width; ++p) {
            Vec<T> squares{};
            for (std::int64_t c = 0; c < padded; c += lanes<T>) {
                const Vec<T> x = load(panel.data + p * panel.stride + c);
                squares += x * x;
            }
            norms[p] = static_cast<T>(sum(squares));
        }
    } else {
        for (std::int64_t p = 0; p < width; p += lanes<T>) {
            Vec<T> squares{};
            for (std::int64_t c = 0; c < columns; ++c) {
                const Vec<T> x = load(panel.data + c * panel.stride + p);
                squares += x * x;
            }
            store(norms + p, squares);
        }
    }
    constexpr T floor = static_cast<T>(pixel_word::norm_floor * pixel_word::norm_floor);
    for (std::int64_t p = 0; p < width; ++p) {
        norms[p] = norms[p] <= floor ? T(0) : static_cast<T>(__builtin_sqrt(static_cast<double>(norms[p])));
    }
}

// Return 1/max(norm, norm_floor).
template <class T>
FASTKD_INLINE Vec<T> inverse_norms(const T* norms) {
    const Vec<T> norm = load(norms);
    return norm == T(0) ? broadcast(static_cast<T>(1 / pixel_word::norm_floor)) : T(1) / norm;
}

} // namespace fastkd::cpu::FASTKD_ISA
