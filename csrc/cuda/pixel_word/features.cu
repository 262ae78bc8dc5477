// pixel_word on a GPU, backward: dV = dM L and dL = dM^T V from dM. For the cosine, gradient.cu writes dM/|V| instead
// of dM, and <dM, M>/|V|^2 as `projections`: dV = dM L^ - projection V, and merge_words removes the part of dL along L.
//
// A warp computes 32 features (16 if they, or the words, would need too many registers), 16 pixels per step: lane (g,
// t) holds V of features 4g to 4g + 3 (2g, 2g + 1) and pixels 4t to 4t + 3, loaded in a few accesses in either layout.
// Both products are in tf32 and transposed, with features as rows: the lane's V^T is an A fragment, and the C fragments
// of dV^T hold the same entries, so V is read once for both. Row g + 8 h of fragment tile m is feature 4g + 2m + h (2g
// + h); column t of step s is pixel 4t + 2s, column t + 4 the pixel after it. dM and 32-bit features are split into two
// tf32 numbers; 16-bit features are exact.
#include "cuda/pixel_word/tile.cuh"

namespace fastkd::cuda::pixel_word {
namespace {

using pixel_word::Backward;

constexpr int few_tiles = 4; // of words

enum class Access { rows, maps, any }; // a lane's features of a pixel, four pixels of a feature, one element

// Elements read or written by one instruction.
template <class S, int count>
struct alignas(count * sizeof(S)) Run {
    S at[count];
};

struct Strided {
    void* data; // or null
    std::int64_t batch, pixel, column;
    Access access;
};

struct Features {
    Strided pixels; // V; only read for dL or the cosine
    Strided grad_pixels;
    const void* words; // L (B, T, D)
    const std::uint8_t* word_mask;
    const std::uint8_t* pixel_mask;
    const float* grad_logits; // dM (B, T, N)
    const float* norms;       // |V| (B, N); or null without the cosine
    const float* projections; // (B, N); or null without the cosine
    float* sums;              // (B, runs, T, D); or null without dL
    int pixel_count, count, width;
    int feature_warps, chunks; // warps across features per thread block; thread blocks across features
    bool quads;                // four pixels of dM are read together
    Runs runs;
};

constexpr float least_norm = static_cast<float>(pixel_word::norm_floor);

// Load v[q][f], pixel `pixel` + q, feature `feature` + f; 0 outside and where the pixel is masked. Addresses are
// incremented: computed addresses would occupy registers across steps.
template <class S, int lane_features>
FASTKD_DEVICE void load_features(const Strided& array, const S* from, int pixel, int feature, int width,
                                 const bool (&ok)[4], float (&v)[4][lane_features]) {
    from += pixel * array.pixel + feature * array.column;
    if (array.access == Access::rows) {
#pragma unroll
        for (int q = 0; q < 4; ++q, from += array.pixel) {
            Run<S, lane_features> run{};
            if (ok[q] && feature < width) {
                run = *reinterpret_cast<const Run<S, lane_features>*>(from);
            }
#pragma unroll
            for (int f = 0; f < lane_features; ++f) {
                v[q][f] = widen(run.at[f]);
            }
        }
    } else if (array.access == Access::maps) {
#pragma unroll
        for (int f = 0; f < lane_features; ++f, from += array.column) {
            Run<S, 4> run{};
            if ((ok[0] || ok[1] || ok[2] || ok[3]) && feature + f < width) {
                run = *reinterpret_cast<const Run<S, 4>*>(from);
            }
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                v[q][f] = ok[q] ? widen(run.at[q]) : 0.0f;
            }
        }
    } else {
#pragma unroll
        for (int q = 0; q < 4; ++q, from += array.pixel) {
            const S* at = from;
#pragma unroll
            for (int f = 0; f < lane_features; ++f, at += array.column) {
                v[q][f] = ok[q] && feature + f < width ? widen(*at) : 0.0f;
            }
        }
    }
}

// Store dv in the layout of load_features.
template <class S, int lane_features>
FASTKD_DEVICE void store_features(const Strided& array, S* to, int pixel, int pixels, int feature, int width,
                                  const float (&dv)[4][lane_features]) {
    to += pixel * array.pixel + feature * array.column;
    if (array.access == Access::rows) {
#pragma unroll
        for (int q = 0; q < 4; ++q, to += array.pixel) {
            Run<S, lane_features> run;
#pragma unroll
            for (int f = 0; f < lane_features; ++f) {
                run.at[f] = narrow<S>(dv[q][f]);
            }
            if (pixel + q < pixels && feature < width) {
                *reinterpret_cast<Run<S, lane_features>*>(to) = run;
            }
        }
    } else if (array.access == Access::maps) {
#pragma unroll
        for (int f = 0; f < lane_features; ++f, to += array.column) {
            Run<S, 4> run;
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                run.at[q] = narrow<S>(dv[q][f]);
            }
            if (pixel < pixels && feature + f < width) {
                *reinterpret_cast<Run<S, 4>*>(to) = run;
            }
        }
    } else {
#pragma unroll
        for (int q = 0; q < 4; ++q, to += array.pixel) {
            S* at = to;
#pragma unroll
            for (int f = 0; f < lane_features; ++f, at += array.column) {
                if (pixel + q < pixels && feature + f < width) {
                    *at = narrow<S>(dv[q][f]);
                }
            }
        }
    }
}

