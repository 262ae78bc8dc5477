// The class Relation of fastkd._cpu and fastkd._cuda, with the same arguments in both.
#pragma once

#include <string>
#include <tuple>
#include <utility>

#include "bindings/arguments.h"
#include "common/relation.h"

namespace fastkd::bindings {

inline relation::Similarity parse_similarity(const std::string& name) {
    if (name == "cosine") {
        return relation::Similarity::cosine;
    }
    if (name == "mean") {
        return relation::Similarity::mean;
    }
    if (name == "dot") {
        return relation::Similarity::dot;
    }
    throw py::value_error("similarity: expected cosine, mean or dot, got '" + name + "'");
}

inline relation::Distance parse_distance(const std::string& name) {
    if (name == "kl") {
        return relation::Distance::kl;
    }
    if (name == "mse") {
        return relation::Distance::mse;
    }
    if (name == "row_cosine") {
        return relation::Distance::row_cosine;
    }
    throw py::value_error("distance: expected kl, mse or row_cosine, got '" + name + "'");
}

// (address, width, strides of batch, row and column, padded)
using RowsTuple = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, bool>;

inline relation::Rows parse_rows(const RowsTuple& rows, const char* name, DType dtype) {
    const auto& [address, width, batch_stride, row_stride, col_stride, padded] = rows;
    if (width < 1) {
        throw py::value_error(std::string(name) + ": expected a width of at least 1, got " + std::to_string(width));
    }
    return {parse_pointer(address, name, element_size(dtype)), width, batch_stride, row_stride, col_stride, padded};
}

// The validated settings of a call. The Python class has the methods forward, backward and workspace_bytes.
struct RelationCall {
    enum class Form { streamed, stored, gram };
    relation::Options options;
    std::int64_t student_width, teacher_width;
    Form form;
    std::int64_t extra; // a number of threads or a stream's handle
    std::int64_t limit;
};

inline RelationCall::Form parse_form(const std::string& name, bool cross, relation::Distance distance) {
    if (name == "streamed") {
        return RelationCall::Form::streamed;
    }
    if (name == "stored") {
        if (cross) {
            throw py::value_error("form: expected streamed or gram for relations across samples, got 'stored'");
        }
        return RelationCall::Form::stored;
    }
    if (name == "gram") {
        if (distance != relation::Distance::mse) {
            throw py::value_error("form: expected streamed or stored unless distance is mse, got 'gram'");
        }
        return RelationCall::Form::gram;
    }
    throw py::value_error("form: expected streamed, stored or gram, got '" + name + "'");
}

// `Kernels` provides the name `extra` of the extra argument; check(call), which throws if the call is unsupported;
// workspace(call, backward), which returns (bytes, minimum); and forward(call, args) and backward(call, args), which
// run without the GIL.
template <class Kernels>
py::class_<RelationCall> define_relation(py::module_& module) {
    return py::class_<RelationCall>(module, "Relation", py::module_local(), // _cpu and _cuda each have their own
                                    "relation of (batch, rows, width) student and teacher, in a workspace of at most "
                                    "`limit` bytes. form: 'streamed' recomputes the rows x rows matrices tile by tile, "
                                    "'stored' keeps them for the backward, 'gram' (CPU) computes mse from matrices of "
                                    "width x width.")
        .def(py::init([](std::int64_t batch, std::int64_t rows, std::int64_t student_width, std::int64_t teacher_width,
                         const std::string& similarity, const std::string& distance, double temperature, bool negate,
                         bool cross, const std::string& dtype, const std::string& form, std::int64_t extra,
                         std::int64_t limit) {
                 if (batch < 1 || rows < 1 || student_width < 1 || teacher_width < 1) {
                     throw py::value_error("batch, rows, widths: expected at least 1 each, got " +
                                           std::to_string(batch) + ", " + std::to_string(rows) + ", " +
                                           std::to_string(student_width) + " and " + std::to_string(teacher_width));
                 }
                 const relation::Distance parsed = parse_distance(distance);
                 const RelationCall call{{batch, rows, cross, parse_similarity(similarity), parsed,
                                          parse_temperature(temperature), negate, parse_dtype(dtype)},
                                         student_width,
                                         teacher_width,
                                         parse_form(form, cross, parsed),
                                         extra,
                                         limit};
                 Kernels::check(call);
                 return call;
             }),
             py::arg("batch"), py::arg("rows"), py::arg("student_width"), py::arg("teacher_width"),
             py::arg("similarity"), py::arg("distance"), py::arg("temperature"), py::arg("negate"), py::arg("cross"),
             py::arg("dtype"), py::arg("form"), py::arg(Kernels::extra), py::arg("limit"))
        .def(
            "workspace_bytes",
            [](const RelationCall& call, bool backward) { return Kernels::workspace(call, backward); },
            py::arg("backward"),
            "Return (bytes of the workspace, smallest possible `limit`). The second exceeds `limit` if that is too "
            "small.")
        .def(
            "forward",
            [](const RelationCall& call, const RowsTuple& student, const RowsTuple& teacher, std::uintptr_t loss,
               std::uintptr_t statistics, std::uintptr_t stored, std::uintptr_t workspace) {
                const DType dtype = call.options.dtype;
                const std::int64_t size = dtype == DType::Float64 ? 8 : 4;
                relation::Forward args{};
                args.student = parse_rows(student, "student", dtype);
                args.teacher = parse_rows(teacher, "teacher", dtype);
                args.options = call.options;
                args.loss = parse_pointer(loss, "loss", size);
                args.statistics = static_cast<double*>(parse_pointer(statistics, "statistics", 8));
                args.stored =
                    call.form == RelationCall::Form::streamed ? nullptr : parse_pointer(stored, "stored", size);
                args.workspace = parse_pointer(workspace, "workspace", 8);
                const py::gil_scoped_release unlocked;
                Kernels::forward(call, args);
            },
            py::arg("student"), py::arg("teacher"), py::arg("loss"), py::arg("statistics"), py::arg("stored"),
            py::arg("workspace"), "Write loss, statistics and stored. `stored` may be 0 in the form 'streamed'.")
        .def(
            "backward",
            [](const RelationCall& call, std::uintptr_t grad_loss, std::pair<std::int64_t, std::int64_t> grad_strides,
               const RowsTuple& student, const RowsTuple& teacher, std::uintptr_t statistics, std::uintptr_t stored,
               std::uintptr_t grad_student, std::tuple<std::int64_t, std::int64_t, std::int64_t> out_strides,
               std::uintptr_t workspace) {
                const DType dtype = call.options.dtype;
                const std::int64_t size = dtype == DType::Float64 ? 8 : 4;
                relation::Backward args{};
                args.grad_loss = parse_pointer(grad_loss, "grad_loss", size);
                std::tie(args.grad_batch_stride, args.grad_row_stride) = grad_strides;
                args.student = parse_rows(student, "student", dtype);
                args.teacher = parse_rows(teacher, "teacher", dtype);
                args.options = call.options;
                args.statistics = static_cast<const double*>(parse_pointer(statistics, "statistics", 8));
                args.stored =
                    call.form == RelationCall::Form::streamed ? nullptr : parse_pointer(stored, "stored", size);
                args.grad_student = parse_pointer(grad_student, "grad_student", element_size(dtype));
                std::tie(args.out_batch_stride, args.out_row_stride, args.out_col_stride) = out_strides;
                args.workspace = parse_pointer(workspace, "workspace", 8);
                const py::gil_scoped_release unlocked;
                Kernels::backward(call, args);
            },
            py::arg("grad_loss"), py::arg("grad_strides"), py::arg("student"), py::arg("teacher"),
            py::arg("statistics"), py::arg("stored"), py::arg("grad_student"), py::arg("out_strides"),
            py::arg("workspace"), "Write grad_student.");
}

} // namespace fastkd::bindings
