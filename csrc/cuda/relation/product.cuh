// The second half of relation's backward: dX from H. With M_ij = s_i H_ij s_j as the tiles' kernel stored it (I <= J,
// whole tiles, 0 outside of the matrix) and q_i = sum_j M_ij <x_i, x_j>,
//
//     dX_ik = sum_j M_ij x_jk - s_i^2 q_i x_ik        ("mean" and "dot": M = factor H, without the last term)
//
// A block of threads takes one row block and some columns of the gradient. Where that would leave multiprocessors idle,
// or H is there for a band of row blocks alone, it writes parts of the sum in fp32, which a second kernel adds in a
// fixed order. A band's H serves the rows behind the band too (transposed): their sums grow in `totals` from band to
// band.
#pragma once

#include "cuda/relation/rows.cuh"

namespace fastkd::cuda::relation {

// bfloat16 rows meet H rounded to bfloat16; fp16 rows meet H as the sum of two bfloat16, since H has fp32's range, and
// are split alike; floats meet H as it is.
template <class S>
struct StoredH {
    using Type = BFloat16;
    static constexpr int planes = std::is_same<S, Half>::value ? 2 : 1;
};
template <>
struct StoredH<float> {
    using Type = float;
    static constexpr int planes = 1;
};

template <class S, int side>
struct ProductBlocking;
template <>
struct ProductBlocking<BFloat16, 128> : Blocking<BFloat16, 128, 128, 64, 32, 32, 4, 1> {};
template <>
struct ProductBlocking<BFloat16, 64> : Blocking<BFloat16, 64, 128, 32, 64, 32, 3, 2> {};
template <>
struct ProductBlocking<Half, 128> : Blocking<Half, 128, 128, 64, 32, 32, 3, 1> {};
template <>
struct ProductBlocking<Half, 64> : Blocking<Half, 64, 128, 32, 64, 32, 3, 2> {};
template <>
struct ProductBlocking<float, 64> : Blocking<float, 64, 64, 32, 32, 16, 3, 2> {};

struct Gradient {
    void* data;
    std::int64_t batch_stride, row_stride, col_stride;
    bool down;  // rows are contiguous, as in a map seen as rows of pixels
    bool packs; // it and the student's rows can be written and read 16 bytes at a time
};

struct ProductArgs {
    Network student;
    Cut cut;
    const void* h;
    const float* row_sums; // q
    const double* scales;
    Gradient gradient;
    float* partials; // [problem here][row block of the band][block of columns][split], rows x columns each; or null
    float* totals;   // [row block][block of columns], or null where the launch is whole
    std::int64_t width_blocks, splits;
    bool cosine;
};

// A (rows x cols) piece of the gradient, its sums in shared memory as they will lie in global memory, [row][column] or,
// `down`, [column][row]; then two numbers of each row.
template <int rows, int cols>
struct Piece {
    static constexpr int pad = 4;
    static constexpr int sums = rows * (cols + pad) > cols*(rows + pad) ? rows * (cols + pad) : cols * (rows + pad);
    static constexpr int bytes = (sums + 2 * rows) * static_cast<int>(sizeof(float));

