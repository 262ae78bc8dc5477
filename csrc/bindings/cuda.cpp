// The module fastkd._cuda. The CUDA runtime is linked statically; importing the module does not touch the driver.
#include <cuda_runtime_api.h>
#include <pybind11/stl.h>

#include <sstream>
#include <stdexcept>
#include <vector>

#include "bindings/pixel_word.h"
#include "bindings/relation.h"
#include "bindings/softmax_kl.h"
#include "cuda/kernels.h"
#if defined(FASTKD_EMULATED)
#include "tests/emulation/engine.h"
#include "tests/emulation/recording.h"
#endif

namespace fastkd::bindings {
namespace {

void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
    }
}

cudaStream_t parse_stream(std::int64_t handle) {
    return reinterpret_cast<cudaStream_t>(static_cast<std::intptr_t>(handle));
}

struct CudaRelation {
    static constexpr const char* extra = "stream";

    static void check(const RelationCall& call) {
        if (call.options.dtype == DType::Float64) {
            throw py::value_error("dtype: expected float32, float16 or bfloat16, got 'float64'");
        }
        if (call.form == RelationCall::Form::gram) {
            throw py::value_error("form: expected streamed or stored, got 'gram'");
        }
    }
    static cuda::RelationPlan plan(const RelationCall& call, bool backward) {
        return cuda::plan_relation(call.options, call.student_width, backward, call.limit);
    }
    static std::pair<std::int64_t, std::int64_t> workspace(const RelationCall& call, bool backward) {
        const cuda::RelationPlan planned = plan(call, backward);
        return {planned.bytes, planned.minimum};
    }
    static void forward(const RelationCall& call, const relation::Forward& args) {
        bindings::check(cuda::relation_forward(args, plan(call, false), parse_stream(call.extra)), "relation_forward");
    }
    static void backward(const RelationCall& call, const relation::Backward& args) {
        bindings::check(cuda::relation_backward(args, plan(call, true), parse_stream(call.extra)), "relation_backward");
    }
};

std::vector<std::string> targets() {
    std::vector<std::string> names;
    std::istringstream words(FASTKD_CUDA_TARGETS);
    for (std::string word; words >> word;) {
        names.push_back(word);
    }
    return names;
}

int device_count() {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) {
        cudaGetLastError(); // no driver or no device: clear the error for the next call
        return 0;
    }
    return count;
}

struct PixelWordKernels {
    using Extra = cudaStream_t;
    static constexpr const char* extra_name = "stream";
    static constexpr bool words_as_pixels = true;
    static cudaStream_t parse_extra(std::int64_t handle) { return parse_stream(handle); }
    static void check(const pixel_word::Problem& problem) {
        if (!cuda::pixel_word_fits(problem)) {
            throw py::value_error("problem: too many words, pixels, features or samples for the kernels' indices");
        }
    }
    static pixel_word::Workspace workspace(const pixel_word::Problem& problem, bool backward, cudaStream_t) {
        return {cuda::pixel_word_workspace(problem, backward), 0};
    }
    static void forward(const pixel_word::Forward& args, cudaStream_t stream) {
        bindings::check(cuda::pixel_word_forward(args, stream), "pixel_word_forward");
    }
    static void backward(const pixel_word::Backward& args, cudaStream_t stream) {
        bindings::check(cuda::pixel_word_backward(args, stream), "pixel_word_backward");
    }
};

} // namespace

PYBIND11_MODULE(_cuda, module, py::mod_gil_not_used()) {
    module.doc() = "fastkd's CUDA C++ kernels.";
    module.def("targets", &targets,
               "Return the architectures the kernels were compiled for, e.g. ['sm_80', 'sm_90', 'compute_90'].");
    module.def("device_count", &device_count, "Return the number of CUDA devices; 0 without a driver.");
    module.def(
        "driver_version",
        [] {
            int version = 0;
            return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
        },
        "Return the newest CUDA version that the driver supports, e.g. 13000 for 13.0; 0 without a driver.");
    module.def(
        "runtime_version", [] { return CUDART_VERSION; },
        "Return the version of the CUDA runtime in this module, e.g. 13000 for 13.0.");
#if defined(FASTKD_EMULATED)
    module.attr("EMULATED") = true; // the kernels run on the host and take CPU tensors
    module.def(
        "set_order",
        [](const std::string& name) {
            const std::string names[] = {"forward", "reverse", "random"};
            for (int i = 0; i < 3; ++i) {
                if (name == names[i]) {
                    emulation::set_order(static_cast<emulation::Order>(i));
                    return;
                }
            }
            throw py::value_error("order: expected forward, reverse or random, got '" + name + "'");
        },
        py::arg("order"), "Set the order in which threads and blocks run.");
    module.def(
        "record_launches",
        [](bool on) {
            std::vector<std::tuple<std::string, std::int64_t, int, int>> rows;
            for (const emulation::Launch& launch : emulation::set_recording(on)) {
                rows.emplace_back(launch.kernel, launch.blocks, launch.threads, launch.shared_bytes);
            }
            return rows;
        },
        py::arg("on"),
        "Record launches instead of running them, or run them again. Return those recorded so far as (type of the "
        "kernel, thread blocks, threads per block, bytes of smem).");
#endif
    define_relation<CudaRelation>(module).def(
        "stored_elements", [](const RelationCall& call) { return cuda::stored_elements(call.options); },
        "Return the number of float32 elements of `stored` in the form 'stored'.");
    define_softmax_kl(
        module, "stream",
        [](const softmax_kl::Forward& args, std::int64_t stream) {
            check(cuda::softmax_kl_forward(args, parse_stream(stream)), "softmax_kl_forward");
        },
        [](const softmax_kl::Backward& args, std::int64_t stream) {
            check(cuda::softmax_kl_backward(args, parse_stream(stream)), "softmax_kl_backward");
        });
    define_pixel_word<PixelWordKernels>(module);
}

} // namespace fastkd::bindings
