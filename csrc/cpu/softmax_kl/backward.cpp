// softmax_kl on the CPU, backward: one pass with the saved log-sum-exps; the formulas are in common/softmax_kl.h:
//
//     d loss/d s = (p_s - p_t)/tau,     p_x = e^{x/tau - lse_x}
#include "common/softmax_kl.h"

#include "cpu/exp.h"
#include "cpu/kernels.h"
#include "cpu/pages.h"
#include "cpu/softmax_kl/plan.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

using softmax_kl::Backward;
using softmax_kl::LogSoftmax;
using softmax_kl::Shape;

// Write one row's gradient, scale (p_s - p_t) with scale = grad_loss/tau.
template <class S, bool stream, class T = Compute<S>>
FASTKD_INLINE void row_gradient(const S* s, const S* t, S* out, std::int64_t count, LogSoftmax<T> log_s,
                                LogSoftmax<T> log_t, ScaledExp<T> exp, T scale) {
    const auto gradient = [&](Vec<T> x_s, Vec<T> x_t) __attribute__((always_inline)) {
        const Vec<T> p_s = exp(x_s - log_s.center, log_s.high, log_s.low);
        const Vec<T> p_t = exp(x_t - log_t.center, log_t.high, log_t.low);
        return (p_s - p_t) * scale;
    };
    std::int64_t i = 0;
    if constexpr (stream) {
        // One unaligned store reaches the first aligned address; the next store rewrites the overlap with equal values.
        constexpr std::uintptr_t alignment = sizeof(S) * lanes<T>;
        const std::uintptr_t beyond = reinterpret_cast<std::uintptr_t>(out) % alignment;
        if (beyond != 0 && count >= 2 * lanes<T>) {
            store(out, gradient(load(s), load(t)));
            i = static_cast<std::int64_t>((alignment - beyond) / sizeof(S));
        }
        if (beyond == 0 || i > 0) {
            for (; i + lanes<T> <= count; i += lanes<T>) {
                store_stream(out + i, gradient(load(s + i), load(t + i)));
            }
        }
    }
    for (; i + lanes<T> <= count; i += lanes<T>) {
        store(out + i, gradient(load(s + i), load(t + i)));
    }
    if (i == count) {
        return;
    }
    if (count >= lanes<T>) {
        store(out + count - lanes<T>, gradient(load(s + count - lanes<T>), load(t + count - lanes<T>)));
    } else {
        S padded[lanes<T>];
        store(padded, gradient(load_tail(s, count, count, T(0)), load_tail(t, count, count, T(0))));
        __builtin_memcpy(out, padded, count * sizeof(S));
    }
}

template <class S, bool stream>
void backward(const Backward& args, int threads) {
    using T = Compute<S>;
    const Shape shape = args.shape;
    const ScaledExp<T> exp{static_cast<T>(args.inv_temperature)};
    const auto* student = static_cast<const S*>(args.student);
    const auto* teacher = static_cast<const S*>(args.teacher);
    const auto* grad_loss = static_cast<const T*>(args.grad_loss);
    auto* grad_student = static_cast<S*>(args.grad_student);
#pragma omp parallel num_threads(useful_threads(shape, threads))
    {
#pragma omp for schedule(static) nowait
        for (std::int64_t r = 0; r < shape.count(); ++r) {
            const S* s = student + row_offset(args.student_strides, shape.rows, r);
            const S* t = teacher + row_offset(args.teacher_strides, shape.rows, r);
            const T scale =
                static_cast<T>(grad_loss[row_offset(args.grad_loss_strides, shape.rows, r)] * args.inv_temperature);
            row_gradient<S, stream>(s, t, grad_student + r * shape.cols, shape.cols,
                                    LogSoftmax<T>(args.lse_student[r], args.temperature, args.inv_temperature),
                                    LogSoftmax<T>(args.lse_teacher[r], args.temperature, args.inv_temperature), exp,
                                    scale);
        }
        if constexpr (stream) {
            stream_fence();
        }
    }
}

template <class S>
void backward_to(const Backward& args, int threads) {
    const std::int64_t bytes = args.shape.count() * args.shape.cols * static_cast<std::int64_t>(sizeof(S));
    const bool large = bytes >= stream_bytes;
    advise_huge_pages(args.grad_student, bytes);
    large ? backward<S, true>(args, threads) : backward<S, false>(args, threads);
}

} // namespace

void softmax_kl_backward(const Backward& args, int threads) {
    switch (args.dtype) {
    case DType::Float32:
        return backward_to<float>(args, threads);
    case DType::Float16:
        return backward_to<Half>(args, threads);
    case DType::BFloat16:
        return backward_to<BFloat16>(args, threads);
    case DType::Float64:
        return backward_to<double>(args, threads);
    }
}

} // namespace fastkd::cpu::FASTKD_ISA
