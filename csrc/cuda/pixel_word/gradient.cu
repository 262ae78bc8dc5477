// pixel_word on a GPU, backward: the gradient dM of the logits (common/pixel_word.h). For the cosine: dM/|V|, and
// <dM, M>/|V|^2 of each pixel.
//
// A warp computes 16 pixels and up to 32 words, as in the forward. dA = A X + D Z is a product over words: A and D are
// already in the layout of A fragments, and X and Z are loaded from gmem (in practice from cache) as B fragments, which
// prepare_gradient wrote. If several warps share a pixel's words, they exchange A and D through smem; otherwise warps
// are independent.
#include "cuda/pixel_word/tile.cuh"

namespace fastkd::cuda::pixel_word {
namespace {

using pixel_word::Backward;

constexpr float least_norm = static_cast<float>(pixel_word::norm_floor);

struct Gradient {
    Logits student, teacher;
    const std::uint8_t* pixel_mask;
    const Coefficients<float>* coefficients;
    const std::uint32_t* slopes;
    const float* columns;
    void* out; // dM, any strides
    DType out_dtype;
    std::int64_t out_batch, out_pixel, out_word;
    bool out_pairs;
    const float* norms; // (B, N) |V|; or null without the cosine
    float* projections; // (B, N) <dM, M>/|V|^2; or null without the cosine
    int pixels, words, terms;
    Runs runs;
};

// Replace x by 2^u, u = scale2 (x - top), and compute its sum over the warp's words.
template <int tiles>
FASTKD_DEVICE void exponentials(float (&x)[tiles][4], std::uint32_t words, const float (&top)[2], float scale2,
                                float (&z)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        z[h] = 0;
#pragma unroll
        for (int i = 0; i < tiles; ++i) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const float e = exp2_of(rounded_product(x[i][2 * h + c] - top[h], scale2));
                x[i][2 * h + c] = (words >> (2 * i + c) & 1) != 0 ? e : 0.0f;
                z[h] += x[i][2 * h + c];
            }
        }
        z[h] = sum_over(z[h], 1, 4);
    }
}

// A fragments of 16 words (two tiles), as split halves.
struct Fragment {
    std::uint32_t high[4], low[4];
};
template <int tiles>
FASTKD_DEVICE Fragment fragment_of(const float (&x)[tiles][4], int first) {
    Fragment fragment;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const int tile = first + k / 2, at = k % 2 * 2;
        split_halves(tile < tiles ? x[tile][at] : 0.0f, tile < tiles ? x[tile][at + 1] : 0.0f, fragment.high[k],
                     fragment.low[k]);
    }
    return fragment;
}

// `pairs`: two pixels per store. A template parameter, so that the compiler does not merge the stores of both cases.
template <bool pairs, class S, int tiles>
FASTKD_DEVICE void store_words(const Gradient& args, S* to, int first_word, int pixel, const float (&dm)[tiles][4]) {
#pragma unroll
    for (int i = 0; i < tiles; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const S first = narrow<S>(dm[i][c]), second = narrow<S>(dm[i][2 + c]);
            if (first_word + tile_words * i + c < args.student.count) {
                if constexpr (pairs) {
                    store_pair(to, first, second);
                } else {
                    to[0] = first;
                    if (pixel + 1 < args.pixels) {
                        to[args.out_pixel] = second;
                    }
                }
            }
            to += (c == 0 ? 1 : tile_words - 1) * args.out_word;
        }
    }
}

template <class S, int tiles>
FASTKD_DEVICE void store_gradient(const Gradient& args, S* to, int first_word, int pixel, const float (&dm)[tiles][4]) {
    if (pixel < args.pixels) {
        if (args.out_pairs) {
            store_words<true>(args, to, first_word, pixel, dm);
        } else {
            store_words<false>(args, to, first_word, pixel, dm);
        }
    }
}

