// Operations on one tile of the two relation matrices: its contributions to the row statistics, and its tile of H.
//
// E is symmetric, so a tile off the diagonal contributes to the rows of both its blocks: every exponential is used
// twice.
#pragma once

#include "common/relation.h"
#include "cpu/gemm/packing.h"
#include "cpu/softmax_kl/row.h"

namespace fastkd::cpu::FASTKD_ISA {

constexpr int tile_side = 96; // the largest block

// E^S and E^T of one block of rows against another; `ld` is the row stride.
template <class T>
struct Tile {
    const T* e_s;
    const T* e_t;
    std::int64_t ld, rows, cols;
};

// The statistics of a block's rows: planes of doubles.
struct RowStatistics {
    double* data = nullptr;
    std::int64_t plane = 0;
    FASTKD_INLINE double* operator[](int k) const { return data + k * plane; }
};

// Return the mask of the lanes within `cols` of the vector at `col`.
template <class T>
FASTKD_INLINE auto inside(std::int64_t cols, std::int64_t col) {
    const std::int64_t valid = cols - col < lanes<T> ? cols - col : lanes<T>;
    return lane_index<T>() < static_cast<typename BitsOf<T>::type>(valid);
}

// ---- sums over both sides of a tile --------------------------------------------------------------------------------

// Add a term of `count` numbers per element, symmetric in i and j, to the statistics `row` of the tile's rows and,
// unless null, `col` of its columns.
template <class T, class Term>
FASTKD_NOINLINE void add_symmetric(Tile<T> tile, const Term& term, RowStatistics row, RowStatistics col) {
    constexpr int count = Term::count;
    constexpr int group = 4;
    T col_sums[count][tile_side] = {};
    for (std::int64_t r = 0; r < tile.rows; r += group) {
        const int some = tile.rows - r < group ? static_cast<int>(tile.rows - r) : group;
        Vec<T> row_sums[group][count] = {};
        for (std::int64_t c = 0; c < tile.cols; c += lanes<T>) {
            const auto valid = inside<T>(tile.cols, c);
            const bool whole = c + lanes<T> <= tile.cols;
            Vec<T> down[count] = {};
            const auto one = [&](int g) __attribute__((always_inline)) {
                Vec<T> value[count];
                const std::int64_t at = (r + g) * tile.ld + c;
                term(load(tile.e_s + at), load(tile.e_t + at), value);
                for (int k = 0; k < count; ++k) {
                    const Vec<T> masked = whole ? value[k] : (valid ? value[k] : Vec<T>{});
                    row_sums[g][k] += masked;
                    down[k] += masked;
                }
            };
            if (some == group) {
#pragma GCC unroll 4
                for (int g = 0; g < group; ++g) {
                    one(g);
                }
            } else {
                for (int g = 0; g < some; ++g) {
                    one(g);
                }
            }
            for (int k = 0; k < count; ++k) {
                store(&col_sums[k][c], load(&col_sums[k][c]) + down[k]);
            }
        }
        for (int k = 0; k < count; ++k) {
            for (int g = 0; g < some; ++g) {
                row[k][r + g] += static_cast<double>(sum(row_sums[g][k]));
            }
        }
    }
    if (col.data != nullptr) {
        for (int k = 0; k < count; ++k) {
            for (std::int64_t c = 0; c < tile.cols; ++c) {
                col[k][c] += static_cast<double>(col_sums[k][c]);
            }
        }
    }
}

// kl with a fixed shift of 1/tau.
template <class T>
struct KLTerm {
    static constexpr int count = 3;
    ScaledExp<T> exp;
    FASTKD_INLINE void operator()(Vec<T> e_s, Vec<T> e_t, Vec<T> (&value)[3]) const {
        const KLSums<T> terms = kl_terms<T>(e_s - T(1), e_t - T(1), exp);
        value[0] = terms.z_s;
        value[1] = terms.z_t;
        value[2] = terms.a;
    }
};

template <class T>
struct SquareTerm {
    static constexpr int count = 1;
    FASTKD_INLINE void operator()(Vec<T> e_s, Vec<T> e_t, Vec<T> (&value)[1]) const {
        const Vec<T> difference = e_s - e_t;
        value[0] = difference * difference;
    }
};

// row_cosine, first pass: |E^S_i|^2, |E^T_i|^2.
template <class T>
struct NormTerm {
    static constexpr int count = 2;
    FASTKD_INLINE void operator()(Vec<T> e_s, Vec<T> e_t, Vec<T> (&value)[2]) const {
        value[0] = e_s * e_s;
        value[1] = e_t * e_t;
    }
};

// row_cosine, second pass: add |E^S_i/n_i - E^T_i/m_i|^2 to plane 2; planes 0 and 1 are n and m.
template <class T>
FASTKD_NOINLINE void add_cosine(Tile<T> tile, RowStatistics row, RowStatistics col) {
    T col_n[tile_side], col_m[tile_side], col_sums[tile_side] = {};
    for (std::int64_t c = 0; c < tile_side; ++c) {
        const bool has = col.data != nullptr && c < tile.cols;
        col_n[c] = has ? static_cast<T>(1 / col[0][c]) : T(0);
        col_m[c] = has ? static_cast<T>(1 / col[1][c]) : T(0);
    }
    for (std::int64_t r = 0; r < tile.rows; ++r) {
        const T n = static_cast<T>(1 / row[0][r]);
        const T m = static_cast<T>(1 / row[1][r]);
        Vec<T> along{};
        for (std::int64_t c = 0; c < tile.cols; c += lanes<T>) {
            const auto valid = inside<T>(tile.cols, c);
            const Vec<T> e_s = valid ? load(tile.e_s + r * tile.ld + c) : Vec<T>{};
            const Vec<T> e_t = valid ? load(tile.e_t + r * tile.ld + c) : Vec<T>{};
            const Vec<T> across = e_s * n - e_t * m;
            along += across * across;
            if (col.data != nullptr) {
                const Vec<T> down = e_s * load(col_n + c) - e_t * load(col_m + c);
                store(col_sums + c, load(col_sums + c) + down * down);
            }
        }
        row[2][r] += static_cast<double>(sum(along));
    }
    if (col.data != nullptr) {
        for (std::int64_t c = 0; c < tile.cols; ++c) {
            col[2][c] += static_cast<double>(col_sums[c]);
        }
    }
}

// kl with a maximum per row: the planes are the members of KLState. Adds to the tile's rows only.
template <class T>
FASTKD_NOINLINE void add_kl_rows(Tile<T> tile, ScaledExp<T> exp, RowStatistics row) {
    for (std::int64_t r = 0; r < tile.rows; ++r) {
        const T* s = tile.e_s + r * tile.ld;
        const T* t = tile.e_t + r * tile.ld;
        softmax_kl::KLState<double> state{row[0][r], row[1][r], row[2][r], row[3][r], row[4][r]};
        state.raise(block_max(s, tile.cols), block_max(t, tile.cols), exp.scale);
        accumulate(state, s, t, tile.cols, exp, s + tile.ld, t + tile.ld);
        row[0][r] = state.max_s;
        row[1][r] = state.max_t;
        row[2][r] = state.z_s;
        row[3][r] = state.z_t;
        row[4][r] = state.a;
    }
}

// out[c][r] = in[r][c], both with row stride `ld` and padded to whole vectors in both directions.
template <class T>
FASTKD_NOINLINE void transpose_tile(const T* in, std::int64_t ld, std::int64_t rows, std::int64_t cols, T* out) {
    for (std::int64_t r = 0; r < rows; r += lanes<T>) {
        for (std::int64_t c = 0; c < cols; c += lanes<T>) {
            Vec<T> block[lanes<T>];
            for (int l = 0; l < lanes<T>; ++l) {
                block[l] = load(in + (r + l) * ld + c);
            }
            transpose<T>(block);
            for (int l = 0; l < lanes<T>; ++l) {
                store(out + (c + l) * ld + r, block[l]);
            }
        }
    }
}

// e[r][c] *= row[r] col[c]
template <class T>
FASTKD_NOINLINE void scale_tile(T* e, std::int64_t ld, std::int64_t rows, std::int64_t cols, const T* row,
                                const T* col) {
    for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t c = 0; c < cols; c += lanes<T>) {
            store(e + r * ld + c, load(e + r * ld + c) * row[r] * load(col + c));
        }
    }
}

