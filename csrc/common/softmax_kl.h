// KL(softmax(t/tau) || softmax(s/tau)) of matching rows of two arrays: the kernels' interface and their formulas.
//
// With u = (x - max x)/tau for x = s, t and z = sum e^u (at least 1),
//
//     loss = a/z_t + log(z_s/z_t),     a = sum e^{u_t} (u_t - u_s),     lse = max/tau + log z
//     d loss/d s = (p_s - p_t)/tau,    p_x = e^{x/tau - lse_x}
//
// The maxima are subtracted before any product or sum, so the result is as accurate at logits of 1e4 as at 1, and
// student == teacher gives 0. One pass over a row is enough: KLState rescales the sums over parts of a row to common
// maxima and adds them.
#pragma once

#include <cmath>

#include "common/dtype.h"

namespace fastkd::softmax_kl {

// The rows lie in a (batch, rows, cols) array whose innermost stride is 1. Strides count elements.
struct RowStrides {
    std::int64_t batch;
    std::int64_t row;
};

struct Shape {
    std::int64_t batch;
    std::int64_t rows;
    std::int64_t cols;
    FASTKD_HD std::int64_t count() const { return batch * rows; }
};

// `loss` and `grad_loss` are float, double for Float64. The log-sum-exps are double for every dtype: a float
// cannot hold a maximum of 1e4 plus a logarithm, and its error of 5e-4 would carry over to the gradient.
struct Forward {
    const void* student;
    const void* teacher;
    void* loss;          // (batch, rows)
    double* lse_student; // (batch, rows)
    double* lse_teacher; // (batch, rows)
    Shape shape;
    RowStrides student_strides;
    RowStrides teacher_strides;
    DType dtype;
    double temperature;
    double inv_temperature;
};

struct Backward {
    const void* grad_loss;
    RowStrides grad_loss_strides; // any, including 0
    const void* student;
    const void* teacher;
    const double* lse_student;
    const double* lse_teacher;
    void* grad_student; // (batch, rows, cols) contiguous, in the student's dtype
    Shape shape;
    RowStrides student_strides;
    RowStrides teacher_strides;
    DType dtype;
    double temperature;
    double inv_temperature;
};

template <class T>
FASTKD_HD T minus_infinity() {
    return -static_cast<T>(HUGE_VALF);
}

// Return the value to subtract for a maximum: a part of a row that is all -inf must give e^u = 0, not NaN.
template <class T>
FASTKD_HD T shift_of(T max) {
    return max == minus_infinity<T>() ? T(0) : max;
}

// Sums over a part of a row, relative to the maxima of that part. NaN and +inf turn the sums into NaN.
template <class T>
struct KLState {
    T max_s, max_t;
    T z_s, z_t;
    T a;

    static FASTKD_HD KLState empty() { return {minus_infinity<T>(), minus_infinity<T>(), T(0), T(0), T(0)}; }

    // Rescale the sums to larger maxima; smaller ones change nothing.
    FASTKD_HD void raise(T new_max_s, T new_max_t, T inv_temperature) {
        const T to_s = new_max_s > max_s ? new_max_s : max_s;
        const T to_t = new_max_t > max_t ? new_max_t : max_t;
        if (z_s == T(0) && z_t == T(0)) { // no sums to rescale yet
            max_s = to_s;
            max_t = to_t;
            return;
        }
        const T by_s = to_s == max_s ? T(0) : (max_s - to_s) * inv_temperature;
        const T by_t = to_t == max_t ? T(0) : (max_t - to_t) * inv_temperature;
        const T scale_t = std::exp(by_t);
        // Mass that underflows becomes 0, even where the student's probability is 0 and `a` is infinite.
        a = scale_t == T(0) ? T(0) : scale_t * (a + z_t * (by_t - by_s));
        z_t *= scale_t;
        z_s *= std::exp(by_s);
        max_s = to_s;
        max_t = to_t;
    }

    // Add sums relative to this state's maxima.
    FASTKD_HD void add(T more_z_s, T more_z_t, T more_a) {
        z_s += more_z_s;
        z_t += more_z_t;
        a += more_a;
    }

    // Add pairs of logits after raising the maxima once for all of them.
    template <int count>
    FASTKD_HD void add_logits(const T (&x_s)[count], const T (&x_t)[count], T inv_temperature) {
        T new_s = max_s, new_t = max_t;
        for (int k = 0; k < count; ++k) {
            new_s = x_s[k] > new_s ? x_s[k] : new_s;
            new_t = x_t[k] > new_t ? x_t[k] : new_t;
        }
        if (new_s > max_s || new_t > max_t) {
            raise(new_s, new_t, inv_temperature);
        }
        const T shift_s = shift_of(max_s), shift_t = shift_of(max_t);
        for (int k = 0; k < count; ++k) {
            const T u_s = (x_s[k] - shift_s) * inv_temperature;
            const T u_t = (x_t[k] - shift_t) * inv_temperature;
            const T e_t = std::exp(u_t);
            // 0 * log 0 = 0: where the teacher's probability is 0, the student's may be too.
            add(std::exp(u_s), e_t, e_t == T(0) ? T(0) : e_t * (u_t - u_s));
        }
    }

    // Add the sums over another part of the row.
    FASTKD_HD void merge(KLState other, T inv_temperature) {
        raise(other.max_s, other.max_t, inv_temperature);
        other.raise(max_s, max_t, inv_temperature);
        add(other.z_s, other.z_t, other.a);
    }

    FASTKD_HD T loss() const { return a / z_t + std::log(z_s / z_t); }
};

// Return log z of a row's sum. For a float the exponent is split off first: the error is then 2e-8 instead of 5e-7 at
// 1e4 columns, and it enters every probability of the row.
FASTKD_HD double log_of_sum(double z) {
    return std::log(z);
}
FASTKD_HD double log_of_sum(float z) {
    if (!(z < HUGE_VALF)) {
        return z;
    }
    int exponent;
    float mantissa = std::frexp(z, &exponent);
    if (mantissa < 0.70710678f) {
        mantissa *= 2;
        --exponent;
    }
    return exponent * 0.693147180559945309 + std::log(mantissa);
}

FASTKD_HD double log_sum_exp(double max, double z_log, double inv_temperature) {
    return max * inv_temperature + z_log;
}

// x/tau - lse = (x - center)/tau - high - low, split so that no significant part is rounded. A large lse implies a
// large logit, and x - center is exact for logits near it. Otherwise, with fused multiply-adds, the center is 0 and
// x/tau is not rounded. `high` is a multiple of `grid`, as is the high part of exp's n ln 2, so both are subtracted at
// once without rounding.
template <class T>
struct LogSoftmax {
    static constexpr double grid = sizeof(T) == 4 ? 0x1p-15 : 0x1p-41;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__CUDACC__)
    static constexpr double largest = 32; // |lse| up to which the center is 0
#else
    static constexpr double largest = 0;
#endif
    T center, high, low;

    FASTKD_HD LogSoftmax(double lse, double temperature, double inv_temperature) {
        center = lse > -largest && lse < largest ? T(0) : static_cast<T>(lse * temperature);
        const double rest = lse - static_cast<double>(center) * inv_temperature;
        high = static_cast<T>(std::floor(rest / grid + 0.5) * grid);
        low = static_cast<T>(rest - static_cast<double>(high));
    }
};

} // namespace fastkd::softmax_kl
