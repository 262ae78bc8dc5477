// softmax_kl_forward and softmax_kl_backward of fastkd._cpu and fastkd._cuda, with the same arguments in both.
#pragma once

#include <utility>

#include "bindings/arguments.h"
#include "common/softmax_kl.h"

namespace fastkd::bindings {

inline softmax_kl::Shape parse_shape(std::int64_t batch, std::int64_t rows, std::int64_t cols) {
    if (batch < 1 || rows < 1 || cols < 1) {
        throw py::value_error("batch, rows, cols: expected at least 1 each, got " + std::to_string(batch) + ", " +
                              std::to_string(rows) + ", " + std::to_string(cols));
    }
    return {batch, rows, cols};
}

// `forward` and `backward` take the parsed arguments and `extra`, a number of threads or a stream's handle. They run
// without the GIL.
template <class ForwardKernel, class BackwardKernel>
void define_softmax_kl(py::module_& module, const char* extra, ForwardKernel forward, BackwardKernel backward) {
    using Strides = std::pair<std::int64_t, std::int64_t>;
    module.def(
        "softmax_kl_forward",
        [forward](std::uintptr_t student, std::uintptr_t teacher, std::uintptr_t loss, std::uintptr_t lse_student,
                  std::uintptr_t lse_teacher, std::int64_t batch, std::int64_t rows, std::int64_t cols,
                  Strides student_strides, Strides teacher_strides, const std::string& dtype_name, double temperature,
                  std::int64_t extra_value) {
            const DType dtype = parse_dtype(dtype_name);
            const std::int64_t size = element_size(dtype);
            softmax_kl::Forward args{};
            args.student = parse_pointer(student, "student", size);
            args.teacher = parse_pointer(teacher, "teacher", size);
            args.loss = parse_pointer(loss, "loss", size == 8 ? 8 : 4);
            args.lse_student = static_cast<double*>(parse_pointer(lse_student, "lse_student", 8));
            args.lse_teacher = static_cast<double*>(parse_pointer(lse_teacher, "lse_teacher", 8));
            args.shape = parse_shape(batch, rows, cols);
            args.student_strides = {student_strides.first, student_strides.second};
            args.teacher_strides = {teacher_strides.first, teacher_strides.second};
            args.dtype = dtype;
            args.temperature = parse_temperature(temperature);
            args.inv_temperature = 1 / args.temperature;
            const py::gil_scoped_release unlocked;
            forward(args, extra_value);
        },
        py::arg("student"), py::arg("teacher"), py::arg("loss"), py::arg("lse_student"), py::arg("lse_teacher"),
        py::arg("batch"), py::arg("rows"), py::arg("cols"), py::arg("student_strides"), py::arg("teacher_strides"),
        py::arg("dtype"), py::arg("temperature"), py::arg(extra),
        "Write loss[b, r] = KL(softmax(teacher/temperature) || softmax(student/temperature)) over the columns of row "
        "(b, r), and both log-sum-exps in float64. Addresses, sizes, (batch, row) strides in elements.");
    module.def(
        "softmax_kl_backward",
        [backward](std::uintptr_t grad_loss, Strides grad_loss_strides, std::uintptr_t student, std::uintptr_t teacher,
                   std::uintptr_t lse_student, std::uintptr_t lse_teacher, std::uintptr_t grad_student,
                   std::int64_t batch, std::int64_t rows, std::int64_t cols, Strides student_strides,
                   Strides teacher_strides, const std::string& dtype_name, double temperature,
                   std::int64_t extra_value) {
            const DType dtype = parse_dtype(dtype_name);
            const std::int64_t size = element_size(dtype);
            softmax_kl::Backward args{};
            args.grad_loss = parse_pointer(grad_loss, "grad_loss", size == 8 ? 8 : 4);
            args.grad_loss_strides = {grad_loss_strides.first, grad_loss_strides.second};
            args.student = parse_pointer(student, "student", size);
            args.teacher = parse_pointer(teacher, "teacher", size);
            args.lse_student = static_cast<const double*>(parse_pointer(lse_student, "lse_student", 8));
            args.lse_teacher = static_cast<const double*>(parse_pointer(lse_teacher, "lse_teacher", 8));
            args.grad_student = parse_pointer(grad_student, "grad_student", size);
            args.shape = parse_shape(batch, rows, cols);
            args.student_strides = {student_strides.first, student_strides.second};
            args.teacher_strides = {teacher_strides.first, teacher_strides.second};
            args.dtype = dtype;
            args.temperature = parse_temperature(temperature);
            args.inv_temperature = 1 / args.temperature;
            const py::gil_scoped_release unlocked;
            backward(args, extra_value);
        },
        py::arg("grad_loss"), py::arg("grad_loss_strides"), py::arg("student"), py::arg("teacher"),
        py::arg("lse_student"), py::arg("lse_teacher"), py::arg("grad_student"), py::arg("batch"), py::arg("rows"),
        py::arg("cols"), py::arg("student_strides"), py::arg("teacher_strides"), py::arg("dtype"),
        py::arg("temperature"), py::arg(extra),
        "Write grad_student = grad_loss * (softmax(student/temperature) - softmax(teacher/temperature)) / temperature, "
        "contiguous, in the student's dtype. Addresses, sizes, (batch, row) strides in elements.");
}

} // namespace fastkd::bindings
