// A panel: a few hundred consecutive pixels of one sample, in the dtype of the arithmetic.
#pragma once

#include "common/pixel_word.h"
#include "cpu/gemm/small.h"
#include "cpu/storage.h"

namespace fastkd::cpu::FASTKD_ISA {

using pixel_word::Array;

// Return whether `dtype` is T's.
template <class T>
FASTKD_INLINE bool stored_as_is(DType dtype) {
    return dtype == (sizeof(T) == 8 ? DType::Float64 : DType::Float32);
}

// Load `count` elements, padded with zeros to `padded`, a multiple of `lanes`.
template <class T, class S>
FASTKD_INLINE void load_row(const S* from, std::int64_t count, T* to, std::int64_t padded) {
    std::int64_t i = 0;
    for (; i + lanes<T> <= count; i += lanes<T>) {
        store(to + i, load(from + i));
    }
    if (i < count) {
        S rest[lanes<T>] = {};
        __builtin_memcpy(rest, from + i, (count - i) * sizeof(S));
        store(to + i, load(rest));
        i += lanes<T>;
    }
    for (; i < padded; i += lanes<T>) {
        store(to + i, Vec<T>{});
    }
}

template <class T, class S>
FASTKD_INLINE void store_row(const T* from, std::int64_t count, S* to) {
    std::int64_t i = 0;
    for (; i + lanes<T> <= count; i += lanes<T>) {
        store(to + i, load(from + i));
    }
    if (i < count) {
        S rest[lanes<T>];
        store(rest, load(from + i));
        __builtin_memcpy(to + i, rest, (count - i) * sizeof(S));
    }
}

// Like store_row, with non-temporal stores to aligned addresses. Finish with stream_fence.
template <class T, class S>
FASTKD_INLINE void stream_row(const T* from, std::int64_t count, S* to) {
    const std::int64_t whole = count / lanes<T> * lanes<T>;
    for (std::int64_t i = 0; i < whole; i += lanes<T>) {
        store_stream(to + i, load(from + i));
    }
    store_row(from + whole, count - whole, to + whole);
}

// Set the elements with valid == 0 to zero.
template <class T>
FASTKD_INLINE void keep_valid(T* row, const T* valid, std::int64_t count) {
    for (std::int64_t i = 0; i < count; i += lanes<T>) {
        store(row + i, load(valid + i) == T(0) ? Vec<T>{} : load(row + i));
    }
}

// The pixels of a panel. `width` is `count` rounded up. `valid` is 1 or 0 per pixel, or null if all are valid and
// count == width.
template <class T>
struct Pixels {
    std::int64_t sample;
    std::int64_t begin;
    std::int64_t count;
    std::int64_t width;
    const T* valid;
};

// A matrix with one row per pixel (`by_pixel`) or one row per feature; `stride` elements between rows.
template <class T>
struct Panel {
    const T* data;
    std::int64_t stride;
    bool by_pixel;
};

FASTKD_INLINE bool by_pixel(const Array& array) {
    return array.column == 1;
}

// Return the address of the panel's first element. The last argument only selects the type.
template <class T, class S>
FASTKD_INLINE S* address(const Array& array, const Pixels<T>& pixels, S) {
    return const_cast<S*>(static_cast<const S*>(array.data)) + pixels.sample * array.batch + pixels.begin * array.pixel;
}

// Return the panel in place if its dtype, masks and padding allow; otherwise copy it to `scratch`, with invalid pixels
// and the columns from `columns` to `padded` set to zero. With `copy_map`, maps are always copied: each feature of a
// map is on a different page, and with few features or several passes the TLB misses cost more than the copy.
template <class T>
Panel<T> load_panel(const Array& array, const Pixels<T>& pixels, std::int64_t columns, std::int64_t padded,
                    bool copy_map, T* scratch) {
    const bool rows = by_pixel(array);
    if (stored_as_is<T>(array.dtype) && pixels.valid == nullptr && (rows ? columns == padded : !copy_map)) {
        return {address(array, pixels, T{}), rows ? array.pixel : array.column, rows};
    }
    with_storage_of<T>(array.dtype, [&](auto stored) __attribute__((always_inline)) {
        const auto* from = address(array, pixels, stored);
        if (rows) {
            for (std::int64_t p = 0; p < pixels.width; ++p) {
                const bool there = pixels.valid == nullptr || pixels.valid[p] != T(0);
                load_row(from + (there ? p * array.pixel : 0), there ? columns : 0, scratch + p * padded, padded);
            }
        } else {
            for (std::int64_t c = 0; c < columns; ++c) {
                T* row = scratch + c * pixels.width;
                load_row(from + c * array.column, pixels.count, row, pixels.width);
                if (pixels.valid != nullptr) {
                    keep_valid(row, pixels.valid, pixels.width);
                }
            }
        }
    });
    return {scratch, rows ? padded : pixels.width, rows};
}

// Return the memory of these pixels, for prefetching during a product.
template <class T>
Prefetch prefetch_of(const Array& array, const Pixels<T>& pixels, std::int64_t columns) {
    const std::int64_t size = element_size(array.dtype);
    const bool rows = by_pixel(array);
    Prefetch fetch;
    fetch.row =
        static_cast<const char*>(array.data) + (pixels.sample * array.batch + pixels.begin * array.pixel) * size;
    fetch.rows = rows ? pixels.count : columns;
    fetch.stride = (rows ? array.pixel : array.column) * size;
    fetch.bytes = (rows ? columns : pixels.count) * size;
    return fetch;
}

// Destination of a panel's gradient, in a panel's layout. finish_panel copies it to memory unless it was written in
// place. Finish non-temporal stores with stream_fence.
template <class T>
struct PanelOut {
    T* data;
    std::int64_t stride;
    bool by_pixel;
    bool in_memory;
    bool stream; // non-temporal
};

// Return the destination: in place if the dtype, masks and padding allow, otherwise `scratch`.
template <class T>
FASTKD_INLINE PanelOut<T> start_panel(const Array& array, const Pixels<T>& pixels, std::int64_t columns,
                                      std::int64_t padded, bool stream, T* scratch) {
    // Non-temporal stores pay only for whole, aligned cache lines.
    const bool rows = by_pixel(array);
    const std::int64_t size = element_size(array.dtype), row = rows ? array.pixel : array.column;
    const auto first = reinterpret_cast<std::uintptr_t>(array.data) +
                       (pixels.sample * array.batch + pixels.begin * array.pixel) * size;
    stream = stream && (first | static_cast<std::uintptr_t>(row * size)) % (lanes<T> * size) == 0;
    if (stored_as_is<T>(array.dtype) && pixels.valid == nullptr && (!rows || columns == padded)) {
        return {address(array, pixels, T{}), row, rows, true, stream};
    }
    return {scratch, rows ? padded : pixels.width, rows, false, stream};
}

// Copy the panel's gradient to memory, with 0 for invalid pixels, unless it was written in place.
template <class T>
void finish_panel(const PanelOut<T>& panel, const Array& array, const Pixels<T>& pixels, std::int64_t columns) {
    if (panel.in_memory) {
        return;
    }
    with_storage_of<T>(array.dtype, [&](auto stored) __attribute__((always_inline)) {
        auto* to = address(array, pixels, stored);
        const auto put = [&](const T* row, std::int64_t count, decltype(to) where) __attribute__((always_inline)) {
            panel.stream ? stream_row(row, count, where) : store_row(row, count, where);
        };
        for (std::int64_t i = 0; i < (panel.by_pixel ? pixels.count : columns); ++i) {
            T* row = panel.data + i * panel.stride;
            if (!panel.by_pixel) {
                if (pixels.valid != nullptr) {
                    keep_valid(row, pixels.valid, pixels.width);
                }
                put(row, pixels.count, to + i * array.column);
            } else if (pixels.valid == nullptr || pixels.valid[i] != T(0)) {
                put(row, columns, to + i * array.pixel);
            } else {
                __builtin_memset(static_cast<void*>(to + i * array.pixel), 0, columns * sizeof(stored));
            }
        }
    });
}

// Load the logits of words[k] to row k, or -inf if words[k] is negative. Invalid pixels get 0.
template <class T>
void load_logits(const Array& array, const Pixels<T>& pixels, const std::int32_t* words, std::int64_t count, T* out,
                 std::int64_t stride) {
    with_storage_of<T>(array.dtype, [&](auto stored) __attribute__((always_inline)) {
        using S = decltype(stored);
        const S* from = address(array, pixels, stored);
        for (std::int64_t k = 0; k < count; ++k) {
            T* row = out + k * stride;
            if (words[k] < 0) {
                for (std::int64_t p = 0; p < pixels.width; p += lanes<T>) {
                    store(row + p, broadcast(-static_cast<T>(__builtin_inf())));
                }
                continue;
            }
            const S* word = from + words[k] * array.column;
            if (array.pixel == 1) {
                load_row(word, pixels.count, row, pixels.width);
            } else {
                S gathered[lanes<T>] = {};
                for (std::int64_t p = 0; p < pixels.width; p += lanes<T>) {
                    for (std::int64_t i = 0; i < lanes<T>; ++i) {
                        gathered[i] = p + i < pixels.count ? word[(p + i) * array.pixel] : S{};
                    }
                    store(row + p, load(gathered));
                }
            }
            if (pixels.valid != nullptr) {
                keep_valid(row, pixels.valid, pixels.width);
            }
        }
    });
}

// Store rows[slot[w]] to word w of the array, or 0 if slot[w] is negative.
template <class T>
void store_logits(const Array& array, const Pixels<T>& pixels, const std::int32_t* slot, std::int64_t words,
                  const T* rows, std::int64_t stride) {
    with_storage_of<T>(array.dtype, [&](auto stored) __attribute__((always_inline)) {
        using S = decltype(stored);
        S* to = address(array, pixels, stored);
        for (std::int64_t w = 0; w < words; ++w) {
            S* word = to + w * array.column;
            for (std::int64_t p = 0; p < pixels.count; p += lanes<T>) {
                const std::int64_t some = smaller(lanes<T>, pixels.count - p);
                S values[lanes<T>] = {};
                if (slot[w] >= 0) {
                    store(values, load(rows + slot[w] * stride + p));
                }
                if (array.pixel == 1) {
                    __builtin_memcpy(static_cast<void*>(word + p), values, some * sizeof(S));
                } else {
                    for (std::int64_t i = 0; i < some; ++i) {
                        word[(p + i) * array.pixel] = values[i];
                    }
                }
            }
        }
    });
}

} // namespace fastkd::cpu::FASTKD_ISA
