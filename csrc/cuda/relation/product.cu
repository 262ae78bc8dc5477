// Second half of relation's backward: dX from H. With M_ij = s_i H_ij s_j, stored by derivative_kernel (tiles I <= J,
// padded with 0), and q_i = sum_j M_ij <x_i, x_j>,
//
//     dX_ik = sum_j M_ij x_jk - s_i^2 q_i x_ik        ("mean" and "dot": M = factor H, without the last term)
//
// A thread block computes one row block and BLOCK_N columns of the gradient. Where that would leave SMs idle (split-K),
// or only a band of H is in memory, it writes partial sums in fp32, which finish_kernel adds in a fixed order. The
// transposed H of a band contributes to later rows as well: their sums accumulate in `totals` from band to band.
#include "cuda/relation/product.cuh"

#include "cuda/relation/launch.cuh"

namespace fastkd::cuda::relation {
namespace {

template <class S, int tile_size>
struct ProductBlocking;
template <>
struct ProductBlocking<BFloat16, 128> : Blocking<BFloat16, 128, 128, 64, 32, 32, 4, 2> {};
template <>
struct ProductBlocking<BFloat16, 64> : Blocking<BFloat16, 64, 128, 32, 64, 32, 3, 2> {};
template <>
struct ProductBlocking<Half, 128> : Blocking<Half, 128, 128, 64, 32, 32, 3, 1> {};
template <>
struct ProductBlocking<Half, 64> : Blocking<Half, 64, 128, 32, 64, 32, 3, 2> {};
template <>
struct ProductBlocking<float, 64> : Blocking<float, 64, 64, 32, 32, 16, 3, 2> {};

// A (rows x cols) piece of the gradient in smem, laid out as in gmem: [row][column] or, where `mn_major`,
// [column][row]. Two numbers per row follow.
template <int rows, int cols>
struct Piece {
    static constexpr int pad = 4;
    static constexpr int sums = rows * (cols + pad) > cols*(rows + pad) ? rows * (cols + pad) : cols * (rows + pad);
    static constexpr int bytes = (sums + 2 * rows) * static_cast<int>(sizeof(float));