    static FASTKD_DEVICE int at(bool down, int row, int col) {
        return down ? col * (rows + pad) + row : row * (cols + pad) + col;
    }
};

template <class S, int rows, int cols, int threads, bool down>
FASTKD_DEVICE void finish_lines(const ProductArgs& args, const float* sums, S* to, const S* from, int rows_left,
                                int cols_left) {
    constexpr int inner = down ? rows : cols, outer = down ? cols : rows;
    constexpr int pitch = inner + Piece<rows, cols>::pad, size = Pack<S>::size;
    const float* const radial = sums + Piece<rows, cols>::sums; // s_i^2 q_i
    const float* const alive = radial + rows;                   // 0 for rows without a direction
    const Gradient& out = args.gradient;
    const std::int64_t to_outer = down ? out.col_stride : out.row_stride;
    const std::int64_t to_inner = down ? out.row_stride : out.col_stride;
    const std::int64_t from_outer = down ? args.student.rows.k_stride : args.student.rows.index_stride;
    const std::int64_t from_inner = down ? args.student.rows.index_stride : args.student.rows.k_stride;
    const int inner_left = down ? rows_left : cols_left, outer_left = down ? cols_left : rows_left;
    const bool cosine = args.cosine;
    const auto value_of = [&](float sum, float x, int row) {
        // A row without a direction has no gradient whatever the others hold.
        return cosine ? (alive[row] == 0.0f ? 0.0f : sum - x * radial[row]) : sum;
    };
    if (args.gradient.packs) { // then whole packs are inside or outside
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
                    narrow<S>(value_of(sums[line * pitch + begin + e], widen(x.at[e]), down ? begin + e : line));
            }
            store_pack(to + line * to_outer + begin, pack);
        }
        return;
    }
    constexpr int step = threads / inner;
    static_assert(step > 0 && threads % inner == 0, "a thread keeps to its place in every line");
    const int place = thread_x() % inner;
    from += place * from_inner;
    to += place * to_inner;
#pragma unroll 4
    for (int line = thread_x() / inner; line < outer; line += step) {
        if (line < outer_left && place < inner_left) {
            const float x = cosine ? widen(from[line * from_outer]) : 0.0f;
            to[line * to_outer] = narrow<S>(value_of(sums[line * pitch + place], x, down ? place : line));
        }
    }
}

// `row` and `col` are the piece's first, within the sample.
template <class S, int rows, int cols, int threads>
FASTKD_DEVICE void finish(const ProductArgs& args, float* sums, std::int64_t sample, std::int64_t row,
                          std::int64_t col) {
    const Gradient& out = args.gradient;
    const int rows_left = static_cast<int>(args.cut.rows - row < rows ? args.cut.rows - row : rows);
    const int cols_left = static_cast<int>(args.student.width - col < cols ? args.student.width - col : cols);
    float* const of_rows = sums + Piece<rows, cols>::sums;
    for (int at = thread_x(); args.cosine && at < rows_left; at += threads) {
        const std::int64_t index = sample * args.cut.rows + row + at;
        const auto scale = static_cast<float>(args.scales[index]);
        of_rows[at] = args.row_sums[index] * scale * scale;
        of_rows[rows + at] = scale >= no_direction ? 0.0f : 1.0f;
    }
    block_barrier(); // for the sums too
    S* const to = static_cast<S*>(out.data) + sample * out.batch_stride + row * out.row_stride + col * out.col_stride;
    const S* const from = rows_at<S>(args.student, sample, row) + col * args.student.rows.k_stride;
    if (out.down) {
        finish_lines<S, rows, cols, threads, true>(args, sums, to, from, rows_left, cols_left);
    } else {
        finish_lines<S, rows, cols, threads, false>(args, sums, to, from, rows_left, cols_left);
    }
}

template <class S, int side>
constexpr int product_shared_bytes() {
    using B = ProductBlocking<S, side>;
    constexpr int pipeline = B::stages * (StoredH<S>::planes * B::A::bytes + B::B::bytes);
    constexpr int piece = Piece<side, B::cols>::bytes;
    return pipeline > piece ? pipeline : piece;
}

