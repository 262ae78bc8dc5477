// softmax_kl on a GPU. Formulas: common/softmax_kl.h.
//
// A group of threads computes a row: one warp if rows are short (several rows per thread block), otherwise the whole
// thread block. Each thread reads its part of the row 16 bytes at a time into a KLState. The states of a group are
// raised to common maxima and added in a fixed order, lanes by shuffles, then warps through smem. No atomics: every
// run gives the same bits.
#include "common/softmax_kl.h"

#include "cuda/device.cuh"
#include "cuda/kernels.h"

namespace fastkd::cuda {
namespace {

using softmax_kl::Backward;
using softmax_kl::Forward;
using softmax_kl::KLState;
using softmax_kl::log_of_sum;
using softmax_kl::LogSoftmax;
using softmax_kl::RowStrides;

constexpr int block_threads = 256;
// Four blocks per SM leave a thread 64 registers: more rows in flight than with the 86 that ptxas prefers. Doubles
// would spill.
template <class S>
constexpr int min_blocks_per_sm = sizeof(S) == 8 ? 2 : 4;
constexpr std::int64_t short_row_bytes = 8192; // longest row for one warp: chosen, not measured
constexpr std::int64_t max_blocks = 1 << 20;   // with more rows each thread block loops over several

FASTKD_DEVICE std::int64_t row_offset(RowStrides strides, std::int64_t rows, std::int64_t index) {
    return index / rows * strides.batch + index % rows * strides.row;
}

// A row in three parts: elements up to the first multiple of 16 bytes, packs of 16 bytes, remaining elements. Where the
// arrays' addresses differ modulo 16 bytes there are no packs, and all elements are in the last part.
template <class S>
struct RowParts {
    std::int64_t head = 0;
    std::int64_t packs = 0;
    std::int64_t tail_begin = 0;