// `own` and `split` as in terms.cu.
template <int own, int split>
FASTKD_KERNEL void FASTKD_LAUNCH_BOUNDS_OF(block_threads, own == 3 ? 2 : 1) gradient_kernel(Gradient args) {
    constexpr int groups = block_warps / split, step = groups * tile_pixels;
    constexpr int own_steps = (own + 1) / 2; // of 16 words
    FASTKD_DYNAMIC_SHARED(shared);
    const Lane at;
    const int part = at.warp % split, group = at.warp / split;
    const int block = static_cast<int>(block_x()), run_of_sample = block % args.runs.blocks_per_sample; // below 2^31
    const std::int64_t sample = block / args.runs.blocks_per_sample;
    const int first_word = part * own * tile_words + 2 * at.t;
    const std::uint32_t words_s =
        valid_words<own>(args.student.mask, sample, args.student.count, first_word - 2 * at.t, at.t);
    const std::uint32_t words_t =
        valid_words<own>(args.teacher.mask, sample, args.teacher.count, first_word - 2 * at.t, at.t);
    const float scale2_s = args.student.scale * log2_e, scale2_t = args.teacher.scale * log2_e;
    const int tiles = ceil_div(args.words, tile_words), steps = (tiles + 1) / 2;
    const Coefficients<float> by = args.coefficients[sample];
    constexpr int all_tiles = own * split, all_steps = (all_tiles + 1) / 2; // of X and Z
    const std::uint32_t* const slopes =
        args.slopes + ((sample * 2 * all_steps * all_tiles + part * own) * warp_size + at.lane) * 4;
    const float* const columns = args.columns + sample * 4 * args.words + first_word;

    // smem, if warps share rows: four reductions over parts of rows, [4][student, teacher][split][pixel]; then A and D,
    // [warp][A, D][16 words][lane], high and low parts.
    float* const own_rows = reinterpret_cast<float*>(shared) + group * tile_pixels + 2 * at.g;
    auto* const fragments = reinterpret_cast<Fragment*>(shared + 8 * split * step * sizeof(float));
    const auto across_parts = [&](int which, float (&first)[2], float (&second)[2], auto&& combine) {
        float* const rows = own_rows + which * 2 * split * step;
        for (int h = 0; at.t == 0 && h < 2; ++h) {
            rows[part * step + h] = first[h];
            rows[(split + part) * step + h] = second[h];
        }
        block_barrier();
        for (int h = 0; h < 2; ++h) {
            first[h] = rows[h];
            second[h] = rows[split * step + h];
            for (int p = 1; p < split; ++p) {
                first[h] = combine(first[h], rows[p * step + h]);
                second[h] = combine(second[h], rows[(split + p) * step + h]);
            }
        }
    };
    const auto larger = [](float a, float b) { return b > a ? b : a; };
    const auto sum = [](float a, float b) { return a + b; };

#pragma unroll 1
    for (int s = 0; s < args.runs.steps_per_block; ++s) {
        const int begin = (run_of_sample * args.runs.steps_per_block + s) * step;
        if (begin >= args.pixels) {
            break;
        }
        const int pixel = begin + group * tile_pixels + 2 * at.g;
        const bool pixel_ok[2] = {valid(args.pixel_mask, sample, pixel, args.pixels),
                                  valid(args.pixel_mask, sample, pixel + 1, args.pixels)};
        float x[own][4], y[own][4], dm[own][4] = {};
        load_logits(args.student, sample, pixel, first_word, words_s, pixel_ok, x);
        load_logits(args.teacher, sample, pixel, first_word, words_t, pixel_ok, y);
        if ((args.terms & pixel_word::word_to_pixel) != 0) {
#pragma unroll
            for (int i = 0; i < own; ++i) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    if ((words_s >> (2 * i + c) & 1) == 0) {
                        continue;
                    }
                    const float* const column = columns + tile_words * i + c;
                    const float max_s = column[0], inverse_s = column[args.words];
                    const float max_t = column[2 * args.words], inverse_t = column[3 * args.words];
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const float e_s = exp2_of(rounded_product(x[i][2 * h + c] - max_s, scale2_s));
                        const float e_t = exp2_of(rounded_product(y[i][2 * h + c] - max_t, scale2_t));
                        const float q_s = rounded_product(e_s, inverse_s);
                        dm[i][2 * h + c] = by.column_kl * (q_s - rounded_product(e_t, inverse_t));
                    }
                }
            }
        }
        if ((args.terms & pixel_word::over_words) != 0) {
            float top_s[2], top_t[2], z_s[2], z_t[2];
            row_maxima(x, words_s, top_s);
            row_maxima(y, words_t, top_t);
            if constexpr (split > 1) {
                across_parts(0, top_s, top_t, larger);
            }
            exponentials(x, words_s, top_s, scale2_s, z_s);
            exponentials(y, words_t, top_t, scale2_t, z_t);
            if constexpr (split > 1) {
                across_parts(1, z_s, z_t, sum);
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) { // x and y become A and D
                const float inverse_s = 1 / z_s[h], inverse_t = 1 / z_t[h];
#pragma unroll
                for (int i = 0; i < own; ++i) {
#pragma unroll
                    for (int k = 2 * h; k < 2 * h + 2; ++k) {
                        x[i][k] = pixel_ok[h] ? rounded_product(x[i][k], inverse_s) : 0.0f;
                        y[i][k] = pixel_ok[h] ? x[i][k] - rounded_product(y[i][k], inverse_t) : 0.0f;
                        dm[i][k] += by.row_kl * y[i][k];
                    }
                }
            }
        }
        if ((args.terms & pixel_word::second_order) != 0) {
            if constexpr (split > 1) {
#pragma unroll
                for (int k = 0; k < own_steps; ++k) {
                    Fragment* const to = fragments + ((group * split + part) * 2 * own_steps + k) * warp_size + at.lane;
                    to[0] = fragment_of(x, 2 * k);
                    to[own_steps * warp_size] = fragment_of(y, 2 * k);
                }
                block_barrier();
            }
            float da[own][4] = {};
#pragma unroll
            for (int which = 0; which < 2; ++which) {
                float product[own][4] = {};
                const auto multiply = [&](const Fragment& a, int k) {
#pragma unroll
                    for (int i = 0; i < own; ++i) {
                        if (part * own + i < tiles) {
                            const Pack<std::uint32_t> b =
                                load_pack(slopes + ((which * all_steps + k) * all_tiles + i) * warp_size * 4);
                            float sum[4] = {};
                            multiply_halves(sum, a.high, a.low, {b.at[0], b.at[1]}, {b.at[2], b.at[3]});
                            add(product[i], sum);
                        }
                    }
                };
                if constexpr (split == 1) {
#pragma unroll
                    for (int k = 0; k < own_steps; ++k) {
                        if (k < steps) {
                            multiply(which == 0 ? fragment_of(x, 2 * k) : fragment_of(y, 2 * k), k);
                        }
                    }
                } else {
                    const Fragment* from = fragments + group * split * 2 * own_steps * warp_size + at.lane;
#pragma unroll 1
                    for (int k = 0; k < steps; ++k) {
                        const int warp = k / own_steps, of_warp = k % own_steps;
                        multiply(from[((warp * 2 + which) * own_steps + of_warp) * warp_size], k);
                    }
                }
                const float unit = which == 0 ? by.unit_x : by.unit_z;
#pragma unroll
                for (int i = 0; i < own; ++i) {
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        da[i][k] += unit * product[i][k];
                    }
                }
            }
            float inner[2] = {};
