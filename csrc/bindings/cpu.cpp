// The module fastkd._cpu. It depends on neither torch nor NumPy: tensors are passed as addresses.
#include "bindings/attention_kl.h"
#include "bindings/pixel_word.h"
#include "bindings/relation_cpu.h"
#include "bindings/softmax_kl.h"
#include "cpu/kernels.h"

namespace fastkd::bindings {
namespace {

int parse_threads(std::int64_t threads) {
    if (threads < 1 || threads > 4096) {
        throw py::value_error("threads: expected 1 to 4096, got " + std::to_string(threads));
    }
    return static_cast<int>(threads);
}

struct PixelWordKernels {
    using Extra = int;
    static constexpr const char* extra_name = "threads";
    static constexpr bool words_as_pixels = false;
    static int parse_extra(std::int64_t threads) { return parse_threads(threads); }
    static void check(const pixel_word::Problem&) {}
    static pixel_word::Workspace workspace(const pixel_word::Problem& problem, bool backward, int threads) {
        return cpu::kernels().pixel_word_workspace(problem, backward, threads);
    }
    static void forward(const pixel_word::Forward& args, int threads) {
        cpu::kernels().pixel_word_forward(args, threads);
    }
    static void backward(const pixel_word::Backward& args, int threads) {
        cpu::kernels().pixel_word_backward(args, threads);
    }
};

struct AttentionKernels {
    static int parse_extra(std::int64_t threads) { return parse_threads(threads); }
    static cpu::AttentionPlan plan(const AttentionCall& call, const attention_kl::Problem& problem) {
        return cpu::plan_attention(problem, parse_threads(call.extra), call.limit);
    }
    static std::pair<std::int64_t, std::int64_t> workspace(const AttentionCall& call,
                                                           const attention_kl::Problem& problem) {
        const cpu::AttentionPlan planned = plan(call, problem);
        return {planned.bytes, planned.minimum};
    }
    static void run(const AttentionCall& call, const attention_kl::Call& args) {
        cpu::kernels().attention_kl_run(args, plan(call, call.problem));
    }
};

} // namespace

PYBIND11_MODULE(_cpu, module, py::mod_gil_not_used()) {
    module.doc() = "fastkd's C++ kernels.";
    module.def(
        "isa", [] { return cpu::isa_name(cpu::isa()); },
        "Return the instruction set in use: the machine's best, or the value of FASTKD_CPU_ISA.");
    module.def(
        "exp",
        [](std::uintptr_t input, std::uintptr_t output, std::int64_t count, const std::string& dtype_name) {
            const DType dtype = parse_dtype(dtype_name);
            if (dtype != DType::Float32 && dtype != DType::Float64) {
                throw py::value_error("dtype: expected float32 or float64, got '" + dtype_name + "'");
            }
            const std::int64_t size = element_size(dtype);
            cpu::kernels().exp(parse_pointer(input, "input", size), parse_pointer(output, "output", size), count,
                               dtype);
        },
        py::arg("input"), py::arg("output"), py::arg("count"), py::arg("dtype"),
        "Write exp of contiguous elements, each at most 0, as computed in the kernels. For tests.");
    module.def(
        "peak",
        [](const std::string& operation, std::int64_t repeats) {
            constexpr std::pair<const char*, cpu::Peak> operations[] = {{"float32", cpu::Peak::float_product},
                                                                        {"float64", cpu::Peak::double_product},
                                                                        {"bfloat16", cpu::Peak::bf16_product},
                                                                        {"exp", cpu::Peak::exp}};
            for (const auto& [name, peak] : operations) {
                if (operation == name) {
                    const py::gil_scoped_release unlocked;
                    return cpu::kernels().peak(peak, repeats);
                }
            }
            throw py::value_error("operation: expected float32, float64, bfloat16 or exp, got '" + operation + "'");
        },
        py::arg("operation"), py::arg("repeats"),
        "Run products of a dtype, or fp32 exponentials, at the peak rate of one core; return the FLOP or "
        "exponentials.");
    define_softmax_kl(
        module, "threads",
        [](const softmax_kl::Forward& args, std::int64_t threads) {
            cpu::kernels().softmax_kl_forward(args, parse_threads(threads));
        },
        [](const softmax_kl::Backward& args, std::int64_t threads) {
            cpu::kernels().softmax_kl_backward(args, parse_threads(threads));
        });
    define_relation<CpuRelation>(module);
    define_pixel_word<PixelWordKernels>(module);
    define_attention_kl<AttentionKernels>(module, "threads");
}

} // namespace fastkd::bindings
