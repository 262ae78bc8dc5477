// softmax_kl on the CPU. The formulas are those of common/softmax_kl.h; here is how a row is walked.
//
// Forward: a row is taken in blocks that fit the first-level cache. A first pass over a block finds its maxima, a
// second one takes the exponentials relative to the row's maxima so far, so memory is read once. A block's sums are
// kept in vector lanes, a row's in double.
// Backward: one pass, since the log-sum-exps are known.
#include "common/softmax_kl.h"

#include "cpu/kernels.h"
#include "cpu/pages.h"
#include "cpu/softmax_kl/row.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

using softmax_kl::Backward;
using softmax_kl::Forward;
using softmax_kl::KLState;
using softmax_kl::LogSoftmax;
using softmax_kl::RowStrides;
using softmax_kl::Shape;

constexpr std::int64_t block_bytes = 8192;             // of each network's row: both fit the smallest L1 in use, 32 KiB
constexpr std::int64_t thread_elements = 1 << 14;      // fewer are not worth waking a thread for
constexpr std::int64_t stream_bytes = 4 * 1024 * 1024; // a larger gradient would push everything else out of the caches

int useful_threads(Shape shape, int threads) {
    const std::int64_t useful = shape.count() * shape.cols / thread_elements + 1;
    return useful < threads ? static_cast<int>(useful) : threads;
}

FASTKD_INLINE std::int64_t row_offset(RowStrides strides, std::int64_t rows, std::int64_t index) {
    return index / rows * strides.batch + index % rows * strides.row;
}

template <class S>
void forward(const Forward& args, int threads) {
    using T = Compute<S>;
    constexpr std::int64_t block = block_bytes / sizeof(T);
    const Shape shape = args.shape;
    const ScaledExp<T> exp{static_cast<T>(args.inv_temperature)};
    const auto* student = static_cast<const S*>(args.student);
    const auto* teacher = static_cast<const S*>(args.teacher);
    auto* loss = static_cast<T*>(args.loss);
#pragma omp parallel for schedule(static) num_threads(useful_threads(shape, threads))
    for (std::int64_t r = 0; r < shape.count(); ++r) {
        const S* s = student + row_offset(args.student_strides, shape.rows, r);
        const S* t = teacher + row_offset(args.teacher_strides, shape.rows, r);
        const std::int64_t next = r + 1 < shape.count() ? r + 1 : r;
        const S* next_s = student + row_offset(args.student_strides, shape.rows, next);
        const S* next_t = teacher + row_offset(args.teacher_strides, shape.rows, next);
        auto state = KLState<double>::of_nothing();
        for (std::int64_t begin = 0; begin < shape.cols; begin += block) {
            const std::int64_t count = shape.cols - begin < block ? shape.cols - begin : block;
            state.raise(block_max(s + begin, count), block_max(t + begin, count), exp.scale);
            const bool last = begin + block >= shape.cols;
            accumulate(state, s + begin, t + begin, count, exp, last ? next_s : s + begin + block,
                       last ? next_t : t + begin + block);
        }
        const double log_z_s = __builtin_log(state.z_s), log_z_t = __builtin_log(state.z_t);
        loss[r] = static_cast<T>(state.a / state.z_t + (log_z_s - log_z_t)); // KLState::loss
        args.lse_student[r] = softmax_kl::log_sum_exp(state.max_s, log_z_s, args.inv_temperature);
        args.lse_teacher[r] = softmax_kl::log_sum_exp(state.max_t, log_z_t, args.inv_temperature);
    }
}

// One row's gradient: scale (p_s - p_t), scale = d/d loss / tau.
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
        // Up to the first aligned address with one unaligned store; what it writes beyond is written again, the same.
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
        store(padded, gradient(load_end(s, count, count, T(0)), load_end(t, count, count, T(0))));
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

void softmax_kl_forward(const Forward& args, int threads) {
    switch (args.dtype) {
    case DType::Float32:
        return forward<float>(args, threads);
    case DType::Float16:
        return forward<Half>(args, threads);
    case DType::BFloat16:
        return forward<BFloat16>(args, threads);
    case DType::Float64:
        return forward<double>(args, threads);
    }
}

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
