# cuda_targets(<result> <detected>): sets <result> to the chips to compile for, such as "80;90", from
# FASTKD_CUDA_TARGETS:
#
#     unset          the visible GPUs' chips; as "all" if nvidia-smi lists no GPU, or one that no chip here covers
#     native         the visible GPUs' chips, or an error
#     all            the fewest chips whose code runs on every supported GPU, as for a wheel
#     80,90          these chips
#
# <detected> is true if the chips come from the visible GPUs. tests/packaging/test_cuda_targets.py runs this file alone.

if(CMAKE_SCRIPT_MODE_FILE)
  cmake_policy(VERSION 3.24)
endif()
set(known_cuda_targets 80 86 89 90 100 120) # not 103: nvcc 13.0 miscompiles for it, and sm_103 runs sm_100 code
# sm_86 and sm_89 run sm_80 code, nearly the same machine code; benchmarks/results/nvcc has all six.
set(all_cuda_targets 80 90 100 120)

# Code for a chip runs on later chips of its generation (a cubin of sm_80 runs on sm_87).
function(cuda_target_of capability result)
  string(REGEX REPLACE "[^0-9]" "" chip "${capability}")
  math(EXPR generation "${chip} / 10")
  set(found "")
  foreach(target IN LISTS known_cuda_targets)
    math(EXPR target_generation "${target} / 10")
    if(generation EQUAL target_generation AND NOT target GREATER chip)
      set(found ${target})
    endif()
  endforeach()
  set(${result} "${found}" PARENT_SCOPE)
endfunction()

# The chips of the GPUs that nvidia-smi lists; empty without one, or if any has no target.
function(visible_cuda_targets result)
  set(found "")
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                  OUTPUT_VARIABLE output RESULT_VARIABLE status ERROR_QUIET)
  if(status EQUAL 0)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]" capabilities "${output}")
    foreach(capability IN LISTS capabilities)
      cuda_target_of(${capability} target)
      if(NOT target)
        message(STATUS "A GPU of compute capability ${capability} matches no target")
        set(found "")
        break()
      endif()
      list(APPEND found ${target})
    endforeach()
  endif()
  set(${result} "${found}" PARENT_SCOPE)
endfunction()

function(cuda_targets result detected)
  string(REGEX MATCHALL "[^ ,;]+" targets "$ENV{FASTKD_CUDA_TARGETS}")
  set(${detected} FALSE PARENT_SCOPE)
  if(targets STREQUAL "" OR targets STREQUAL "native")
    visible_cuda_targets(visible)
    if(visible)
      set(${detected} TRUE PARENT_SCOPE)
      set(targets ${visible})
    elseif(targets STREQUAL "native")
      message(FATAL_ERROR "FASTKD_CUDA_TARGETS=native needs a supported GPU that nvidia-smi lists, and there is none. "
                          "List the chips instead, e.g. FASTKD_CUDA_TARGETS=90, or use all")
    else()
      set(targets all)
    endif()
  endif()
  if(targets STREQUAL "all")
    set(targets ${all_cuda_targets})
  endif()
  foreach(target IN LISTS targets)
    if(NOT target IN_LIST known_cuda_targets)
      list(JOIN known_cuda_targets ", " expected)
      message(FATAL_ERROR "FASTKD_CUDA_TARGETS: expected all, native, or some of ${expected}, separated by commas; "
                          "got '$ENV{FASTKD_CUDA_TARGETS}'")
    endif()
  endforeach()
  list(REMOVE_DUPLICATES targets)
  list(SORT targets COMPARE NATURAL)
  set(${result} "${targets}" PARENT_SCOPE)
endfunction()

if(CMAKE_SCRIPT_MODE_FILE STREQUAL CMAKE_CURRENT_LIST_FILE)
  cuda_targets(targets detected)
  message("${targets}")
endif()