template <class S, int side>
FASTKD_KERNEL void FASTKD_LAUNCH_BOUNDS_OF((ProductBlocking<S, side>::threads), (ProductBlocking<S, side>::resident))
    product_kernel(ProductArgs args) {
    using B = ProductBlocking<S, side>;
    using H = typename StoredH<S>::Type;
    using SharedH = SharedOperand<H, side, B::depth>;
    constexpr int planes = StoredH<S>::planes, per_block = side / B::depth;
    constexpr int stage_bytes = planes * SharedH::bytes + B::B::bytes;
    FASTKD_DYNAMIC_SHARED(shared);
    const Cut& cut = args.cut;
    const std::int64_t band = cut.last - cut.first, behind = cut.blocks - cut.last;
    const std::int64_t items = band * args.splits + behind; // of a problem and a block of columns
    const std::int64_t width_block = block_x() % args.width_blocks;
    const std::int64_t item = block_x() / args.width_blocks % items, here = block_x() / args.width_blocks / items;
    const std::int64_t problem = cut.first_problem + here;
    const bool in_band = item < band * args.splits;
    const std::int64_t block = in_band ? cut.first + item / args.splits : cut.last + (item - band * args.splits);
    const std::int64_t split = in_band ? item % args.splits : 0;
    // H's columns: those of the band and behind it, or for rows behind the band the band's.
    const std::int64_t columns = in_band ? cut.blocks - cut.first : band;
    const std::int64_t share = in_band ? (columns + args.splits - 1) / args.splits : columns;
    const std::int64_t begin = split * share < columns ? split * share : columns;
    const std::int64_t end = begin + share < columns ? begin + share : columns;
    const int chunks = static_cast<int>(end - begin) * per_block;
    const std::int64_t first = cut.first + begin;
    const std::int64_t col = width_block * B::cols;

    const auto transposed = [&](int chunk) { return first + chunk / per_block < block; };
    // The rows as the product's second operand: what was an index is summed over.
    const Operand& rows = args.student.rows;
    const Operand columns_of_x{rows.data, rows.k_stride, rows.index_stride, rows.unit, !rows.k_major};
    const auto copy = [&](int chunk) {
        if (chunk < chunks) {
            const std::int64_t other = first + chunk / per_block;
            const int k = chunk % per_block * B::depth;
            unsigned char* const to = shared + chunk % B::stages * stage_bytes;
            const bool turned = transposed(chunk);
            const std::int64_t tile = turned ? cut.stored(other, block) : cut.stored(block, other);
            const H* const h = static_cast<const H*>(args.h) + (here * cut.tiles + tile) * (planes * side * side) +
                               (turned ? k * side : k);
            const Operand of_h{h, turned ? 1 : side, turned ? side : 1, 16 / static_cast<int>(sizeof(H)), turned};
#pragma unroll
            for (int plane = 0; plane < planes; ++plane) {
                OperandCopy<H, side, B::depth, B::threads>::start(reinterpret_cast<H*>(to + plane * SharedH::bytes),
                                                                  h + plane * side * side, of_h, side, B::depth);
            }
            const std::int64_t row = other % cut.row_blocks * side + k;
            const std::int64_t deep = row < cut.rows ? cut.rows - row : 0;
            const S* const x = deep == 0
                                   ? static_cast<const S*>(rows.data) // of which nothing is read
                                   : rows_at<S>(args.student, problem * cut.samples + other / cut.row_blocks, row) +
                                         col * rows.k_stride;
            OperandCopy<S, B::cols, B::depth, B::threads>::start(reinterpret_cast<S*>(to + planes * SharedH::bytes), x,
                                                                 columns_of_x, args.student.width - col, deep);
        }
        copy_async_commit(); // empty ones too: each chunk is a group
    };
    typename B::Accumulated sum;
    sum.clear();
    const auto add = [&](const unsigned char* stage, auto h_k_major, auto x_k_major) {
        constexpr bool a = decltype(h_k_major)::value, b = decltype(x_k_major)::value;
        constexpr int pitch_a = a ? SharedH::by_k : SharedH::by_index, pitch_b = b ? B::B::by_k : B::B::by_index;
        const H* const h = reinterpret_cast<const H*>(stage);
        const S* const x = reinterpret_cast<const S*>(stage + planes * SharedH::bytes);
        if constexpr (planes == 2) {
            sum.template add_split<a, b, B::depth, pitch_a, pitch_b>(h, h + SharedH::elements, x, B::warp_row(),
                                                                     B::warp_col());
        } else {
            sum.template add<a, b, B::depth, pitch_a, pitch_b>(h, x, B::warp_row(), B::warp_col());
        }
    };
    for (int chunk = 0; chunk < B::stages - 1; ++chunk) {
        copy(chunk);
    }
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
        copy_async_wait<B::stages - 2>();
        block_barrier(); // this chunk is there for all, and the one before it no longer read
        copy(chunk + B::stages - 1);
        const unsigned char* const stage = shared + chunk % B::stages * stage_bytes;
        using std::false_type;
        using std::true_type;
        if (columns_of_x.k_major) {
            transposed(chunk) ? add(stage, true_type{}, true_type{}) : add(stage, false_type{}, true_type{});
        } else {
            transposed(chunk) ? add(stage, true_type{}, false_type{}) : add(stage, false_type{}, false_type{});
        }
    }
    copy_async_wait<0>();
    block_barrier();

    const auto visit = [&](const auto& put) {
        B::Accumulated::visit([&](int i, int j, int e) { put(B::row_of(i, e), B::col_of(j, e), sum.c[i][j][e]); });
    };
    if (args.partials == nullptr) {
        float* const sums = reinterpret_cast<float*>(shared);
        const bool down = args.gradient.down;
        visit([&](int r, int k, float value) { sums[Piece<side, B::cols>::at(down, r, k)] = value; });
        finish<S, side, B::cols, B::threads>(args, sums, problem * cut.samples + block / cut.row_blocks,
                                             block % cut.row_blocks * side, col);
        return;
    }
    constexpr std::int64_t piece = side * B::cols;
    if (in_band) {
        float* const to =
            args.partials +
            (((here * band + (block - cut.first)) * args.width_blocks + width_block) * args.splits + split) * piece;
        visit([&](int r, int k, float value) { to[r * B::cols + k] = value; });
    } else {
        float* const to = args.totals + (block * args.width_blocks + width_block) * piece;
        const bool more = cut.first > 0;
        visit([&](int r, int k, float value) {
            float& total = to[r * B::cols + k];
            total = more ? total + value : value;
        });
    }
}

