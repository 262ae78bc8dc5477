# The CUDA kernels compiled for the host, for tests: cuda/device.cuh and cuda/matrix.cuh are found in tests/emulation
# first, where a block's threads are fibers. A module _cuda that takes CPU tensors:
#
#     cmake -G Ninja -S csrc -B build/emulated -DFASTKD_EMULATE=ON && cmake --build build/emulated
#
# With FASTKD_SANITIZE the driver of Sanitize.cmake, calling these kernels in place of the CPU's.

enable_language(CXX)
include(CheckCXXCompilerFlag)
set(emulation_flags -O2 -Wall -Wextra -Wno-unknown-pragmas -Wno-maybe-uninitialized)
check_cxx_compiler_flag("-mfma -mf16c" FASTKD_EMULATION_FMA) # products are fused with sums, as nvcc does it
if(FASTKD_EMULATION_FMA)
  list(APPEND emulation_flags -mfma -mf16c -ffp-contract=fast)
endif()

add_library(emulation OBJECT tests/emulation/engine.cpp) # never under a sanitizer itself
target_include_directories(emulation PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}")
target_compile_options(emulation PRIVATE ${emulation_flags})
foreach(sanitizer IN ITEMS address thread)
  string(TOUPPER ${sanitizer} name)
  if("${sanitizer}" IN_LIST FASTKD_SANITIZE)
    target_compile_definitions(emulation PRIVATE FASTKD_EMULATION_${name})
  endif()
endforeach()

if(FASTKD_SANITIZE)
  include(CheckCXXSourceCompiles)
  set(cpu_common "")
  include(Sanitize)
  set(emulated sanitize)
  sanitize_options(sanitize)
else()
  set(PYBIND11_FINDPYTHON ON)
  find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)
  find_package(pybind11 3.0 CONFIG REQUIRED)
  pybind11_add_module(_cuda MODULE NO_EXTRAS bindings/cuda.cpp)
  target_compile_definitions(_cuda PRIVATE "FASTKD_CUDA_TARGETS=\"host\"")
  set(emulated _cuda)
endif()
set_source_files_properties(${cuda_kernels} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++")
target_sources(${emulated} PRIVATE ${cuda_kernels})
target_include_directories(${emulated} BEFORE PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/tests/emulation"
                                                      "${CMAKE_CURRENT_SOURCE_DIR}")
target_compile_definitions(${emulated} PRIVATE FASTKD_EMULATED)
target_compile_options(${emulated} PRIVATE ${emulation_flags})
target_link_libraries(${emulated} PRIVATE emulation)