template <class T>
FASTKD_NOINLINE void negate_tile(T* e, std::int64_t ld, std::int64_t rows, std::int64_t cols) {
    for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t c = 0; c < cols; c += lanes<T>) {
            store(e + r * ld + c, -load(e + r * ld + c));
        }
    }
}

// ---- H -------------------------------------------------------------------------------------------------------------

// A row's coefficients in H: a and b of common/relation.h if f is the same for all rows. For kl with a maximum per row,
// `a` is g/tau, and the other members belong to both networks' LogSoftmax.
template <class T>
struct RowCoefficients {
    T a[tile_side], b[tile_side];
    T center_s[tile_side], high_s[tile_side], low_s[tile_side];
    T center_t[tile_side], high_t[tile_side], low_t[tile_side];
};

template <class T>
struct KLFunction {
    ScaledExp<T> exp;
    FASTKD_INLINE Vec<T> operator()(Vec<T> e) const { return exp(e - T(1), T(0), T(0)); }
};
template <class T>
struct Identity {
    FASTKD_INLINE Vec<T> operator()(Vec<T> e) const { return e; }
};

// Write a tile of H, h = outer element(r, c, e_s, e_t), 0 beyond the tile. Add the row and column sums of H E to q_row
// and q_col unless null.
template <class T, class Element>
FASTKD_INLINE void fill_h(Tile<T> tile, const Element& element, T outer, T* h, double* q_row, double* q_col) {
    T col_sums[tile_side] = {};
    constexpr int group = 4;
    for (std::int64_t r = 0; r < tile.rows; r += group) {
        const int some = tile.rows - r < group ? static_cast<int>(tile.rows - r) : group;
        Vec<T> row_sums[group] = {};
        for (std::int64_t c = 0; c < tile.cols; c += lanes<T>) {
            const auto valid = inside<T>(tile.cols, c);
            const bool whole = c + lanes<T> <= tile.cols;
            Vec<T> down{};
            const auto one = [&](int g) __attribute__((always_inline)) {
                const std::int64_t at = (r + g) * tile.ld + c;
                const Vec<T> e_s = load(tile.e_s + at);
                Vec<T> value = element(r + g, c, e_s, load(tile.e_t + at));
                value = whole ? value : (valid ? value : Vec<T>{});
                const Vec<T> product = value * (whole ? e_s : (valid ? e_s : Vec<T>{}));
                row_sums[g] += product;
                down += product;
                store(h + at, value * outer);
            };
            if (some == group) {
#pragma GCC unroll 4
                for (int g = 0; g < group; ++g) {
                    one(g);
                }
            } else {
                for (int g = 0; g < some; ++g) {
                    one(g);
                }
            }
            store(col_sums + c, load(col_sums + c) + down);
        }
        for (int g = 0; g < some && q_row != nullptr; ++g) {
            q_row[r + g] += static_cast<double>(sum(row_sums[g]));
        }
    }
    if (q_col != nullptr) {
        for (std::int64_t c = 0; c < tile.cols; ++c) {
            q_col[c] += static_cast<double>(col_sums[c]);
        }
    }
}

