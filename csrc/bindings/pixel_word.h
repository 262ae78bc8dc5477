// The class PixelWord of fastkd._cpu and fastkd._cuda, with the same methods in both. Address 0 means no array.
#pragma once

#include <array>
#include <tuple>

#include <pybind11/stl.h>

#include "bindings/arguments.h"
#include "common/pixel_word.h"

namespace fastkd::bindings {

using PixelArray = std::tuple<std::uintptr_t, std::string, std::array<std::int64_t, 3>>;
using PixelWordSide = std::tuple<PixelArray, std::uintptr_t, std::uintptr_t, std::int64_t, std::int64_t, double, bool>;
using PixelWordProblem =
    std::tuple<PixelWordSide, PixelWordSide, std::uintptr_t, std::int64_t, std::int64_t, std::string, bool, int>;
using PixelWordKept = std::array<std::uintptr_t, 4>;

inline void* parse_optional(std::uintptr_t address, const char* name, std::int64_t alignment) {
    return address == 0 ? nullptr : parse_pointer(address, name, alignment);
}

// Parse features or logits. `dtype`: of the arithmetic.
inline pixel_word::Array parse_array(const PixelArray& given, const char* name, DType dtype) {
    const auto& [address, dtype_name, strides] = given;
    pixel_word::Array array{};
    array.dtype = parse_dtype(dtype_name);
    array.data = parse_optional(address, name, element_size(array.dtype));
    array.batch = strides[0];
    array.pixel = strides[1];
    array.column = strides[2];
    if ((array.dtype == DType::Float64) != (dtype == DType::Float64)) {
        throw py::value_error(std::string(name) + ": expected float64 if and only if the arithmetic is float64, got '" +
                              dtype_name + "'");
    }
    if (array.data != nullptr && array.pixel != 1 && array.column != 1) {
        throw py::value_error(std::string(name) + ": expected a stride of 1 along pixels or columns, got " +
                              std::to_string(array.pixel) + " and " + std::to_string(array.column));
    }
    return array;
}

inline pixel_word::Side parse_side(const PixelWordSide& given, const char* name, DType dtype, bool words_as_pixels) {
    const auto& [pixels, words, word_mask, word_count, width, scale, bf16_words] = given;
    pixel_word::Side side{};
    side.pixels = parse_array(pixels, name, dtype);
    side.words = parse_optional(words, name, element_size(words_as_pixels ? side.pixels.dtype : dtype));
    side.word_mask = static_cast<const std::uint8_t*>(parse_optional(word_mask, name, 1));
    side.word_count = word_count;
    side.width = width;
    side.scale = parse_temperature(scale);
    side.bf16_words = bf16_words;
    if (word_count < 1 || width < 0) {
        throw py::value_error(std::string(name) + ": expected at least 1 word and a width of at least 0, got " +
                              std::to_string(word_count) + " and " + std::to_string(width));
    }
    return side;
}

// With `words_as_pixels`, words have the pixels' dtype instead of the arithmetic's.
inline pixel_word::Problem parse_problem(const PixelWordProblem& given, bool words_as_pixels) {
    const auto& [student, teacher, pixel_mask, batch, pixels, dtype_name, cosine, terms] = given;
    pixel_word::Problem problem{};
    problem.dtype = parse_dtype(dtype_name);
    if (problem.dtype != DType::Float32 && problem.dtype != DType::Float64) {
        throw py::value_error("dtype: expected float32 or float64 for the arithmetic, got '" + dtype_name + "'");
    }
    problem.student = parse_side(student, "student", problem.dtype, words_as_pixels);
    problem.teacher = parse_side(teacher, "teacher", problem.dtype, words_as_pixels);
    problem.pixel_mask = static_cast<const std::uint8_t*>(parse_optional(pixel_mask, "pixel_mask", 1));
    problem.batch = batch;
    problem.pixels = pixels;
    problem.cosine = cosine;
    problem.terms = terms;
    if (batch < 1 || pixels < 1) {
        throw py::value_error("batch, pixels: expected at least 1 each, got " + std::to_string(batch) + ", " +
                              std::to_string(pixels));
    }
    if (terms < 1 || terms > 15) {
        throw py::value_error("terms: expected some of the bits 1, 2, 4, 8, got " + std::to_string(terms));
    }
    if (terms != pixel_word::pixel_pixel && problem.student.word_count != problem.teacher.word_count) {
        throw py::value_error("terms: expected pixel_pixel alone, as the networks have different numbers of words");
    }
    return problem;
}

// With `required`, throw if an array that the backward of these terms reads is missing.
inline pixel_word::Kept parse_kept(const PixelWordKept& given, const pixel_word::Problem& problem, bool required) {
    const std::int64_t size = element_size(problem.dtype);
    pixel_word::Kept kept{};
    kept.logits = parse_optional(given[0], "logits", size);
    kept.norms = parse_optional(given[1], "norms", size);
    kept.columns = parse_optional(given[2], "columns", size);
    kept.grams = parse_optional(given[3], "grams", size);
    const bool features = problem.student.width > 0;
    if (required && ((features && kept.logits == nullptr) || (features && problem.cosine && kept.norms == nullptr) ||
                     ((problem.terms & pixel_word::word_to_pixel) != 0 && kept.columns == nullptr) ||
                     ((problem.terms & pixel_word::second_order) != 0 && kept.grams == nullptr))) {
        throw py::value_error("kept: expected all arrays that the forward of this problem saves");
    }
    return kept;
}

// A problem and the kernels' extra argument: a number of threads, or a stream. `Kernels` parses this argument, checks
// the problem and calls the kernels.
template <class Kernels>
struct PixelWordCall {
    pixel_word::Problem problem;
    typename Kernels::Extra extra;
};

template <class Kernels>
void define_pixel_word(py::module_& module) {
    using Call = PixelWordCall<Kernels>;
    const std::string extra = Kernels::extra_name;
    py::class_<Call>(module, "PixelWord", py::module_local(), // _cpu and _cuda each have their own
                     ("pixel_word of a student's and a teacher's pixels and words, with " + extra +
                      ", in a workspace of at most `limit` bytes. Addresses, sizes, strides in elements.")
                         .c_str())
        .def(py::init([](const PixelWordProblem& problem, std::int64_t extra, std::int64_t limit) {
                 Call call{parse_problem(problem, Kernels::words_as_pixels), Kernels::parse_extra(extra)};
                 call.problem.workspace_limit = limit;
                 Kernels::check(call.problem);
                 return call;
             }),
             py::arg("problem"), py::arg(Kernels::extra_name), py::arg("limit"))
        .def(
            "workspace_bytes",
            [](const Call& call, bool backward) {
                const pixel_word::Workspace workspace = Kernels::workspace(call.problem, backward, call.extra);
                return std::make_pair(workspace.bytes, workspace.minimum);
            },
            py::arg("backward"),
            "Return (bytes of the workspace, smallest possible `limit`). The second exceeds `limit` if that is too "
            "small.")
        .def(
            "forward",
            [](const Call& call, const PixelWordKept& kept, std::uintptr_t loss, std::uintptr_t workspace) {
                pixel_word::Forward args{};
                args.problem = call.problem;
                args.kept = parse_kept(kept, args.problem, false);
                args.loss = parse_pointer(loss, "loss", element_size(args.problem.dtype));
                args.workspace = parse_pointer(workspace, "workspace", 64);
                const py::gil_scoped_release unlocked;
                Kernels::forward(args, call.extra);
            },
            py::arg("kept"), py::arg("loss"), py::arg("workspace"),
            "Write loss[b] = (pixel_to_word, word_to_pixel, pixel_pixel, word_word) of sample b, and the arrays kept "
            "for the backward.")
        .def(
            "backward",
            [](const Call& call, const PixelWordKept& kept, std::uintptr_t grad_loss,
               const std::array<std::int64_t, 2>& grad_loss_strides, const PixelArray& grad_pixels,
               std::uintptr_t grad_words, std::uintptr_t workspace) {
                pixel_word::Backward args{};
                args.problem = call.problem;
                const pixel_word::Array& pixels = args.problem.student.pixels;
                const std::int64_t size = element_size(args.problem.dtype);
                args.kept = parse_kept(kept, args.problem, true);
                args.grad_loss = parse_pointer(grad_loss, "grad_loss", size);
                args.grad_loss_strides[0] = grad_loss_strides[0];
                args.grad_loss_strides[1] = grad_loss_strides[1];
                args.grad_pixels = parse_array(grad_pixels, "grad_pixels", args.problem.dtype);
                args.grad_words = parse_optional(grad_words, "grad_words",
                                                 Kernels::words_as_pixels ? element_size(pixels.dtype) : size);
                if (args.grad_pixels.data != nullptr && args.problem.student.width > 0 &&
                    (args.grad_pixels.column == 1) != (pixels.column == 1)) {
                    throw py::value_error("grad_pixels: expected the student's layout");
                }
                if (args.grad_pixels.data != nullptr && args.grad_pixels.dtype != pixels.dtype) {
                    throw py::value_error("grad_pixels: expected the student's dtype");
                }
                args.workspace = parse_pointer(workspace, "workspace", 64);
                const py::gil_scoped_release unlocked;
                Kernels::backward(args, call.extra);
            },
            py::arg("kept"), py::arg("grad_loss"), py::arg("grad_loss_strides"), py::arg("grad_pixels"),
            py::arg("grad_words"), py::arg("workspace"),
            "Write the gradients of the student's pixels (or logits) and words.");
}

} // namespace fastkd::bindings
