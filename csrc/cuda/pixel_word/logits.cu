// pixel_word on a GPU: logits from features, M = V L^T or cosines, of student and teacher in one launch.
//
// A warp computes 16 pixels and all words. V is loaded from gmem directly into fragments, since no other warp needs it:
// 64 bytes of features per step, 16 per lane, which become the lane's columns of A. This permutes K, in A and B alike.
// Words are in smem, a chunk of their width at a time. 16-bit products are exact in fp32; floats are split into two
// tf32 numbers, and three of the four products are added.
#include "cuda/pixel_word/tile.cuh"

namespace fastkd::cuda::pixel_word {
namespace {

constexpr int step_bytes = 64;              // of a row of features: 16 for each of four lanes
constexpr int most_words_bytes = 40 * 1024; // of smem: at least two thread blocks per SM

enum class Access { rows, maps, any }; // each load: 16 bytes of a pixel; two pixels of a feature; one element

struct SideArgs {
    const void* pixels;
    std::int64_t batch, pixel, column; // strides
    const void* words;                 // (B, count, width)
    const std::uint8_t* mask;
    float* norms; // of the pixels, or null
    int count, width, first_row;
    int chunk; // features of the words that are in smem at a time; a multiple of a step
    Access access;
    bool packed_words; // words are read 16 bytes at a time
};

struct Features {
    SideArgs sides[2];
    int side_count;
    const std::uint8_t* pixel_mask;
    float* logits; // (B, rows, N)
    int rows, pixels;
    bool cosine;
    Runs runs;
};

// Pitch of words in smem: an odd number of steps, so that the eight rows of a fragment lie in different banks.
FASTKD_HD int row_bytes(int chunk_bytes) {
    return chunk_bytes / step_bytes % 2 == 0 ? chunk_bytes + step_bytes : chunk_bytes;
}

// 16 bytes of elements as four 32-bit registers.
using Bits = Pack<std::uint32_t>;

// Load 16 bytes of elements, from `feature` on, of pixels `pixel` and `pixel` + 1; zeros from feature `end` on.
template <Access access, class S>
FASTKD_DEVICE void load_features(const SideArgs& side, const S* from, int feature, int end, int pixel, int pixels,
                                 Bits (&v)[2]) {
    v[0] = v[1] = Bits{};
    if constexpr (access == Access::rows) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (feature < end && pixel + h < pixels) {
                v[h] = load_pack(reinterpret_cast<const std::uint32_t*>(from + (pixel + h) * side.pixel + feature));
            }
        }
    } else {
#pragma unroll
        for (int k = 0; k < Pack<S>::size; ++k) {
            Pair<S> pair{};
            if (feature + k < end && pixel < pixels) {
                const S* at = from + pixel * side.pixel + (feature + k) * side.column;
                if constexpr (access == Access::maps) {
                    pair = *reinterpret_cast<const Pair<S>*>(at);
                } else {
                    pair.at[0] = at[0];
                    pair.at[1] = pixel + 1 < pixels ? at[side.pixel] : S{};
                }
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                if constexpr (sizeof(S) == 4) {
                    v[h].at[k] = bits_of(pair.at[h]);
                } else {
                    v[h].at[k / 2] |= static_cast<std::uint32_t>(pair.at[h].bits) << 16 * (k % 2);
                }
            }
        }
    }
}

// Return element k.
template <class S>
FASTKD_DEVICE float element(const Bits& bits, int k) {
    if constexpr (sizeof(S) == 4) {
        return float_of(bits.at[k]);
    } else {
        return widen(S{static_cast<std::uint16_t>(bits.at[k / 2] >> 16 * (k % 2))});
    }
}