// C += A B of split floats; with `exact` A's low parts are 0.
template <bool exact>
FASTKD_DEVICE void multiply(float (&c)[4], const std::uint32_t (&a_high)[4], const std::uint32_t (&a_low)[4],
                            const std::uint32_t (&b_high)[2], const std::uint32_t (&b_low)[2]) {
    if constexpr (!exact) {
        multiply_16x8x8(c, a_low, b_high);
    }
    multiply_16x8x8(c, a_high, b_low);
    multiply_16x8x8(c, a_high, b_high);
}

// Compute 1/|L| of every word; 0 for masked words, even if they hold NaN.
template <class S>
FASTKD_DEVICE void word_norms(const Features& args, std::int64_t sample, const Lane& at, float* inverse) {
    for (int word = at.warp; word < args.count; word += block_warps) {
        const S* from = static_cast<const S*>(args.words) + (sample * args.count + word) * args.width;
        float square = 0;
        for (int d = at.lane; d < args.width; d += warp_size) {
            square += widen(from[d]) * widen(from[d]);
        }
        const float norm = std::sqrt(sum_over(square, 1, warp_size));
        const bool ok = valid(args.word_mask, sample, word, args.count);
        if (at.lane == 0) {
            inverse[word] = ok ? 1 / (norm < least_norm ? least_norm : norm) : 0.0f;
        }
    }
}