template <class T>
FASTKD_INLINE Vec<T> magnitude(Vec<T> x) {
    return x < T(0) ? -x : x;
}

// Compute H if f is the same for all rows: f_s a - f_t b, written so that equal networks give exactly 0. The two such
// forms, f_t (a - b) + (f_s - f_t) a and f_s (a - b) + (f_s - f_t) b, contain a product that cancels: f_t a or f_s b.
// With `cross`, a row is not related to itself, so its z may be far below 1 and one of these products far above the
// result: the form with the smaller product is used.
template <class T, bool cross, class Function>
FASTKD_NOINLINE void gradient_tile(Tile<T> tile, const Function& f, const RowCoefficients<T>& row,
                                   const RowCoefficients<T>& col, T outer, T* h, double* q_row, double* q_col) {
    const auto difference = [&](Vec<T> f_s, Vec<T> f_t, Vec<T> a, Vec<T> b) __attribute__((always_inline)) {
        if constexpr (cross) {
            const auto first = magnitude<T>(f_t * a) <= magnitude<T>(f_s * b); // both have the sign of g
            return (first ? f_t : f_s) * (a - b) + (f_s - f_t) * (first ? a : b);
        } else {
            return f_t * (a - b) + (f_s - f_t) * a;
        }
    };
    const auto element = [&](std::int64_t r, std::int64_t c, Vec<T> e_s, Vec<T> e_t) __attribute__((always_inline)) {
        const Vec<T> f_s = f(e_s);
        const Vec<T> f_t = f(e_t);
        if constexpr (cross) { // the row's and the column's coefficients may also differ in magnitude
            return difference(f_s, f_t, broadcast(row.a[r]), broadcast(row.b[r])) +
                   difference(f_s, f_t, load(col.a + c), load(col.b + c));
        } else {
            return difference(f_s, f_t, row.a[r] + load(col.a + c), row.b[r] + load(col.b + c));
        }
    };
    fill_h(tile, element, outer, h, q_row, q_col);
}