// C += V L^T over one step of features.
template <class S>
FASTKD_DEVICE void multiply(float (&c)[4], const Bits (&v)[2], const Bits& l) {
    float sum[4] = {};
    if constexpr (sizeof(S) == 2) {
#pragma unroll
        for (int s = 0; s < 4; s += 2) {
            multiply_16x8x16<S>(sum, {v[0].at[s], v[1].at[s], v[0].at[s + 1], v[1].at[s + 1]}, {l.at[s], l.at[s + 1]});
        }
    } else {
        std::uint32_t a_high[2][4], a_low[2][4], b_high[2][2], b_low[2][2];
#pragma unroll
        for (int s = 0; s < 2; ++s) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                split(element<S>(v[0], 2 * s + k), a_high[s][2 * k], a_low[s][2 * k]);
                split(element<S>(v[1], 2 * s + k), a_high[s][2 * k + 1], a_low[s][2 * k + 1]);
                split(element<S>(l, 2 * s + k), b_high[s][k], b_low[s][k]);
            }
            multiply_16x8x8(sum, a_low[s], b_high[s]);
            multiply_16x8x8(sum, a_high[s], b_low[s]);
        }
        multiply_16x8x8(sum, a_high[0], b_high[0]);
        multiply_16x8x8(sum, a_high[1], b_high[1]);
    }
    add(c, sum);
}

// Copy the words' features [begin, begin + side.chunk) to smem, with zeros past the width and the last word.
template <class S>
FASTKD_DEVICE void stage_words(const SideArgs& side, std::int64_t sample, int begin, unsigned char* to, int stride) {
    constexpr int size = Pack<S>::size;
    const S* from = static_cast<const S*>(side.words) + sample * side.count * side.width + begin;
    const int packs = side.chunk / size, rows = static_cast<int>(round_up(side.count, tile_words));
    for (int i = thread_x(); i < rows * packs; i += block_threads) {
        const int word = i / packs, feature = i % packs * size;
        const S* at = from + static_cast<std::int64_t>(word) * side.width + feature;
        auto* const target = reinterpret_cast<Pack<S>*>(to + word * stride + feature * static_cast<int>(sizeof(S)));
        const bool inside = word < side.count && begin + feature < side.width;
        if (side.packed_words) {
            copy_async(target, inside ? at : from, inside);
            continue;
        }
        Pack<S> pack{};
        for (int k = 0; inside && k < size && begin + feature + k < side.width; ++k) {
            pack.at[k] = at[k];
        }
        *target = pack;
    }
    copy_async_commit();
}

// Compute 1 / |L| of every word.
template <class S>
FASTKD_DEVICE void word_norms(const SideArgs& side, std::int64_t sample, const Lane& at, float* inverse) {
    for (int word = at.warp; word < side.count; word += block_warps) {
        const S* from = static_cast<const S*>(side.words) + (sample * side.count + word) * side.width;
        float square = 0;
        for (int d = at.lane; d < side.width; d += warp_size) {
            const float l = widen(from[d]);
            square += l * l;
        }
        square = sum_over(square, 1, warp_size);
        const float norm = std::sqrt(square);
        if (at.lane == 0) {
            inverse[word] =
                1 /
                (norm < static_cast<float>(pixel_word::norm_floor) ? static_cast<float>(pixel_word::norm_floor) : norm);
        }
    }
}

// Add V L^T over the `end` features from `first` on, whose words are in smem, to m, and |V|^2 of the lane's features to
// squares.
template <Access access, class S, int most_tiles>
FASTKD_DEVICE void add_products(const SideArgs& side, const S* from, int first, int end, int pixel, int pixels,
                                bool cosine, const unsigned char* words, int stride, const Lane& at,
                                float (&m)[most_tiles][4], float (&squares)[2]) {
    constexpr int size = Pack<S>::size, step = 4 * size; // features
    constexpr int group =
        access == Access::any ? 1 : (most_tiles <= 4 ? 4 : 2); // steps whose loads are in flight together
    words += at.g * stride + at.t * static_cast<int>(sizeof(Bits));
#pragma unroll 1
    for (int begin = 0; begin < end; begin += group * step) {
        Bits v[group][2];
#pragma unroll
        for (int s = 0; s < group; ++s) {
            const int feature = first + begin + s * step + size * at.t;
            load_features<access>(side, from, feature, first + end, pixel, pixels, v[s]);
        }
#pragma unroll
        for (int s = 0; s < group; ++s) {
            const int feature = begin + s * step;
            if (feature >= end) { // smem holds no more features
                break;
            }
            if (cosine) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
#pragma unroll
                    for (int k = 0; k < size; ++k) {
                        const float x = element<S>(v[s][h], k);
                        squares[h] += x * x;
                    }
                }
            }
            const unsigned char* l = words + feature * static_cast<int>(sizeof(S));
#pragma unroll
            for (int j = 0; j < most_tiles; ++j) {
                if (j * tile_words >= side.count) {
                    break;
                }
                const Bits of_words = *reinterpret_cast<const Bits*>(l + j * tile_words * stride); // one 16-byte load
                multiply<S>(m[j], v[s], of_words);
            }
        }
    }
}