#pragma unroll
            for (int i = 0; i < own; ++i) {
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    inner[k / 2] += (words_s >> (2 * i + k % 2) & 1) != 0 ? da[i][k] * x[i][k] : 0.0f;
                }
            }
            inner[0] = sum_over(inner[0], 1, 4);
            inner[1] = sum_over(inner[1], 1, 4);
            if constexpr (split > 1) {
                float ignored[2] = {};
                across_parts(2, inner, ignored, sum);
            }
#pragma unroll
            for (int i = 0; i < own; ++i) {
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    dm[i][k] += x[i][k] * (da[i][k] - inner[k / 2]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < own; ++i) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const bool ok = pixel_ok[k / 2] && (words_s >> (2 * i + k % 2) & 1) != 0;
                dm[i][k] = ok ? dm[i][k] : 0.0f;
            }
        }
        if (args.projections != nullptr) {
            load_logits(args.student, sample, pixel, first_word, words_s, pixel_ok, x);
            float projection[2] = {};
#pragma unroll
            for (int i = 0; i < own; ++i) {
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    projection[k / 2] += dm[i][k] * x[i][k];
                }
            }
            projection[0] = sum_over(projection[0], 1, 4);
            projection[1] = sum_over(projection[1], 1, 4);
            if constexpr (split > 1) {
                float ignored[2] = {};
                across_parts(3, projection, ignored, sum);
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const std::int64_t at_pixel = sample * args.pixels + pixel + h;
                const float norm = pixel_ok[h] ? args.norms[at_pixel] : 1.0f;
                const float inverse = 1 / (norm < least_norm ? least_norm : norm);
#pragma unroll
                for (int i = 0; i < own; ++i) {
                    dm[i][2 * h] *= inverse;
                    dm[i][2 * h + 1] *= inverse;
                }
                if (part == 0 && at.t == 0 && pixel + h < args.pixels) {
                    args.projections[at_pixel] = projection[h] * inverse * inverse;
                }
            }
        }
        if constexpr (split > 1) {
            block_barrier(); // before smem is overwritten
        }
        const std::int64_t offset = sample * args.out_batch + pixel * args.out_pixel + first_word * args.out_word;
        if (args.out_dtype == DType::Float32) {
            store_gradient(args, static_cast<float*>(args.out) + offset, first_word, pixel, dm);
        } else if (args.out_dtype == DType::Float16) {
            store_gradient(args, static_cast<Half*>(args.out) + offset, first_word, pixel, dm);
        } else {
            store_gradient(args, static_cast<BFloat16*>(args.out) + offset, first_word, pixel, dm);
        }
    }
}