    FASTKD_DEVICE RowParts(const S* a, const S* b, const S* c, std::int64_t cols) {
        const auto beyond = reinterpret_cast<std::uintptr_t>(a) % 16;
        if (reinterpret_cast<std::uintptr_t>(b) % 16 != beyond || reinterpret_cast<std::uintptr_t>(c) % 16 != beyond) {
            return;
        }
        head = static_cast<std::int64_t>((16 - beyond) % 16 / sizeof(S));
        if (head > cols) {
            head = cols;
        }
        packs = (cols - head) / Pack<S>::size;
        tail_begin = head + packs * Pack<S>::size;
    }
};

template <class T>
FASTKD_DEVICE T max_of_lanes(T value) {
#pragma unroll
    for (int mask = warp_size / 2; mask > 0; mask /= 2) {
        const T other = shuffle_xor(value, mask);
        value = other > value ? other : value;
    }
    return value;
}

template <class T>
FASTKD_DEVICE T sum_of_lanes(T value) {
#pragma unroll
    for (int mask = warp_size / 2; mask > 0; mask /= 2) {
        value += shuffle_xor(value, mask);
    }
    return value;
}

// Merge a warp's states; every lane gets the result.
template <class T>
FASTKD_DEVICE void merge_lanes(KLState<T>& state, T inv_temperature) {
    state.raise(max_of_lanes(state.max_s), max_of_lanes(state.max_t), inv_temperature);
    state.z_s = sum_of_lanes(state.z_s);
    state.z_t = sum_of_lanes(state.z_t);
    state.a = sum_of_lanes(state.a);
}

// Merge the states of `warps` warps; the first warp gets the result.
template <int warps, class T>
FASTKD_DEVICE void merge_warps(KLState<T>& state, int lane, T inv_temperature) {
    FASTKD_SHARED KLState<T> of_warp[warps];
    if (lane % warp_size == 0) {
        of_warp[lane / warp_size] = state;
    }
    block_barrier();
    if (lane < warp_size) {
        state = lane < warps ? of_warp[lane] : KLState<T>::empty();
        merge_lanes(state, inv_temperature);
    }
    block_barrier(); // before of_warp is overwritten
}

// blockDim is (group, groups): `group` threads per row.
template <class S, int group>
FASTKD_KERNEL void FASTKD_LAUNCH_BOUNDS_OF(block_threads, min_blocks_per_sm<S>) forward_kernel(Forward args) {
    using T = Compute<S>;
    constexpr int groups = block_threads / group;
    constexpr int warps = group / warp_size;
    const T inv_temperature = static_cast<T>(args.inv_temperature);
    const int lane = thread_x();
    for (std::int64_t first = block_x() * groups; first < args.shape.count(); first += grid_x() * groups) {
        const std::int64_t row = first + thread_y();
        const bool mine = row < args.shape.count();
        auto state = KLState<T>::empty();
        if (mine) {
            const S* s = static_cast<const S*>(args.student) + row_offset(args.student_strides, args.shape.rows, row);
            const S* t = static_cast<const S*>(args.teacher) + row_offset(args.teacher_strides, args.shape.rows, row);
            const RowParts<S> parts(s, t, t, args.shape.cols);
            const auto one = [&](std::int64_t i) {
                const T x_s[1] = {widen(s[i])}, x_t[1] = {widen(t[i])};
                state.add_logits(x_s, x_t, inv_temperature);
            };
            for (std::int64_t i = lane; i < parts.head; i += group) {
                one(i);
            }
            for (std::int64_t i = lane; i < parts.packs; i += group) {
                constexpr int size = Pack<S>::size;
                const Pack<S> pack_s = load_pack(s + parts.head + i * size);
                const Pack<S> pack_t = load_pack(t + parts.head + i * size);
                T x_s[size], x_t[size];
#pragma unroll
                for (int k = 0; k < size; ++k) {
                    x_s[k] = widen(pack_s.at[k]);
                    x_t[k] = widen(pack_t.at[k]);
                }
                state.add_logits(x_s, x_t, inv_temperature);
            }
            for (std::int64_t i = parts.tail_begin + lane; i < args.shape.cols; i += group) {
                one(i);
            }
        }
        merge_lanes(state, inv_temperature);
        if constexpr (warps > 1) {
            merge_warps<warps>(state, lane, inv_temperature);
        }
        if (mine && lane == 0) {
            static_cast<T*>(args.loss)[row] = state.loss();
            args.lse_student[row] = softmax_kl::log_sum_exp(state.max_s, log_of_sum(state.z_s), args.inv_temperature);
            args.lse_teacher[row] = softmax_kl::log_sum_exp(state.max_t, log_of_sum(state.z_t), args.inv_temperature);
        }
    }
}

template <class S, int group>
FASTKD_KERNEL void FASTKD_LAUNCH_BOUNDS_OF(block_threads, min_blocks_per_sm<S>) backward_kernel(Backward args) {
    using T = Compute<S>;
    constexpr int groups = block_threads / group;
    const T inv_temperature = static_cast<T>(args.inv_temperature);
    const int lane = thread_x();
    for (std::int64_t row = block_x() * groups + thread_y(); row < args.shape.count(); row += grid_x() * groups) {
        const S* s = static_cast<const S*>(args.student) + row_offset(args.student_strides, args.shape.rows, row);
        const S* t = static_cast<const S*>(args.teacher) + row_offset(args.teacher_strides, args.shape.rows, row);
        S* out = static_cast<S*>(args.grad_student) + row * args.shape.cols;
        const T grad_loss =
            static_cast<const T*>(args.grad_loss)[row_offset(args.grad_loss_strides, args.shape.rows, row)];
        const T scale = static_cast<T>(grad_loss * args.inv_temperature);
        const LogSoftmax<T> log_s(args.lse_student[row], args.temperature, args.inv_temperature);
        const LogSoftmax<T> log_t(args.lse_teacher[row], args.temperature, args.inv_temperature);
        const auto gradient = [&](S stored_s, S stored_t) {
            const T p_s = std::exp((widen(stored_s) - log_s.center) * inv_temperature - log_s.high - log_s.low);
            const T p_t = std::exp((widen(stored_t) - log_t.center) * inv_temperature - log_t.high - log_t.low);
            return narrow<S>((p_s - p_t) * scale);
        };
        const RowParts<S> parts(s, t, out, args.shape.cols);
        for (std::int64_t i = lane; i < parts.head; i += group) {
            out[i] = gradient(s[i], t[i]);
        }
        for (std::int64_t i = lane; i < parts.packs; i += group) {
            constexpr int size = Pack<S>::size;
            const Pack<S> pack_s = load_pack(s + parts.head + i * size);
            const Pack<S> pack_t = load_pack(t + parts.head + i * size);
            Pack<S> pack;
#pragma unroll
            for (int k = 0; k < size; ++k) {
                pack.at[k] = gradient(pack_s.at[k], pack_t.at[k]);
            }
            store_pack(out + parts.head + i * size, pack);
        }
        for (std::int64_t i = parts.tail_begin + lane; i < args.shape.cols; i += group) {
            out[i] = gradient(s[i], t[i]);
        }
    }
}

template <int group>
Grid grid_of(std::int64_t rows) {
    constexpr int groups = block_threads / group;
    const std::int64_t blocks = ceil_div(rows, groups);
    return {blocks < max_blocks ? blocks : max_blocks, group, groups};
}

template <class S>
cudaError_t forward(const Forward& args, cudaStream_t stream) {
    if (args.shape.cols * static_cast<std::int64_t>(sizeof(S)) <= short_row_bytes) {
        return launch(forward_kernel<S, warp_size>, grid_of<warp_size>(args.shape.count()), stream, args);
    }
    return launch(forward_kernel<S, block_threads>, grid_of<block_threads>(args.shape.count()), stream, args);
}

template <class S>
cudaError_t backward(const Backward& args, cudaStream_t stream) {
    if (args.shape.cols * static_cast<std::int64_t>(sizeof(S)) <= short_row_bytes) {
        return launch(backward_kernel<S, warp_size>, grid_of<warp_size>(args.shape.count()), stream, args);
    }
    return launch(backward_kernel<S, block_threads>, grid_of<block_threads>(args.shape.count()), stream, args);
}

} // namespace

cudaError_t softmax_kl_forward(const Forward& args, cudaStream_t stream) {
    switch (args.dtype) {
    case DType::Float32:
        return forward<float>(args, stream);
    case DType::Float16:
        return forward<Half>(args, stream);
    case DType::BFloat16:
        return forward<BFloat16>(args, stream);
    case DType::Float64:
        return forward<double>(args, stream);
    }
    return cudaErrorInvalidValue;
}

cudaError_t softmax_kl_backward(const Backward& args, cudaStream_t stream) {
    switch (args.dtype) {
    case DType::Float32:
        return backward<float>(args, stream);
    case DType::Float16:
        return backward<Half>(args, stream);
    case DType::BFloat16:
        return backward<BFloat16>(args, stream);
    case DType::Float64:
        return backward<double>(args, stream);
    }
    return cudaErrorInvalidValue;
}

} // namespace fastkd::cuda