// Compute the logits of one run of pixels for one network; of two networks, odd blocks compute the second.
template <class S, int most_tiles>
FASTKD_KERNEL void FASTKD_LAUNCH_BOUNDS_OF(block_threads, most_tiles <= 4 ? 2 : 1) logits_kernel(Features args) {
    FASTKD_DYNAMIC_SHARED(shared);
    const Lane at;
    const bool second = args.side_count == 2 && block_x() % 2 != 0;
    const SideArgs& side = second ? args.sides[1] : args.sides[0];
    const std::int64_t run = block_x() / args.side_count, sample = run / args.runs.blocks_per_sample;
    const int run_of_sample = static_cast<int>(run % args.runs.blocks_per_sample);
    const int stride = row_bytes(side.chunk * static_cast<int>(sizeof(S)));
    float* const inverse_words = reinterpret_cast<float*>(shared); // [most_words]
    unsigned char* const words = shared + (args.cosine ? most_words * sizeof(float) : 0);
    const bool whole = side.chunk >= side.width;
    const S* const from = static_cast<const S*>(side.pixels) + sample * side.batch;

    if (args.cosine) {
        word_norms<S>(side, sample, at, inverse_words);
    }
    if (whole) {
        stage_words<S>(side, sample, 0, words, stride);
        copy_async_wait<0>();
    }
    block_barrier();
    for (int s = 0; s < args.runs.steps_per_block; ++s) {
        const std::int64_t begin =
            (static_cast<std::int64_t>(run_of_sample) * args.runs.steps_per_block + s) * block_warps * tile_pixels;
        if (begin >= args.pixels) {
            break;
        }
        const int pixel = static_cast<int>(begin) + at.warp * tile_pixels + 2 * at.g;
        float m[most_tiles][4] = {}, squares[2] = {};
        for (int first = 0; first < side.width; first += side.chunk) {
            if (!whole) {
                block_barrier();
                stage_words<S>(side, sample, first, words, stride);
                copy_async_wait<0>();
                block_barrier();
            }
            const int end = side.width - first < side.chunk ? side.width - first : side.chunk;
            if (side.access == Access::rows) {
                add_products<Access::rows>(side, from, first, end, pixel, args.pixels, args.cosine, words, stride, at,
                                           m, squares);
            } else if (side.access == Access::maps) {
                add_products<Access::maps>(side, from, first, end, pixel, args.pixels, args.cosine, words, stride, at,
                                           m, squares);
            } else {
                add_products<Access::any>(side, from, first, end, pixel, args.pixels, args.cosine, words, stride, at, m,
                                          squares);
            }
        }
        const bool pixel_ok[2] = {valid(args.pixel_mask, sample, pixel, args.pixels),
                                  valid(args.pixel_mask, sample, pixel + 1, args.pixels)};
        float inverse[2] = {1, 1};
        if (args.cosine) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float norm = std::sqrt(sum_over(squares[h], 1, 4));
                const float least = static_cast<float>(pixel_word::norm_floor);
                inverse[h] = 1 / (norm < least ? least : norm);
                if (side.norms != nullptr && at.t == 0 && pixel + h < args.pixels) {
                    side.norms[sample * args.pixels + pixel + h] = pixel_ok[h] ? norm : 0.0f;
                }
            }
        }
        float* const to = args.logits + (sample * args.rows + side.first_row + 2 * at.t) * args.pixels + pixel;
#pragma unroll
        for (int j = 0; j < most_tiles; ++j) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int word = j * tile_words + 2 * at.t + c;
                if (word >= side.count || pixel >= args.pixels) {
                    continue;
                }
                const bool word_ok = side.mask == nullptr || side.mask[sample * side.count + word] != 0;
                const float by = args.cosine ? inverse_words[word] : 1.0f;
                const Pair<float> pair{{word_ok && pixel_ok[0] ? m[j][c] * inverse[0] * by : 0.0f,
                                        word_ok && pixel_ok[1] ? m[j][2 + c] * inverse[1] * by : 0.0f}};
                float* const row = to + static_cast<std::int64_t>(j * tile_words + c) * args.pixels;
                if (args.pixels % 2 == 0) {
                    *reinterpret_cast<Pair<float>*>(row) = pair;
                } else {
                    row[0] = pair.at[0];
                    if (pixel + 1 < args.pixels) {
                        row[1] = pair.at[1];
                    }
                }
            }
        }
    }
}

