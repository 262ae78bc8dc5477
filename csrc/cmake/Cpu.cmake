# fastkd._cpu: every kernel file is compiled once per instruction set; the best one is selected at run time.

set(cpu_kernels
  cpu/softmax_kl/forward.cpp cpu/softmax_kl/backward.cpp
  cpu/relation/streamed.cpp cpu/relation/stored.cpp cpu/relation/gram.cpp
  cpu/pixel_word/forward.cpp cpu/pixel_word/backward.cpp
  cpu/attention_kl/attention_kl.cpp
  cpu/exp.cpp cpu/peak.cpp)
set(cpu_common cpu/kernels.cpp cpu/pages.cpp cpu/relation/plan.cpp cpu/attention_kl/plan.cpp) # compiled once

function(cpu_skipped reason)
  build_info(cpu built false)
  build_info(cpu reason "${reason}")
  summary("CPU kernels:  not built: ${reason}")
  set(BUILD_INFO_JSON "${BUILD_INFO_JSON}" PARENT_SCOPE)
  set(BUILD_INFO_SUMMARY "${BUILD_INFO_SUMMARY}" PARENT_SCOPE)
endfunction()

check_language(CXX)
if(NOT CMAKE_CXX_COMPILER)
  cpu_skipped("no C++ compiler was found (install g++ or clang++, or set CXX)")
  return()
endif()
enable_language(CXX)
include(CheckCXXSourceCompiles)
include(CheckCXXCompilerFlag)

if(NOT FASTKD_SANITIZE)
  set(PYBIND11_FINDPYTHON ON)
  find_package(Python 3.11 COMPONENTS Interpreter Development.Module)
  if(NOT Python_Development.Module_FOUND)
    cpu_skipped("Python's C headers were not found (install python3-dev)")
    return()
  endif()
  find_package(pybind11 3.0 CONFIG REQUIRED)
endif()

# The kernels use the vector extensions of GCC (9 and newer) and Clang.
check_cxx_source_compiles([[
  typedef float Vec __attribute__((vector_size(16)));
  typedef int Int __attribute__((vector_size(16)));
  Vec f(Vec a, Vec b) { return __builtin_convertvector(a > b ? Int{} : Int{} + 1, Vec); }
  int main() { return static_cast<int>(f(Vec{}, Vec{})[0]) - 1; }
]] FASTKD_VECTOR_EXTENSIONS)
if(NOT FASTKD_VECTOR_EXTENSIONS)
  cpu_skipped("${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION} has no vector extensions (GCC 9 or Clang needed)")
  return()
endif()

set(isas baseline)
set(flags_avx2 -mavx2 -mfma -mf16c -mprfchw)
set(flags_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl ${flags_avx2})
check_cxx_source_compiles("
  #if !defined(__x86_64__)
  #error not x86-64
  #endif
  int main() { return 0; }" FASTKD_ISA_X86)
if(FASTKD_ISA_X86)
  list(APPEND isas avx2 avx512)
endif()

check_cxx_source_compiles([[
  int main() { asm volatile("tdpbf16ps %tmm2, %tmm1, %tmm0"); }
]] FASTKD_AMX_ASSEMBLER)
# FASTKD_EMULATE_AMX, for tests: plain C++ instead of AMX, for machines with AVX512-BF16. The sanitizers need it.
option(FASTKD_EMULATE_AMX "" OFF)

find_package(OpenMP COMPONENTS CXX)

function(cpu_options target)
  if(FASTKD_EMULATE_AMX OR FASTKD_SANITIZE)
    target_include_directories(${target} BEFORE PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/tests/emulation")
  endif()
  target_include_directories(${target} PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}")
  target_compile_options(${target} PRIVATE $<$<NOT:$<BOOL:${FASTKD_SANITIZE}>>:-O3> -Wall -Wextra $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>) # GCC's intrinsics trigger it
  target_compile_definitions(${target} PRIVATE $<$<BOOL:${FASTKD_ISA_X86}>:FASTKD_ISA_X86> $<$<BOOL:${FASTKD_AMX_ASSEMBLER}>:FASTKD_AMX_ASSEMBLER>)
  if(OpenMP_CXX_FOUND AND FASTKD_SANITIZE STREQUAL "thread")
    target_compile_options(${target} PRIVATE ${OpenMP_CXX_FLAGS}) # without its library: see Sanitize.cmake
  elseif(OpenMP_CXX_FOUND)
    target_link_libraries(${target} PRIVATE OpenMP::OpenMP_CXX)
  endif()
  exact_options(${target})
  if(FASTKD_SANITIZE)
    sanitize_options(${target})
  endif()
endfunction()

if(FASTKD_SANITIZE)
  include(Sanitize)
  set(cpu_program sanitize)
else()
  pybind11_add_module(_cpu MODULE NO_EXTRAS bindings/cpu.cpp ${cpu_common})
  set(cpu_program _cpu)
endif()
cpu_options(${cpu_program})
foreach(isa IN LISTS isas)
  add_library(cpu_${isa} OBJECT ${cpu_kernels})
  cpu_options(cpu_${isa})
  target_compile_definitions(cpu_${isa} PRIVATE FASTKD_ISA=${isa})
  target_compile_options(cpu_${isa} PRIVATE ${flags_${isa}})
  if(FASTKD_SANITIZE AND isa STREQUAL FASTKD_UNSANITIZED_ISA)
    target_compile_options(cpu_${isa} PRIVATE -fno-sanitize=all -O0)
  endif()
  target_link_libraries(${cpu_program} PRIVATE cpu_${isa})
endforeach()

set(compiler "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
build_info(cpu built true)
build_info(cpu compiler "${compiler}")
build_info_list(cpu isas ${isas})
if(OpenMP_CXX_FOUND)
  build_info(cpu openmp true)
  set(threads "OpenMP")
else()
  build_info(cpu openmp false)
  set(threads "one thread: OpenMP was not found")
endif()
list(JOIN isas ", " isas_text)
summary("CPU kernels:  ${isas_text} (${compiler}, ${threads})")
if(undone)
  build_info_list(cpu undone ${undone})
  list(JOIN undone ", " undone_text)
  summary("              undone for exact results: ${undone_text}")
endif()