constexpr int finish_rows = 32, finish_threads = 256;

// 32 rows of a row block of the band and one block of columns: the parts added in order.
template <class S, int side>
FASTKD_KERNEL void FASTKD_LAUNCH_BOUNDS(finish_threads) finish_kernel(ProductArgs args) {
    constexpr int cols = ProductBlocking<S, side>::cols, strips = side / finish_rows;
    constexpr std::int64_t piece = side * cols;
    FASTKD_SHARED float sums[Piece<finish_rows, cols>::bytes / sizeof(float)];
    const Cut& cut = args.cut;
    const std::int64_t band = cut.last - cut.first;
    const std::int64_t strip = block_x() % strips, width_block = block_x() / strips % args.width_blocks;
    const std::int64_t local = block_x() / strips / args.width_blocks % band;
    const std::int64_t here = block_x() / strips / args.width_blocks / band, block = cut.first + local;
    const std::int64_t ahead = strip * finish_rows * cols;
    const float* const parts =
        args.partials + ((here * band + local) * args.width_blocks + width_block) * args.splits * piece + ahead;
    const float* const total =
        cut.first > 0 ? args.totals + (block * args.width_blocks + width_block) * piece + ahead : nullptr;
    for (int at = thread_x(); at < finish_rows * cols; at += finish_threads) {
        float sum = total != nullptr ? total[at] : 0.0f;
        for (std::int64_t split = 0; split < args.splits; ++split) {
            sum += parts[split * piece + at];
        }
        sums[Piece<finish_rows, cols>::at(args.gradient.down, at / cols, at % cols)] = sum;
    }
    const std::int64_t row = block % cut.row_blocks * side + strip * finish_rows;
    if (row < cut.rows) {
        const std::int64_t sample = (cut.first_problem + here) * cut.samples + block / cut.row_blocks;
        finish<S, finish_rows, cols, finish_threads>(args, sums, sample, row, width_block * cols);
    }
}

} // namespace fastkd::cuda::relation