SideArgs side_of(const Problem& problem, bool student, float* norms) {
    const Side& side = student ? problem.student : problem.teacher;
    const pixel_word::Array& pixels = side.pixels;
    const std::int64_t size = element_size(pixels.dtype), pack = 16 / size;
    const auto at = reinterpret_cast<std::uintptr_t>(pixels.data);
    const int row = static_cast<int>(round_up(side.word_count, tile_words));
    std::int64_t steps = ceil_div(side.width * size, step_bytes);
    const std::int64_t most = most_words_bytes / row / step_bytes - 1; // one step is padding
    steps = steps < most ? steps : most;
    Access access = Access::any;
    if (pixels.column == 1 && side.width % pack == 0 && pixels.pixel % pack == 0 && pixels.batch % pack == 0 &&
        at % 16 == 0) {
        access = Access::rows;
    } else if (even_pixels(pixels.data, size, problem.pixels, pixels.batch, pixels.pixel, pixels.column)) {
        access = Access::maps;
    }
    return {pixels.data,
            pixels.batch,
            pixels.pixel,
            pixels.column,
            side.words,
            side.word_mask,
            student ? norms : nullptr,
            static_cast<int>(side.word_count),
            static_cast<int>(side.width),
            static_cast<int>(student ? 0 : problem.student.word_count),
            static_cast<int>(steps * step_bytes / size),
            access,
            side.width % pack == 0 && reinterpret_cast<std::uintptr_t>(side.words) % 16 == 0};
}

template <class S>
cudaError_t run(const Features& features, std::int64_t batch, cudaStream_t stream) {
    int bytes = 0, words = 0;
    for (int i = 0; i < features.side_count; ++i) {
        const SideArgs& side = features.sides[i];
        const int of_side =
            static_cast<int>(round_up(side.count, tile_words)) * row_bytes(side.chunk * static_cast<int>(sizeof(S)));
        bytes = of_side > bytes ? of_side : bytes;
        words = side.count > words ? side.count : words;
    }
    bytes += features.cosine ? most_words * static_cast<int>(sizeof(float)) : 0;
    const Grid grid{batch * features.side_count * features.runs.blocks_per_sample, block_threads, 1, bytes};
    return words <= 32 ? launch(logits_kernel<S, 4>, grid, stream, features)
                       : launch(logits_kernel<S, most_words / tile_words>, grid, stream, features);
}

cudaError_t run(const Features& features, DType dtype, std::int64_t batch, cudaStream_t stream) {
    switch (dtype) {
    case DType::Float32:
        return run<float>(features, batch, stream);
    case DType::Float16:
        return run<Half>(features, batch, stream);
    case DType::BFloat16:
        return run<BFloat16>(features, batch, stream);
    default:
        return cudaErrorInvalidValue;
    }
}

} // namespace

cudaError_t compute_logits(const Problem& problem, const Plan& plan, void* logits, void* norms, cudaStream_t stream) {
    Features both{{side_of(problem, true, static_cast<float*>(norms)), side_of(problem, false, nullptr)},
                  2,
                  problem.pixel_mask,
                  static_cast<float*>(logits),
                  static_cast<int>(problem.student.word_count + problem.teacher.word_count),
                  static_cast<int>(problem.pixels),
                  problem.cosine,
                  plan.logits};
    const DType student = problem.student.pixels.dtype, teacher = problem.teacher.pixels.dtype;
    if (student == teacher) {
        return run(both, student, problem.batch, stream);
    }
    Features one = both;
    one.side_count = 1;
    const cudaError_t error = run(one, student, problem.batch, stream);
    if (error != cudaSuccess) {
        return error;
    }
    one.sides[0] = both.sides[1];
    return run(one, teacher, problem.batch, stream);
}

} // namespace fastkd::cuda::pixel_word