    static FASTKD_DEVICE int at(bool mn_major, int row, int col) {
        return mn_major ? col * (rows + pad) + row : row * (cols + pad) + col;
    }
};

// Write a piece line by line along its contiguous mode.
template <class S, int rows, int cols, int threads, bool mn_major>
FASTKD_DEVICE void finish_lines(const ProductArgs& args, const float* sums, S* to, const S* from, int rows_left,
                                int cols_left) {
    constexpr int inner = mn_major ? rows : cols, outer = mn_major ? cols : rows;
    constexpr int pitch = inner + Piece<rows, cols>::pad, size = Pack<S>::size;
    const float* const radial = sums + Piece<rows, cols>::sums; // s_i^2 q_i
    const float* const alive = radial + rows;                   // 0 for rows of norm 0
    const Gradient& out = args.gradient;
    const std::int64_t to_outer = mn_major ? out.col_stride : out.row_stride;
    const std::int64_t to_inner = mn_major ? out.row_stride : out.col_stride;
    const std::int64_t from_outer = mn_major ? args.student.rows.k_stride : args.student.rows.mn_stride;
    const std::int64_t from_inner = mn_major ? args.student.rows.mn_stride : args.student.rows.k_stride;
    const int inner_left = mn_major ? rows_left : cols_left, outer_left = mn_major ? cols_left : rows_left;
    const bool cosine = args.cosine;
    const auto value_of = [&](float sum, float x, int row) {
        // The gradient of a row of norm 0 is 0 even if other rows are NaN.
        return cosine ? (alive[row] == 0.0f ? 0.0f : sum - x * radial[row]) : sum;
    };
    if (args.gradient.packs) { // packs then lie entirely inside or outside
        constexpr int lanes = inner / size, step = threads / lanes;
        const int begin = thread_x() % lanes * size;
#pragma unroll 2
        for (int line = thread_x() / lanes; line < outer_left && begin < inner_left; line += step) {
            Pack<S> x = {}, pack;
            if (cosine) {
                x = load_pack(from + line * from_outer + begin);
            }
#pragma unroll
            for (int e = 0; e < size; ++e) {
                pack.at[e] =
                    narrow<S>(value_of(sums[line * pitch + begin + e], widen(x.at[e]), mn_major ? begin + e : line));
            }
            store_pack(to + line * to_outer + begin, pack);
        }
        return;
    }
    constexpr int step = threads / inner;
    static_assert(step > 0 && threads % inner == 0, "a thread has the same position in every line");
    const int place = thread_x() % inner;
    from += place * from_inner;
    to += place * to_inner;
#pragma unroll 4
    for (int line = thread_x() / inner; line < outer; line += step) {
        if (line < outer_left && place < inner_left) {
            const float x = cosine ? widen(from[line * from_outer]) : 0.0f;
            to[line * to_outer] = narrow<S>(value_of(sums[line * pitch + place], x, mn_major ? place : line));
        }
    }
}

// Write a piece of the gradient; `row` and `col` are its first row and column, within the sample.
template <class S, int rows, int cols, int threads>
FASTKD_DEVICE void finish(const ProductArgs& args, float* sums, std::int64_t sample, std::int64_t row,
                          std::int64_t col) {
    const Gradient& out = args.gradient;
    const int rows_left = static_cast<int>(args.range.rows - row < rows ? args.range.rows - row : rows);
    const int cols_left = static_cast<int>(args.student.width - col < cols ? args.student.width - col : cols);
    float* const of_rows = sums + Piece<rows, cols>::sums;
    for (int at = thread_x(); args.cosine && at < rows_left; at += threads) {
        const std::int64_t index = sample * args.range.rows + row + at;
        const auto scale = static_cast<float>(args.scales[index]);
        of_rows[at] = args.row_sums[index] * scale * scale;
        of_rows[rows + at] = scale >= no_direction ? 0.0f : 1.0f;
    }
    block_barrier(); // covers the sums as well
    S* const to = static_cast<S*>(out.data) + sample * out.batch_stride + row * out.row_stride + col * out.col_stride;
    const S* const from = rows_at<S>(args.student, sample, row) + col * args.student.rows.k_stride;
    if (out.mn_major) {
        finish_lines<S, rows, cols, threads, true>(args, sums, to, from, rows_left, cols_left);
    } else {
        finish_lines<S, rows, cols, threads, false>(args, sums, to, from, rows_left, cols_left);
    }
}

template <class S, int tile_size>
constexpr int product_shared_bytes() {
    using B = ProductBlocking<S, tile_size>;
    constexpr int pipeline = B::stages * (StoredH<S>::planes * B::SmemA::bytes + B::SmemB::bytes);
    constexpr int piece = Piece<tile_size, B::block_n>::bytes;
    return pipeline > piece ? pipeline : piece;
}

template <class S, int tile_size>
FASTKD_KERNEL void FASTKD_LAUNCH_BOUNDS_OF((ProductBlocking<S, tile_size>::threads),
                                           (ProductBlocking<S, tile_size>::min_blocks_per_sm))
    product_kernel(ProductArgs args) {
    using B = ProductBlocking<S, tile_size>;
    using H = typename StoredH<S>::Type;
    using SmemH = SmemTile<H, tile_size, B::block_k>;
    constexpr int planes = StoredH<S>::planes, per_block = tile_size / B::block_k;
    constexpr int stage_bytes = planes * SmemH::bytes + B::SmemB::bytes;
    FASTKD_DYNAMIC_SHARED(shared);
    const LaunchRange& range = args.range;
    const std::int64_t band = range.last - range.first, after = range.blocks - range.last;
    const std::int64_t items = band * args.splits + after; // per problem and block of columns
    const std::int64_t width_block = block_x() % args.width_blocks;
    const std::int64_t item = block_x() / args.width_blocks % items,
                       problem_in_launch = block_x() / args.width_blocks / items;
    const std::int64_t problem = range.first_problem + problem_in_launch;
    const bool in_band = item < band * args.splits;
    // Indices of row blocks have 32 bits, to save registers.
    const int block =
        static_cast<int>(in_band ? range.first + item / args.splits : range.last + (item - band * args.splits));
    const std::int64_t split = in_band ? item % args.splits : 0;
    // H's columns: from the band on, or for rows after the band only the band's.
    const std::int64_t columns = in_band ? range.blocks - range.first : band;
    const std::int64_t share = in_band ? ceil_div(columns, args.splits) : columns;
    const std::int64_t begin = split * share < columns ? split * share : columns;
    const std::int64_t end = begin + share < columns ? begin + share : columns;
    const int k_tiles = static_cast<int>(end - begin) * per_block;
    const int first = static_cast<int>(range.first + begin), row_blocks = static_cast<int>(range.row_blocks);
    const std::int64_t col = width_block * B::block_n;

    const auto transposed = [&](int k_tile) { return first + k_tile / per_block < block; };
    // The rows as operand B: the row index becomes K.
    const Operand& rows = args.student.rows;
    const Operand x_operand{rows.data, rows.k_stride, rows.mn_stride, rows.alignment, !rows.mn_major};
    const auto copy = [&](int k_tile) {
        if (k_tile < k_tiles) {
            const int other = first + k_tile / per_block;
            const int k = k_tile % per_block * B::block_k;
            unsigned char* const to = shared + k_tile % B::stages * stage_bytes;
            const bool transpose = transposed(k_tile);
            const std::int64_t tile = transpose ? range.stored(other, block) : range.stored(block, other);
            const H* const h = static_cast<const H*>(args.h) +
                               (problem_in_launch * range.tiles + tile) * (planes * tile_size * tile_size) +
                               (transpose ? k * tile_size : k);
            const Operand h_operand{h, transpose ? 1 : tile_size, transpose ? tile_size : 1,
                                    16 / static_cast<int>(sizeof(H)), transpose};
#pragma unroll
            for (int plane = 0; plane < planes; ++plane) {
                GmemToSmem<H, tile_size, B::block_k, B::threads>::start(reinterpret_cast<H*>(to + plane * SmemH::bytes),
                                                                        h + plane * tile_size * tile_size, h_operand,
                                                                        tile_size, B::block_k);
            }
            const std::int64_t row = static_cast<std::int64_t>(other % row_blocks) * tile_size + k;
            const std::int64_t k_left = row < range.rows ? range.rows - row : 0;
            const S* const x =
                k_left == 0
                    ? static_cast<const S*>(rows.data) // not read
                    : rows_at<S>(args.student, problem * range.samples + other / row_blocks, row) + col * rows.k_stride;
            GmemToSmem<S, B::block_n, B::block_k, B::threads>::start(reinterpret_cast<S*>(to + planes * SmemH::bytes),
                                                                     x, x_operand, args.student.width - col, k_left);
        }
        copy_async_commit(); // one group per k-tile, empty past the last
    };
    typename B::AccumulatorFragments sum;
    sum.clear();
    const auto add = [&](const unsigned char* stage, auto h_mn_major, auto x_mn_major) {
        constexpr bool a = decltype(h_mn_major)::value, b = decltype(x_mn_major)::value;
        constexpr int pitch_a = a ? SmemH::mn_major_pitch : SmemH::k_major_pitch,
                      pitch_b = b ? B::SmemB::mn_major_pitch : B::SmemB::k_major_pitch;
        const H* const h = reinterpret_cast<const H*>(stage);
        const S* const x = reinterpret_cast<const S*>(stage + planes * SmemH::bytes);
        if constexpr (planes == 2) {
            sum.template add_split<a, b, B::block_k, pitch_a, pitch_b>(h, h + SmemH::elements, x, B::warp_row(),
                                                                       B::warp_col());
        } else {
            // Without a restart for 16-bit rows, whose results are rounded more coarsely than the sums.
            sum.template add<a, b, B::block_k, pitch_a, pitch_b, false>(h, x, B::warp_row(), B::warp_col());
        }
    };
    for (int k_tile = 0; k_tile < B::stages - 1; ++k_tile) {
        copy(k_tile);
    }
#pragma unroll 1
    for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
        copy_async_wait<B::stages - 2>();
        block_barrier(); // this k-tile has arrived for all threads, and none reads the previous one
        copy(k_tile + B::stages - 1);
        const unsigned char* const stage = shared + k_tile % B::stages * stage_bytes;
        using std::false_type;
        using std::true_type;
        if (x_operand.mn_major) {
            transposed(k_tile) ? add(stage, true_type{}, true_type{}) : add(stage, false_type{}, true_type{});
        } else {
            transposed(k_tile) ? add(stage, true_type{}, false_type{}) : add(stage, false_type{}, false_type{});
        }
    }
    copy_async_wait<0>();
    block_barrier();

