// pixel_word on a GPU, forward: partial sums of the four losses (common/pixel_word.h) over a run of pixels, from
// the logits; merge_terms adds them.
//
// A warp holds 16 pixels and up to 32 words in registers; for more words two or four warps share the pixels. The thread
// block then computes S^T S, where S = [A D] is in smem as split halves: only the tiles on and below the diagonal,
// distributed over the warps. They contain the lower triangles of G and E, and K.
#include "cuda/pixel_word/tile.cuh"

namespace fastkd::cuda::pixel_word {
namespace {

using pixel_word::ColumnSums;
using pixel_word::Forward;

struct Terms {
    Logits student, teacher;
    const std::uint8_t* pixel_mask;
    float* partials;
    int pixels, words, terms;
    Runs runs;
};

// Add a lane's two pixels to the sums of its words 2 i + c.
template <int tiles>
FASTKD_DEVICE void add_columns(const float (&x)[tiles][4], const float (&y)[tiles][4], std::uint32_t words,
                               const bool (&pixel_ok)[2], float scale_s, float scale_t,
                               ColumnSums<float> (&sums)[2 * tiles]) {
    const float scale2_s = scale_s * log2_e, scale2_t = scale_t * log2_e;
#pragma unroll
    for (int i = 0; i < tiles; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            if ((words >> (2 * i + c) & 1) == 0) {
                continue;
            }
            ColumnSums<float>& sum = sums[2 * i + c];
            float max_s = sum.max_s, max_t = sum.max_t;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float of_s = x[i][2 * h + c], of_t = y[i][2 * h + c];
                max_s = pixel_ok[h] && of_s > max_s ? of_s : max_s;
                max_t = pixel_ok[h] && of_t > max_t ? of_t : max_t;
            }
            if (max_s > sum.max_s || max_t > sum.max_t) {
                sum.raise(max_s, max_t, scale_s, scale_t);
            }
            const float shift_s = softmax_kl::shift_of(max_s), shift_t = softmax_kl::shift_of(max_t);
            float a = 0;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float u_s = rounded_product(x[i][2 * h + c] - shift_s, scale2_s);
                const float u_t = rounded_product(y[i][2 * h + c] - shift_t, scale2_t);
                const float e_s = pixel_ok[h] ? exp2_of(u_s) : 0.0f;
                const float e_t = pixel_ok[h] ? exp2_of(u_t) : 0.0f;
                sum.z_s += e_s;
                sum.z_t += e_t;
                a += e_t == 0 ? 0.0f : e_t * (u_t - u_s);
            }
            sum.a += ln_2 * a;
        }
    }
}

// Merge the sums of the eight lanes that share a word.
FASTKD_DEVICE void merge_lanes(ColumnSums<float>& sum, float scale_s, float scale_t) {
    sum.raise(max_over(sum.max_s, 4, warp_size), max_over(sum.max_t, 4, warp_size), scale_s, scale_t);
    sum.z_s = sum_over(sum.z_s, 4, warp_size);
    sum.z_t = sum_over(sum.z_t, 4, warp_size);
    sum.a = sum_over(sum.a, 4, warp_size);
}

// Replace x by 2^u, u = scale2 (x - top), and y likewise; compute their sums and sum e_t (u_t - u_s) per pixel.
template <int tiles>
FASTKD_DEVICE void exponentials(float (&x)[tiles][4], float (&y)[tiles][4], std::uint32_t words_s,
                                std::uint32_t words_t, const float (&top_s)[2], const float (&top_t)[2], float scale2_s,
                                float scale2_t, float (&z_s)[2], float (&z_t)[2], float (&kl)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        z_s[h] = z_t[h] = kl[h] = 0;
#pragma unroll
        for (int i = 0; i < tiles; ++i) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const bool in_s = (words_s >> (2 * i + c) & 1) != 0, in_t = (words_t >> (2 * i + c) & 1) != 0;
                const float u_s = rounded_product(x[i][2 * h + c] - top_s[h], scale2_s);
                const float u_t = rounded_product(y[i][2 * h + c] - top_t[h], scale2_t);
                const float e_s = in_s ? exp2_of(u_s) : 0.0f, e_t = in_t ? exp2_of(u_t) : 0.0f;
                kl[h] += e_t == 0 ? 0.0f : e_t * (u_t - u_s);
                z_s[h] += e_s;
                z_t[h] += e_t;
                x[i][2 * h + c] = e_s;
                y[i][2 * h + c] = e_t;
            }
        }
        z_s[h] = sum_over(z_s[h], 1, 4);
        z_t[h] = sum_over(z_t[h], 1, 4);
    }
}