template <int own, int split>
cudaError_t run(const Gradient& gradient, std::int64_t batch, cudaStream_t stream) {
    constexpr int step = block_warps / split * tile_pixels;
    constexpr int bytes = split == 1 ? 16 // unused
                                     : 8 * split * step * static_cast<int>(sizeof(float)) +
                                           block_warps * 2 * ((own + 1) / 2) * 32 * static_cast<int>(sizeof(Fragment));
    return launch(gradient_kernel<own, split>, {batch * gradient.runs.blocks_per_sample, block_threads, 1, bytes},
                  stream, gradient);
}

} // namespace

cudaError_t differentiate_logits(const Backward& args, const Plan& plan, cudaStream_t stream) {
    const Problem& problem = args.problem;
    const bool features = problem.student.width > 0;
    Gradient gradient{logits_of(problem, args.kept.logits, true),
                      logits_of(problem, args.kept.logits, false),
                      problem.pixel_mask,
                      at_bytes<Coefficients<float>>(args.workspace, plan.coefficients),
                      at_bytes<std::uint32_t>(args.workspace, plan.slopes),
                      static_cast<const float*>(args.kept.columns),
                      const_cast<void*>(args.grad_pixels.data),
                      args.grad_pixels.dtype,
                      args.grad_pixels.batch,
                      args.grad_pixels.pixel,
                      args.grad_pixels.column,
                      false,
                      problem.cosine ? static_cast<const float*>(args.kept.norms) : nullptr,
                      problem.cosine ? at_bytes<float>(args.workspace, plan.projections) : nullptr,
                      static_cast<int>(problem.pixels),
                      plan.words,
                      problem.terms,
                      plan.gradient};
    if (features) {
        gradient.out = at_bytes<float>(args.workspace, plan.grad_logits);
        gradient.out_dtype = DType::Float32;
        gradient.out_batch = problem.student.word_count * problem.pixels;
        gradient.out_pixel = 1;
        gradient.out_word = problem.pixels;
    }
    gradient.out_pairs = even_pixels(gradient.out, element_size(gradient.out_dtype), problem.pixels, gradient.out_batch,
                                     gradient.out_pixel, gradient.out_word);
    switch (plan.split) {
    case 1:
        return plan.words <= 24 ? run<3, 1>(gradient, problem.batch, stream)
                                : run<4, 1>(gradient, problem.batch, stream);
    case 2:
        return run<4, 2>(gradient, problem.batch, stream);
    default:
        return run<4, 4>(gradient, problem.batch, stream);
    }
}

} // namespace fastkd::cuda::pixel_word