// Compute H of row_cosine: e_s a - e_t b, exactly 0 for equal networks. The coefficients, about 1/n^2 and 1/(n m),
// differ in magnitude as the networks' norms n and m do; multiplying the difference e_s - e_t by the smaller one
// cancels nothing.
template <class T>
FASTKD_NOINLINE void gradient_tile_cosine(Tile<T> tile, const RowCoefficients<T>& row, const RowCoefficients<T>& col,
                                          T outer, T* h, double* q_row, double* q_col) {
    const auto element = [&](std::int64_t r, std::int64_t c, Vec<T> e_s, Vec<T> e_t) __attribute__((always_inline)) {
        const Vec<T> a = row.a[r] + load(col.a + c);
        const Vec<T> b = row.b[r] + load(col.b + c);
        const auto by_a = magnitude<T>(a) <= magnitude<T>(b);
        return (e_s - e_t) * (by_a ? a : b) + (by_a ? e_t : e_s) * (a - b);
    };
    fill_h(tile, element, outer, h, q_row, q_col);
}

// Compute H of kl with a maximum per row.
template <class T>
FASTKD_NOINLINE void gradient_tile_kl(Tile<T> tile, ScaledExp<T> exp, const RowCoefficients<T>& row,
                                      const RowCoefficients<T>& col, T outer, T* h, double* q_row, double* q_col) {
    const auto element = [&](std::int64_t r, std::int64_t c, Vec<T> e_s, Vec<T> e_t) __attribute__((always_inline)) {
        const Vec<T> across = exp(e_s - row.center_s[r], row.high_s[r], row.low_s[r]) -
                              exp(e_t - row.center_t[r], row.high_t[r], row.low_t[r]);
        const Vec<T> down = exp(e_s - load(col.center_s + c), load(col.high_s + c), load(col.low_s + c)) -
                            exp(e_t - load(col.center_t + c), load(col.high_t + c), load(col.low_t + c));
        return across * row.a[r] + down * load(col.a + c);
    };
    fill_h(tile, element, outer, h, q_row, q_col);
}

} // namespace fastkd::cpu::FASTKD_ISA
