// fastkd._cuda: the CUDA kernels. CUDA's runtime is linked statically, and importing this touches no driver.
#include <cuda_runtime_api.h>
#include <pybind11/stl.h>

#include <sstream>
#include <stdexcept>
#include <vector>

#include "bindings/softmax_kl.h"
#include "cuda/kernels.h"
#if defined(FASTKD_EMULATED)
#include "tests/emulation/engine.h"
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
        cudaGetLastError(); // no driver, or no device: not an error here, and not one to leave to the next call
        return 0;
    }
    return count;
}

} // namespace

PYBIND11_MODULE(_cuda, module, py::mod_gil_not_used()) {
    module.doc() = "fastkd's CUDA C++ kernels.";
    module.def("targets", &targets, "What the kernels were compiled for, e.g. ['sm_80', 'sm_90', 'compute_90'].");
    module.def("device_count", &device_count, "The number of CUDA devices; 0 without a driver.");
    module.def(
        "runtime_version", [] { return CUDART_VERSION; },
        "The version of CUDA's runtime in this module, e.g. 13000 for 13.0.");
#if defined(FASTKD_EMULATED)
    module.attr("EMULATED") = true; // the kernels run on the host and take its tensors
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
        py::arg("order"), "In which order threads and blocks take turns.");
#endif
    define_softmax_kl(
        module, "stream",
        [](const softmax_kl::Forward& args, std::int64_t stream) {
            check(cuda::softmax_kl_forward(args, parse_stream(stream)), "softmax_kl_forward");
        },
        [](const softmax_kl::Backward& args, std::int64_t stream) {
            check(cuda::softmax_kl_backward(args, parse_stream(stream)), "softmax_kl_backward");
        });
}

} // namespace fastkd::bindings
