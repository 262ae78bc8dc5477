// softmax_kl on the CPU, forward; the formulas are in common/softmax_kl.h:
//
//     loss = KL(softmax(t/tau) || softmax(s/tau))
//
// A row is processed in blocks that fit the L1 cache. The first pass over a block finds its maxima, the second takes
// the exponentials relative to the row's running maxima, so memory is read once. A block's sums are accumulated in
// vector lanes, a row's in double.
#include "common/softmax_kl.h"

#include "cpu/kernels.h"
#include "cpu/softmax_kl/plan.h"
#include "cpu/softmax_kl/row.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

using softmax_kl::Forward;
using softmax_kl::KLState;
using softmax_kl::Shape;

constexpr std::int64_t block_bytes = 8192; // of each network's row: both fit an L1 of 32 KiB

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
        auto state = KLState<double>::empty();
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

} // namespace fastkd::cpu::FASTKD_ISA
