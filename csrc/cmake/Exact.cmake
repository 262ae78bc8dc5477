# Undoes fast math requested by the environment (CXXFLAGS, CUDAFLAGS, NVCC_APPEND_FLAGS, ...), for fastkd only. With
# fast math, equal networks would not give exactly 0, NaN and infinity would be ignored, and loading the module would
# flush the whole process's denormals to 0. cpu/kernels.h rejects fast math that is not undone here.

# These follow the environment's flags and override them.
set(exact_flags -fno-fast-math -fno-unsafe-math-optimizations -fno-finite-math-only -fno-associative-math
                -fno-reciprocal-math -fsigned-zeros)
set(fast_cxx "-Ofast|-f(fast-math|unsafe-math-optimizations|finite-math-only|associative-math|reciprocal-math|no-signed-zeros)")
set(fast_nvcc "--?(use_fast_math|ftz[= ]true|prec-(div|sqrt)[= ]false)")

set(undone "")
foreach(name IN ITEMS CMAKE_CXX_FLAGS CMAKE_CUDA_FLAGS ENV{CXXFLAGS} ENV{CUDAFLAGS} ENV{LDFLAGS} ENV{NVCC_PREPEND_FLAGS}
                      ENV{NVCC_APPEND_FLAGS} ENV{CXX})
  if(name MATCHES "^ENV{(.*)}$")
    set(flags "$ENV{${CMAKE_MATCH_1}}")
    set(name "${CMAKE_MATCH_1}")
  else()
    set(flags "${${name}}")
  endif()
  if(" ${flags} " MATCHES "[ =,](${fast_cxx}|${fast_nvcc})[ ,]")
    list(APPEND undone "${CMAKE_MATCH_1} in ${name}")
  endif()
endforeach()

# exact_options(<target>): call it after setting all other options. At link time the flags keep crtfastmath.o out.
function(exact_options target)
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:${exact_flags}>")
  target_link_options(${target} PRIVATE -O3 -fno-fast-math -fno-unsafe-math-optimizations)
endfunction()

# exact_cuda(<target>): removes the flags, which nvcc cannot override, also from the variables that nvcc reads itself.
function(exact_cuda target)
  string(REGEX REPLACE "(^| )${fast_nvcc}" " " CMAKE_CUDA_FLAGS "${CMAKE_CUDA_FLAGS}")
  set(CMAKE_CUDA_FLAGS "${CMAKE_CUDA_FLAGS}" PARENT_SCOPE)
  set(changed "")
  foreach(name IN ITEMS NVCC_PREPEND_FLAGS NVCC_APPEND_FLAGS)
    string(REGEX REPLACE "(^| )${fast_nvcc}" " " flags "$ENV{${name}}")
    if(NOT flags STREQUAL "$ENV{${name}}")
      list(APPEND changed "${name}=${flags}")
    endif()
  endforeach()
  if(changed)
    set(launcher "${CMAKE_COMMAND}" -E env ${changed} ${CMAKE_CUDA_COMPILER_LAUNCHER})
    set_target_properties(${target} PROPERTIES CUDA_COMPILER_LAUNCHER "${launcher}")
  endif()
endfunction()