// Compute dV and the partial sums of dL of one run of pixels and one chunk of features.
template <class S, int most_tiles>
FASTKD_KERNEL void FASTKD_LAUNCH_BOUNDS_OF(block_threads, most_tiles <= few_tiles ? 2 : 1)
    features_kernel(Features args) {
    constexpr bool exact = sizeof(S) == 2;
    constexpr int warp_features = warp_features_of(most_tiles * tile_words, sizeof(S)),
                  lane_features = warp_features / 8;
    constexpr int fragments_m = lane_features / 2; // of 16 features
    FASTKD_DYNAMIC_SHARED(shared);
    const Lane at;
    const int block = static_cast<int>(block_x()), run = block / args.chunks; // below 2^31
    const int run_of_sample = run % args.runs.blocks_per_sample;
    const std::int64_t sample = run / args.runs.blocks_per_sample;
    const int of_features = at.warp % args.feature_warps, of_pixels = at.warp / args.feature_warps;
    const int pixel_warps = block_warps / args.feature_warps, step = pixel_warps * tile_pixels;
    const int first_feature = block % args.chunks * args.feature_warps * warp_features;
    const int feature = first_feature + of_features * warp_features + lane_features * at.g;
    const int tiles = ceil_div(args.count, tile_words);
    const bool cosine = args.norms != nullptr;

    // smem: 1/|L|; L as A fragments, [warp of features][8 words][tile of 16 features][lane], later reused for dL.
    float* const inverse_words = reinterpret_cast<float*>(shared); // [most_words]
    auto* const fragments = reinterpret_cast<Pack<float>*>(shared + most_words * sizeof(float));
    Pack<float>* const own_fragments = fragments + of_features * tiles * fragments_m * warp_size + at.lane;
    if (cosine) {
        word_norms<S>(args, sample, at, inverse_words);
    }
    for (int i = thread_x(); i < args.feature_warps * tiles * fragments_m * warp_size; i += block_threads) {
        const int lane = i % warp_size, m = i / warp_size % fragments_m, tile = i / (fragments_m * warp_size);
        const int word = tile % tiles * tile_words + lane % 4;
        const int column = first_feature + tile / tiles * warp_features + lane / 4 * lane_features + 2 * m;
        for (int k = 0; k < 4; ++k) { // rows, then columns of the fragment
            const int w = word + k / 2 * 4, d = column + k % 2;
            const bool ok = valid(args.word_mask, sample, w, args.count) && d < args.width;
            fragments[i].at[k] =
                ok ? widen(static_cast<const S*>(args.words)[(sample * args.count + w) * args.width + d]) : 0.0f;
        }
    }
    block_barrier();

    const S* const from = static_cast<const S*>(args.pixels.data) + sample * args.pixels.batch;
    S* const to = static_cast<S*>(args.grad_pixels.data) + sample * args.grad_pixels.batch;
    const bool for_pixels = args.grad_pixels.data != nullptr, for_words = args.sums != nullptr;
    const float* const grad_logits = args.grad_logits + sample * args.count * args.pixel_count;
    float dl[most_tiles][fragments_m][4] = {}; // [8 words][tile of features]
#pragma unroll 1
    for (int s = 0; s < args.runs.steps_per_block; ++s) {
        const int first_pixel = (run_of_sample * args.runs.steps_per_block + s) * step + of_pixels * tile_pixels;
        if (first_pixel >= args.pixel_count) {
            break;
        }
        const int pixel = first_pixel + 4 * at.t;
        bool ok[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            ok[q] = valid(args.pixel_mask, sample, pixel + q, args.pixel_count);
        }
        float v[4][lane_features] = {};
        if (for_words || cosine) {
            load_features(args.pixels, from, pixel, feature, args.width, ok, v);
        }
        float dv[fragments_m][2][4] = {};   // [tile of features][step of pixels]
        const float* of_tile = grad_logits; // uniform over lanes
        const unsigned row = static_cast<unsigned>(at.g) * args.pixel_count + pixel;
        const int of_column = first_pixel + at.g / 2 * 4 + at.g % 2; // and of_column + 2
        const unsigned column = static_cast<unsigned>(at.t) * args.pixel_count + of_column;
#pragma unroll
        for (int j = 0; j < most_tiles; ++j) {
            if (j >= tiles) {
                break;
            }
            if (for_words) { // words are columns; sums over pixels
                const int word = j * tile_words + at.g;
                Run<float, 4> dm{};
                if (word < args.count && args.quads && pixel < args.pixel_count) {
                    dm = *reinterpret_cast<const Run<float, 4>*>(of_tile + row);
                } else if (word < args.count) {
#pragma unroll
                    for (int q = 0; q < 4; ++q) {
                        dm.at[q] = pixel + q < args.pixel_count ? of_tile[row + q] : 0.0f;
                    }
                }
#pragma unroll
                for (int m = 0; m < fragments_m; ++m) {
                    float sum[4] = {};
#pragma unroll
                    for (int k = 0; k < 2; ++k) {
                        std::uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            split(v[2 * k + i / 2][2 * m + i % 2], a_high[i], a_low[i]);
                        }
                        split(dm.at[2 * k], b_high[0], b_low[0]);
                        split(dm.at[2 * k + 1], b_high[1], b_low[1]);
                        multiply<exact>(sum, a_high, a_low, b_high, b_low);
                    }
                    add(dl[j][m], sum);
                }
            }
            if (for_pixels) { // pixels are columns; sums over words
                std::uint32_t b_high[2][2], b_low[2][2];
#pragma unroll
                for (int k = 0; k < 2; ++k) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int word = j * tile_words + at.t + 4 * i;
                        const bool inside = word < args.count && of_column + 2 * k < args.pixel_count;
                        float dm = inside ? of_tile[column + i * 4u * args.pixel_count + 2 * k] : 0.0f;
                        if (cosine && inside) {
                            dm *= inverse_words[word];
                        }
                        split(dm, b_high[k][i], b_low[k][i]);
                    }
                }
#pragma unroll
                for (int m = 0; m < fragments_m; ++m) {
                    const Pack<float> l = own_fragments[(j * fragments_m + m) * warp_size];
                    std::uint32_t a_high[4], a_low[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        split(l.at[i], a_high[i], a_low[i]);
                    }
#pragma unroll
                    for (int k = 0; k < 2; ++k) {
                        float sum[4] = {};
                        multiply<exact>(sum, a_high, a_low, b_high[k], b_low[k]);
                        add(dv[m][k], sum);
                    }
                }
            }
            of_tile += static_cast<std::int64_t>(tile_words) * args.pixel_count;
        }
        if (for_pixels) {
            float out[4][lane_features];
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                ok[q] = valid(args.pixel_mask, sample, pixel + q, args.pixel_count); // loaded again to save registers
                bool has_gradient = ok[q]; // false for masked pixels and pixels of norm 0
                float projection = 0;
                if (cosine && ok[q]) {
                    const std::int64_t at_pixel = sample * args.pixel_count + pixel + q;
                    has_gradient = !(args.norms[at_pixel] <= least_norm);
                    projection = args.projections[at_pixel];
                }
#pragma unroll
                for (int f = 0; f < lane_features; ++f) {
                    const float value = dv[f / 2][q / 2][f % 2 * 2 + q % 2];
                    out[q][f] = has_gradient ? (cosine ? value - projection * v[q][f] : value) : 0.0f;
                }
            }
            store_features(args.grad_pixels, to, pixel, args.pixel_count, feature, args.width, out);
        }
    }
    if (!for_words) {
        return;
    }

    // Add the sums of the warps that share features, in the order of their pixels.
    for (int warp = 1; warp < pixel_warps; ++warp) {
        block_barrier();
#pragma unroll
        for (int j = 0; j < most_tiles; ++j) {
            for (int m = 0; of_pixels == warp && j < tiles && m < fragments_m; ++m) {
                own_fragments[(j * fragments_m + m) * warp_size] = {
                    {dl[j][m][0], dl[j][m][1], dl[j][m][2], dl[j][m][3]}};
            }
        }
        block_barrier();
#pragma unroll
        for (int j = 0; j < most_tiles; ++j) {
#pragma unroll
            for (int m = 0; m < fragments_m; ++m) {
                if (of_pixels == 0 && j < tiles) {
                    const Pack<float> part = own_fragments[(j * fragments_m + m) * warp_size];
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        dl[j][m][k] += part.at[k];
                    }
                }
            }
        }
    }
    if (of_pixels != 0) {
        return;
    }
