# The CUDA kernels compiled for the host, for tests: tests/emulation replaces cuda/device.cuh and cuda/matrix.cuh, and
# runs a block's threads as fibers. The result is a module _cuda that takes CPU tensors:
#
#     cmake -G Ninja -S csrc -B build/emulated -DFASTKD_EMULATE=ON && cmake --build build/emulated
#
# FASTKD_SANITIZE ("address;undefined" or "thread") adds sanitizers. Python must then be started with their run-time
# library in LD_PRELOAD.

enable_language(CXX)
include(CheckCXXCompilerFlag)
set(emulation_flags -O2 -Wall -Wextra -Wno-unknown-pragmas -Wno-maybe-uninitialized)
check_cxx_compiler_flag("-mfma -mf16c" FASTKD_EMULATION_FMA) # contract products and sums into FMAs, as nvcc does
if(FASTKD_EMULATION_FMA)
  list(APPEND emulation_flags -mfma -mf16c -ffp-contract=fast)
endif()

add_library(emulation OBJECT tests/emulation/engine.cpp tests/emulation/products.cpp) # always without sanitizers
target_include_directories(emulation PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}")
target_compile_options(emulation PRIVATE ${emulation_flags})

set(PYBIND11_FINDPYTHON ON)
find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 3.0 CONFIG REQUIRED)
# The bindings are slow to compile and not under test. They come last: of an inline function, the first is linked.
pybind11_add_module(_cuda MODULE NO_EXTRAS ${cuda_host_sources} ${cuda_kernels} bindings/cuda.cpp)
set_source_files_properties(bindings/cuda.cpp PROPERTIES COMPILE_OPTIONS "-O0;-fno-sanitize=all")
set_source_files_properties(${cuda_kernels} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++")
target_include_directories(_cuda BEFORE PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/tests/emulation"
                                                "${CMAKE_CURRENT_SOURCE_DIR}")
target_compile_definitions(_cuda PRIVATE FASTKD_EMULATED "FASTKD_CUDA_TARGETS=\"host\"")
target_compile_options(_cuda PRIVATE ${emulation_flags})
target_link_libraries(_cuda PRIVATE emulation)
exact_options(_cuda)
exact_options(emulation)

foreach(sanitizer IN LISTS FASTKD_SANITIZE)
  if(NOT sanitizer MATCHES "^(address|undefined|thread)$")
    message(FATAL_ERROR "FASTKD_SANITIZE: expected address, undefined, address;undefined or thread, got '${FASTKD_SANITIZE}'")
  endif()
  string(TOUPPER ${sanitizer} name)
  target_compile_definitions(emulation PRIVATE FASTKD_EMULATION_${name})
endforeach()
if(FASTKD_SANITIZE)
  list(JOIN FASTKD_SANITIZE "," sanitizers)
  target_compile_options(_cuda PRIVATE -fsanitize=${sanitizers} ${sanitizer_flags})
  target_link_options(_cuda PRIVATE -fsanitize=${sanitizers})
endif()