    const auto visit = [&](const auto& put) {
        B::AccumulatorFragments::visit(
            [&](int i, int j, int e) { put(B::row_of(i, e), B::col_of(j, e), sum.c[i][j][e]); });
    };
    if (args.partials == nullptr) {
        float* const sums = reinterpret_cast<float*>(shared);
        const bool mn_major = args.gradient.mn_major;
        visit([&](int r, int k, float value) { sums[Piece<tile_size, B::block_n>::at(mn_major, r, k)] = value; });
        finish<S, tile_size, B::block_n, B::threads>(args, sums, problem * range.samples + block / row_blocks,
                                                     static_cast<std::int64_t>(block % row_blocks) * tile_size, col);
        return;
    }
    constexpr std::int64_t piece = tile_size * B::block_n;
    if (in_band) {
        float* const to =
            args.partials +
            (((problem_in_launch * band + (block - range.first)) * args.width_blocks + width_block) * args.splits +
             split) *
                piece;
        visit([&](int r, int k, float value) { to[r * B::block_n + k] = value; });
    } else {
        float* const to = args.totals + (block * args.width_blocks + width_block) * piece;
        const bool add_to_earlier = range.first > 0;
        visit([&](int r, int k, float value) {
            float& total = to[r * B::block_n + k];
            total = add_to_earlier ? total + value : value;
        });
    }
}

constexpr int finish_rows = 32, finish_threads = 256;

// Add the parts of 32 rows and one block of columns in order, and write the gradient.
template <class S, int tile_size>
FASTKD_KERNEL void FASTKD_LAUNCH_BOUNDS(finish_threads) finish_kernel(ProductArgs args) {
    constexpr int cols = ProductBlocking<S, tile_size>::block_n, strips = tile_size / finish_rows;
    constexpr std::int64_t piece = tile_size * cols;
    FASTKD_SHARED float sums[Piece<finish_rows, cols>::bytes / sizeof(float)];
    const LaunchRange& range = args.range;
    const std::int64_t band = range.last - range.first;
    const std::int64_t strip = block_x() % strips, width_block = block_x() / strips % args.width_blocks;
    const std::int64_t local = block_x() / strips / args.width_blocks % band;
    const std::int64_t problem_in_launch = block_x() / strips / args.width_blocks / band, block = range.first + local;
    const std::int64_t ahead = strip * finish_rows * cols;
    const float* const parts =
        args.partials + ((problem_in_launch * band + local) * args.width_blocks + width_block) * args.splits * piece +
        ahead;
    const float* const total =
        range.first > 0 ? args.totals + (block * args.width_blocks + width_block) * piece + ahead : nullptr;
    for (int at = thread_x(); at < finish_rows * cols; at += finish_threads) {
        float sum = total != nullptr ? total[at] : 0.0f;
        for (std::int64_t split = 0; split < args.splits; ++split) {
            sum += parts[split * piece + at];
        }
        sums[Piece<finish_rows, cols>::at(args.gradient.mn_major, at / cols, at % cols)] = sum;
    }
    const std::int64_t row = block % range.row_blocks * tile_size + strip * finish_rows;
    if (row < range.rows) {
        const std::int64_t sample =
            (range.first_problem + problem_in_launch) * range.samples + block / range.row_blocks;
        finish<S, finish_rows, cols, finish_threads>(args, sums, sample, row, width_block * cols);
    }
}

template <class S, int tile_size>
cudaError_t run_product(const ProductArgs& args, cudaStream_t stream) {
    const LaunchRange& range = args.range;
    const std::int64_t band = range.last - range.first;
    const std::int64_t items = band * args.splits + (range.blocks - range.last);
    const Grid grid{range.problems * items * args.width_blocks, ProductBlocking<S, tile_size>::threads, 1,
                    product_shared_bytes<S, tile_size>()};
    const cudaError_t error = launch(product_kernel<S, tile_size>, grid, stream, args);
    if (error != cudaSuccess || args.partials == nullptr) {
        return error;
    }
    const std::int64_t strips = range.problems * band * args.width_blocks * (tile_size / finish_rows);
    return launch(finish_kernel<S, tile_size>, {strips, finish_threads}, stream, args);
}

} // namespace

cudaError_t launch_product(const ProductArgs& args, DType dtype, int tile_size, cudaStream_t stream) {
    return with_tile(dtype, tile_size, [&](auto element, auto tile_size_type) {
        return run_product<decltype(element), decltype(tile_size_type)::value>(args, stream);
    });
}

} // namespace fastkd::cuda::relation