// Load the 16 columns of S from `column` on for the 16 pixels from `pixel` on: an A fragment of S^T, and two B
// fragments of S, columns 0 to 7 in elements 0 and 2, 8 to 15 in 1 and 3.
FASTKD_DEVICE void load_columns(std::uint32_t (&fragment)[4], const std::uint16_t* matrix, int stride, int pixel,
                                int column, int lane) {
    load_matrices_transposed(fragment,
                             matrix + (pixel + lane / 16 * 8 + lane % 8) * stride + column + lane / 8 % 2 * 8);
}

// `split` warps share the words of a pixel; each holds `own` tiles of 8 words. `slabs` thread blocks share the tiles of
// S^T S, which would not fit into the registers of one, and each loads the logits again.
template <int own, int split, int slabs>
FASTKD_KERNEL void FASTKD_LAUNCH_BOUNDS_OF(block_threads, own == 3 ? 2 : 1) terms_kernel(Terms args) {
    constexpr int groups = block_warps / split, step = groups * tile_pixels;
    constexpr int tile_rows = own * split;     // of 16 columns of S
    constexpr int warps = slabs * block_warps; // share the products
    constexpr int own_products = ceil_div(tile_rows * (tile_rows + 1) / 2, warps);
    FASTKD_DYNAMIC_SHARED(shared);
    const Lane at;
    const int part = at.warp % split, group = at.warp / split;
    const int slab = static_cast<int>(block_x() % slabs);
    const std::int64_t run = block_x() / slabs, sample = run / args.runs.blocks_per_sample;
    const int run_of_sample = static_cast<int>(run % args.runs.blocks_per_sample);
    const int first_word = part * own * tile_words + 2 * at.t;
    const std::uint32_t words_s =
        valid_words<own>(args.student.mask, sample, args.student.count, first_word - 2 * at.t, at.t);
    const std::uint32_t words_t =
        valid_words<own>(args.teacher.mask, sample, args.teacher.count, first_word - 2 * at.t, at.t);
    const float scale_s = args.student.scale, scale_t = args.teacher.scale;
    const float scale2_s = scale_s * log2_e, scale2_t = scale_t * log2_e;

    // smem: maxima and sums of parts of rows, [2][student, teacher][split][pixel]; then S, high and low parts.
    float* const rows = reinterpret_cast<float*>(shared);
    const int tiles = ceil_div(args.words, tile_words); // S has 2 * tiles
    const int stride = 2 * tiles * tile_words + 8;      // 8 consecutive rows start in different banks
    auto* const high = reinterpret_cast<std::uint16_t*>(rows + (split > 1 ? 4 * split * step : 0));
    std::uint16_t* const low = high + step * stride;
    float* const own_rows = rows + group * tile_pixels + 2 * at.g;
    // Combine the results of a group's warps, each for its part of the rows.
    const auto across_parts = [&](float* of_rows, float (&of_s)[2], float (&of_t)[2], auto&& combine) {
        for (int h = 0; at.t == 0 && h < 2; ++h) {
            of_rows[part * step + h] = of_s[h];
            of_rows[(split + part) * step + h] = of_t[h];
        }
        block_barrier();
        for (int h = 0; h < 2; ++h) {
            of_s[h] = of_rows[h];
            of_t[h] = of_rows[split * step + h];
            for (int p = 1; p < split; ++p) {
                of_s[h] = combine(of_s[h], of_rows[p * step + h]);
                of_t[h] = combine(of_t[h], of_rows[(split + p) * step + h]);
            }
        }
    };

    float row_kl = 0;
    ColumnSums<float> columns[2 * own];
#pragma unroll
    for (int k = 0; k < 2 * own; ++k) {
        columns[k] = ColumnSums<float>::empty();
    }
    const int products = tiles * (tiles + 1) / 2; // of 16 x 16
    const int each_products = ceil_div(products, warps);
    const int first_product = (slab * block_warps + at.warp) * each_products;
    int first_row = 0;
    while ((first_row + 1) * (first_row + 2) / 2 <= first_product) {
        ++first_row;
    }
    const int first_column = first_product - first_row * (first_row + 1) / 2;
    float product[own_products][2][4] = {};

    for (int s = 0; s < args.runs.steps_per_block; ++s) {
        const int begin = (run_of_sample * args.runs.steps_per_block + s) * step;
        if (begin >= args.pixels) {
            break;
        }
        const int pixel = begin + group * tile_pixels + 2 * at.g;
        const bool pixel_ok[2] = {valid(args.pixel_mask, sample, pixel, args.pixels),
                                  valid(args.pixel_mask, sample, pixel + 1, args.pixels)};
        float x[own][4], y[own][4];
        load_logits(args.student, sample, pixel, first_word, words_s, pixel_ok, x);
        load_logits(args.teacher, sample, pixel, first_word, words_t, pixel_ok, y);
        if (slab == 0 && (args.terms & pixel_word::word_to_pixel) != 0) {
            add_columns(x, y, words_s, pixel_ok, scale_s, scale_t, columns);
        }
        if ((args.terms & pixel_word::over_words) == 0) {
            continue;
        }
        float top_s[2], top_t[2], z_s[2], z_t[2], kl[2];
        row_maxima(x, words_s, top_s);
        row_maxima(y, words_t, top_t);
        if constexpr (split > 1) {
            across_parts(own_rows, top_s, top_t, [](float a, float b) { return b > a ? b : a; });
        }
        exponentials(x, y, words_s, words_t, top_s, top_t, scale2_s, scale2_t, z_s, z_t, kl);
        if constexpr (split > 1) {
            across_parts(own_rows + 2 * split * step, z_s, z_t, [](float a, float b) { return a + b; });
        }
        float inverse_s[2], inverse_t[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            inverse_s[h] = 1 / z_s[h];
            inverse_t[h] = 1 / z_t[h];
            if ((args.terms & pixel_word::pixel_to_word) != 0 && pixel_ok[h]) {
                row_kl += kl[h] * ln_2 * inverse_t[h] + (part == 0 && at.t == 0 ? std::log(z_s[h] / z_t[h]) : 0.0f);
            }
        }
        if ((args.terms & pixel_word::second_order) == 0) {
            continue;
        }
#pragma unroll
        for (int i = 0; i < own; ++i) {
            const int tile = part * own + i;
            if (tile >= tiles) {
                break;
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float a[2], d[2];
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    a[c] = pixel_ok[h] ? rounded_product(x[i][2 * h + c], inverse_s[h]) : 0.0f;
                    d[c] = pixel_ok[h] ? a[c] - rounded_product(y[i][2 * h + c], inverse_t[h]) : 0.0f;
                }
                const int to = (group * tile_pixels + 8 * h + at.g) * stride + tile * tile_words + 2 * at.t;
                split_halves(a[0], a[1], *reinterpret_cast<std::uint32_t*>(high + to),
                             *reinterpret_cast<std::uint32_t*>(low + to));
                split_halves(d[0], d[1], *reinterpret_cast<std::uint32_t*>(high + to + tiles * tile_words),
                             *reinterpret_cast<std::uint32_t*>(low + to + tiles * tile_words));
            }
        }
        block_barrier();
#pragma unroll 1
        for (int k = 0; k < step; k += tile_pixels) {
            int row = first_row, column = first_column;
            std::uint32_t a_high[4], a_low[4];
#pragma unroll
            for (int n = 0; n < own_products; ++n) {
                if (n >= each_products || first_product + n >= products) {
                    break;
                }
                if (n == 0 || column == 0) {
                    load_columns(a_high, high, stride, k, 16 * row, at.lane);
                    load_columns(a_low, low, stride, k, 16 * row, at.lane);
                }
                std::uint32_t b_high[4], b_low[4];
                load_columns(b_high, high, stride, k, 16 * column, at.lane);
                load_columns(b_low, low, stride, k, 16 * column, at.lane);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float sum[4] = {};
                    multiply_halves(sum, a_high, a_low, {b_high[half], b_high[half + 2]},
                                    {b_low[half], b_low[half + 2]});
                    add(product[n][half], sum);
                }
                const bool last = column == row; // in its row of tiles
                row += last ? 1 : 0;
                column = last ? 0 : column + 1;
            }
        }
        if constexpr (split == 1) {
            block_barrier(); // before S is overwritten; with split > 1 the barriers above suffice
        }
    }

    const Partial<float> partial{args.partials + run * Partial<float>::size(args.words), args.words};
    if ((args.terms & pixel_word::second_order) != 0) {
#pragma unroll
        for (int n = 0; n < own_products; ++n) {
            const int tile = first_product + n;
            for (int half = 0; n < each_products && tile < products && half < 2; ++half) {
                Pack<float> pack;
                for (int k = 0; k < 4; ++k) {
                    pack.at[k] = product[n][half][k] * unit_of_halves;
                }
                store_pack(partial.matrices() + ((tile * 2 + half) * warp_size + at.lane) * 4, pack);
            }
        }
    }
    if (slab != 0) {
        return;
    }
    if ((args.terms & pixel_word::pixel_to_word) != 0) {
        row_kl = block_sum(row_kl, rows, block_warps);
        if (thread_x() == 0) {
            partial.data[0] = row_kl;
        }
    }
    if ((args.terms & pixel_word::word_to_pixel) != 0) {
        auto* const sums = reinterpret_cast<ColumnSums<float>*>(shared); // [group][word]
        constexpr int padded = split * own * tile_words;
        block_barrier();
#pragma unroll
        for (int k = 0; k < 2 * own; ++k) {
            merge_lanes(columns[k], scale_s, scale_t);
            if (at.g == 0) {
                sums[group * padded + first_word + k / 2 * tile_words + k % 2] = columns[k];
            }
        }
        block_barrier();
        for (int word = thread_x(); word < args.words; word += block_threads) {
            ColumnSums<float> sum = sums[word];
            for (int k = 1; k < groups; ++k) {
                sum.merge(sums[k * padded + word], scale_s, scale_t);
            }
            partial.column(0)[word] = sum.max_s;
            partial.column(1)[word] = sum.max_t;
            partial.column(2)[word] = sum.z_s;
            partial.column(3)[word] = sum.z_t;
            partial.column(4)[word] = sum.a;
        }
    }
}

