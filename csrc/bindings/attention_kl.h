// The class AttentionKL of fastkd._cpu.
#pragma once

#include <array>
#include <string>
#include <tuple>
#include <utility>

#include <pybind11/stl.h>

#include "bindings/arguments.h"
#include "common/attention_kl.h"

namespace fastkd::bindings {

// The validated settings of a call. The Python class has the methods run and workspace_bytes.
struct AttentionCall {
    attention_kl::Problem problem;
    std::int64_t extra; // a number of threads
    std::int64_t limit;
};

using Strides = std::array<std::int64_t, 4>;
// (address, strides of batch, head, row and column)
using ArrayTuple = std::tuple<std::uintptr_t, Strides>;
// (address or 0, strides of batch, head and row, dtype)
using BiasTuple = std::tuple<std::uintptr_t, std::array<std::int64_t, 3>, std::string>;
// (queries, keys, address of the scales, bias)
using NetworkTuple = std::tuple<ArrayTuple, ArrayTuple, std::uintptr_t, BiasTuple>;

inline attention_kl::Array parse_array(const ArrayTuple& array, const char* name, DType dtype) {
    const auto& [address, strides] = array;
    return {parse_pointer(address, name, element_size(dtype)), strides[0], strides[1], strides[2], strides[3]};
}

inline attention_kl::Network parse_network(const NetworkTuple& network, std::int64_t width, DType dtype) {
    const auto& [q, k, scales, bias] = network;
    attention_kl::Bias parsed{};
    const auto& [address, strides, bias_dtype] = bias;
    if (address != 0) {
        parsed.dtype = parse_dtype(bias_dtype);
        parsed.data = parse_pointer(address, "bias", element_size(parsed.dtype));
        parsed.batch = strides[0];
        parsed.head = strides[1];
        parsed.row = strides[2];
        if (parsed.dtype == DType::Float64 && dtype != DType::Float64) {
            throw py::value_error("bias: float64 needs float64 queries and keys");
        }
    }
    return {parse_array(q, "q", dtype), parse_array(k, "k", dtype), width,
            static_cast<const double*>(parse_pointer(scales, "scales", 8)), parsed};
}

// `Kernels` provides workspace(call, problem), which returns (bytes, minimum), and run(call, args), which runs without
// the GIL.
template <class Kernels>
void define_attention_kl(py::module_& module, const char* extra) {
    py::class_<AttentionCall>(module, "AttentionKL", py::module_local(),
                              "attention_kl of (batch, heads, queries, width) and (batch, heads, keys, width), in a "
                              "workspace of at most `limit` bytes, with the gradients of the student's queries (for_q) "
                              "and keys (for_k).")
        .def(py::init([](const std::array<std::int64_t, 6>& sizes, bool causal, const std::string& dtype,
                         double temperature, bool for_q, bool for_k, std::int64_t extra, std::int64_t limit) {
                 for (const std::int64_t size : sizes) {
                     if (size < 1) {
                         throw py::value_error("sizes: expected at least 1 each, got " + std::to_string(size));
                     }
                 }
                 const auto [batch, heads, queries, keys, student_width, teacher_width] = sizes;
                 if (causal && keys < queries) {
                     throw py::value_error("causal: expected at least as many keys as queries, got " +
                                           std::to_string(keys) + " and " + std::to_string(queries));
                 }
                 Kernels::parse_extra(extra);
                 return AttentionCall{{batch, heads, queries, keys, student_width, teacher_width, causal,
                                       parse_dtype(dtype), parse_temperature(temperature), for_q, for_k},
                                      extra,
                                      limit};
             }),
             py::arg("sizes"), py::arg("causal"), py::arg("dtype"), py::arg("temperature"), py::arg("for_q"),
             py::arg("for_k"), py::arg(extra), py::arg("limit"))
        .def(
            "workspace_bytes",
            [](const AttentionCall& call, bool backward) {
                attention_kl::Problem problem = call.problem;
                problem.for_q = problem.for_q || backward;
                problem.for_k = problem.for_k || backward;
                return Kernels::workspace(call, problem);
            },
            py::arg("backward"),
            "Return (bytes of the workspace, smallest possible `limit`) of this call, or of one with both gradients. "
            "The second exceeds `limit` if that is too small.")
        .def(
            "run",
            [](const AttentionCall& call, const NetworkTuple& student, const NetworkTuple& teacher,
               std::uintptr_t key_mask, std::uintptr_t query_mask, std::uintptr_t grad_loss,
               std::array<std::int64_t, 3> grad_strides, std::uintptr_t loss, std::uintptr_t grad_q,
               std::uintptr_t grad_k, bool wide, std::uintptr_t workspace) {
                const DType dtype = call.problem.dtype;
                const std::int64_t size = dtype == DType::Float64 ? 8 : 4;
                const std::int64_t grad_size = wide ? size : element_size(dtype);
                attention_kl::Call args{};
                args.problem = call.problem;
                args.student = parse_network(student, call.problem.student_width, dtype);
                args.teacher = parse_network(teacher, call.problem.teacher_width, dtype);
                args.key_mask = reinterpret_cast<const unsigned char*>(key_mask);
                args.query_mask = reinterpret_cast<const unsigned char*>(query_mask);
                args.grad_loss = grad_loss == 0 ? nullptr : parse_pointer(grad_loss, "grad_loss", size);
                args.grad_batch_stride = grad_strides[0];
                args.grad_head_stride = grad_strides[1];
                args.grad_row_stride = grad_strides[2];
                args.loss = loss == 0 ? nullptr : parse_pointer(loss, "loss", size);
                args.grad_q = call.problem.for_q ? parse_pointer(grad_q, "grad_q", grad_size) : nullptr;
                args.grad_k = call.problem.for_k ? parse_pointer(grad_k, "grad_k", grad_size) : nullptr;
                args.wide = wide;
                args.workspace = parse_pointer(workspace, "workspace", 8);
                const py::gil_scoped_release unlocked;
                Kernels::run(call, args);
            },
            py::arg("student"), py::arg("teacher"), py::arg("key_mask"), py::arg("query_mask"), py::arg("grad_loss"),
            py::arg("grad_strides"), py::arg("loss"), py::arg("grad_q"), py::arg("grad_k"), py::arg("wide"),
            py::arg("workspace"),
            "Write loss unless it is 0, and the gradients requested, for grad_loss or, if it is 0, for ones.");
}

} // namespace fastkd::bindings