#pragma unroll
    for (int j = 0; j < most_tiles; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int word = j * tile_words + 2 * at.t + c;
            float* const sums = args.sums + (static_cast<std::int64_t>(run) * args.count + word) * args.width + feature;
#pragma unroll
            for (int f = 0; f < lane_features; ++f) {
                if (word < args.count && feature + f < args.width) {
                    sums[f] = dl[j][f / 2][f % 2 * 2 + c];
                }
            }
        }
    }
}

Strided strided(const pixel_word::Array& array, std::int64_t pixels, std::int64_t width) {
    const auto at = reinterpret_cast<std::uintptr_t>(array.data);
    const auto bytes = static_cast<std::uintptr_t>(4 * element_size(array.dtype));
    Access access = Access::any;
    if (array.column == 1 && at % bytes == 0 && array.batch % 4 == 0 && width % 4 == 0 && array.pixel % 4 == 0) {
        access = Access::rows;
    } else if (array.pixel == 1 && at % bytes == 0 && array.batch % 4 == 0 && pixels % 4 == 0 &&
               array.column % 4 == 0) {
        access = Access::maps;
    }
    return {const_cast<void*>(array.data), array.batch, array.pixel, array.column, access};
}

template <class S>
cudaError_t run(const Features& features, std::int64_t batch, int warp_features, cudaStream_t stream) {
    const int tiles = ceil_div(features.count, tile_words);
    const int bytes = most_words * 4 + features.feature_warps * tiles * warp_features / 16 * 32 * 16;
    const Grid grid{batch * features.runs.blocks_per_sample * features.chunks, block_threads, 1, bytes};
    return tiles <= few_tiles ? launch(features_kernel<S, few_tiles>, grid, stream, features)
                              : launch(features_kernel<S, most_words / tile_words>, grid, stream, features);
}

} // namespace

cudaError_t differentiate_features(const Backward& args, const Plan& plan, cudaStream_t stream) {
    const Problem& problem = args.problem;
    const Side& student = problem.student;
    const int chunk = plan.feature_warps * plan.warp_features;
    const Features features{strided(student.pixels, problem.pixels, student.width),
                            strided(args.grad_pixels, problem.pixels, student.width),
                            student.words,
                            student.word_mask,
                            problem.pixel_mask,
                            at_bytes<float>(args.workspace, plan.grad_logits),
                            problem.cosine ? static_cast<const float*>(args.kept.norms) : nullptr,
                            problem.cosine ? at_bytes<float>(args.workspace, plan.projections) : nullptr,
                            args.grad_words == nullptr ? nullptr : at_bytes<float>(args.workspace, plan.sums),
                            static_cast<int>(problem.pixels),
                            static_cast<int>(student.word_count),
                            static_cast<int>(student.width),
                            plan.feature_warps,
                            static_cast<int>(ceil_div(student.width, chunk)),
                            problem.pixels % 4 == 0,
                            plan.runs};
    switch (student.pixels.dtype) {
    case DType::Float32:
        return run<float>(features, problem.batch, plan.warp_features, stream);
    case DType::Float16:
        return run<Half>(features, problem.batch, plan.warp_features, stream);
    case DType::BFloat16:
        return run<BFloat16>(features, problem.batch, plan.warp_features, stream);
    default:
        return cudaErrorInvalidValue;
    }
}

} // namespace fastkd::cuda::pixel_word
