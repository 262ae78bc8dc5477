// Matrix products of pairs of bfloat16 by Intel AMX: 16 x 16 sums of 16 pairs per instruction. Used only if
// amx_products() is true. A tile here is one of AMX's registers.
//
// The right operand of an instruction has the layout of a packed panel (gemm/bf16.h): [pair][column]. The left operand
// is [row][pair], so blocks that are left operands are kept in this layout too: rows_of_pairs.
#pragma once

#include "cpu/amx.h"
#include "cpu/gemm/bf16.h"

namespace fastkd::cpu::FASTKD_ISA {

#if defined(FASTKD_AMX) && defined(FASTKD_BF16_PRODUCTS)

constexpr std::int64_t tile_rows = 16, tile_pairs = 16; // rows, columns and pairs of a tile

// Call visit for the constants 0 to count - 1.
template <class Visit, int... index>
FASTKD_INLINE void for_constants(const Visit& visit, std::integer_sequence<int, index...>) {
    (visit(std::integral_constant<int, index>{}), ...);
}
template <int count, class Visit>
FASTKD_INLINE void for_constants(const Visit& visit) {
    for_constants(visit, std::make_integer_sequence<int, count>{});
}

// The shapes of tiles 0 to 5, the sums, 6, the left operand, and 7, the right one.
constexpr int left_tile = 6, right_tile = 7;
FASTKD_INLINE TileShapes tile_shapes(std::int64_t pairs) {
    TileShapes shapes;
    for (int tile = 0; tile <= right_tile; ++tile) {
        shapes.rows[tile] = static_cast<std::uint8_t>(tile == right_tile ? pairs : tile_rows);
        shapes.row_bytes[tile] = static_cast<std::uint16_t>(4 * (tile == left_tile ? pairs : tile_pairs));
    }
    return shapes;
}

// c[m][n] (+)= sum_k a[m][k] b[k][n] for `rows` x `width` tiles of c, over `steps` tiles along K. By Intel's
// optimisation manual a product takes 16 cycles and its result 52, so at least four sums are needed; a load takes 8, so
// 8 loads per 6 products do not limit them. Not measured.
template <int rows, int width>
FASTKD_INLINE void amx_block(const PairWord* a, std::int64_t a_row, const PairWord* b, std::int64_t steps, float* c,
                             std::int64_t c_row, bool add) {
    const auto for_sums = [](const auto& visit) __attribute__((always_inline)) {
        for_constants<rows>([&](auto m) __attribute__((always_inline)) {
            for_constants<width>([&](auto v) __attribute__((always_inline)) { visit(m, v); });
        });
    };
    const std::int64_t bytes = sizeof(float), b_row = width * tile_pairs;
    for_sums([&](auto m, auto v) __attribute__((always_inline)) {
        constexpr int sum = 3 * decltype(m)::value + decltype(v)::value;
        add ? load_tile<sum>(c + m * tile_rows * c_row + v * tile_pairs, c_row * bytes) : zero_tile<sum>();
    });
    for (std::int64_t step = 0; step < steps; ++step) {
        for_constants<rows>([&](auto m) __attribute__((always_inline)) {
            load_tile<left_tile>(a + m * tile_rows * a_row, a_row * bytes);
            for_constants<width>([&](auto v) __attribute__((always_inline)) {
                load_tile<right_tile>(b + v * tile_pairs, b_row * bytes);
                multiply_tiles<3 * decltype(m)::value + decltype(v)::value, left_tile, right_tile>();
            });
        });
        a += tile_pairs;
        b += tile_pairs * b_row;
    }
    for_sums([&](auto m, auto v) __attribute__((always_inline)) {
        constexpr int sum = 3 * decltype(m)::value + decltype(v)::value;
        store_tile<sum>(c + m * tile_rows * c_row + v * tile_pairs, c_row * bytes);
    });
}
template <int width>
FASTKD_NOINLINE void amx_panel(const PairWord* a, std::int64_t a_row, std::int64_t rows, const PairWord* b,
                               std::int64_t steps, float* c, std::int64_t c_row, bool add) {
    std::int64_t m = 0;
    for (; m + tile_rows < rows; m += 2 * tile_rows) {
        amx_block<2, width>(a + m * a_row, a_row, b, steps, c + m * c_row, c_row, add);
    }
    if (m < rows) {
        amx_block<1, width>(a + m * a_row, a_row, b, steps, c + m * c_row, c_row, add);
    }
}

// c[m][y] (+)= sum_i a[m][i] y_packed[i][y], i < inner pairs. a and c have `rows` rounded up to a multiple of
// tile_rows.
//
// Each instruction adds 16 pairs before it adds them to the sum, so long sums need no further levels.
FASTKD_NOINLINE void amx_product(const PairWord* a, std::int64_t a_row, std::int64_t rows, const PairWord* y,
                                 Panels<float> y_panels, std::int64_t inner, float* c, std::int64_t c_row, bool add) {
    const auto multiply = [&](std::int64_t from, std::int64_t steps) __attribute__((always_inline)) {
        for (std::int64_t q = 0; q < y_panels.size; ++q) {
            const std::int64_t begin = y_panels.begin(q);
            const int width = y_panels.width(q);
            const PairWord* b = y + begin * inner + from * width * tile_pairs;
            const auto panel = width == 3 ? amx_panel<3> : (width == 2 ? amx_panel<2> : amx_panel<1>);
            panel(a + from, a_row, rows, b, steps, c + begin, c_row, add || from > 0);
        }
    };
    const std::int64_t steps = inner / tile_pairs, rest = inner % tile_pairs;
    if (steps > 0) {
        configure_tiles(tile_shapes(tile_pairs));
        multiply(0, steps);
    }
    if (rest > 0) {
        configure_tiles(tile_shapes(rest));
        multiply(inner - rest, 1);
    }
    release_tiles();
}

// Write a packed block as rows of pairs: to[p][k] = packed[k][p] for `count` rows, rounded up to whole vectors.
FASTKD_NOINLINE void rows_of_pairs(const PairWord* packed, std::int64_t count, std::int64_t pairs, PairWord* to) {
    const Panels<float> panels(count);
    for (std::int64_t panel = 0; panel < panels.size; ++panel) {
        const std::int64_t width = panels.width(panel) * lanes<float>, begin = panels.begin(panel);
        transpose_pairs(packed + begin * pairs, width, pairs, width, to + begin * pairs, pairs);
    }
}

#else // never called: see amx_products()
FASTKD_INLINE void amx_product(const PairWord*, std::int64_t, std::int64_t, const PairWord*, Panels<float>,
                               std::int64_t, float*, std::int64_t, bool) {
}
FASTKD_INLINE void rows_of_pairs(const PairWord*, std::int64_t, std::int64_t, PairWord*) {
}
#endif

} // namespace fastkd::cpu::FASTKD_ISA