template <int own, int split, int slabs = 1>
cudaError_t run(const Terms& terms, std::int64_t batch, cudaStream_t stream) {
    constexpr int step = block_warps / split * tile_pixels;
    const int stride = 2 * static_cast<int>(round_up(terms.words, tile_words)) + 8;
    const int sums = block_warps * own * tile_words * static_cast<int>(sizeof(ColumnSums<float>));
    int bytes = 2 * step * stride * 2 + (split > 1 ? 4 * split * step * 4 : 0);
    bytes = bytes < sums ? sums : bytes;
    return launch(terms_kernel<own, split, slabs>,
                  {batch * terms.runs.blocks_per_sample * slabs, block_threads, 1, bytes}, stream, terms);
}

} // namespace

cudaError_t sum_terms(const Forward& args, const Plan& plan, cudaStream_t stream) {
    const Problem& problem = args.problem;
    const Terms terms{logits_of(problem, args.kept.logits, true),
                      logits_of(problem, args.kept.logits, false),
                      problem.pixel_mask,
                      at_bytes<float>(args.workspace, plan.partials),
                      static_cast<int>(problem.pixels),
                      plan.words,
                      problem.terms,
                      plan.terms};
    switch (plan.split) {
    case 1:
        return terms.words <= 24 ? run<3, 1>(terms, problem.batch, stream) : run<4, 1>(terms, problem.batch, stream);
    case 2:
        return run<4, 2>(terms, problem.batch, stream);
    default:
        return run<4, 4, 2>(terms, problem.batch, stream);
    }
}

} // namespace fastkd::cuda::pixel_word
