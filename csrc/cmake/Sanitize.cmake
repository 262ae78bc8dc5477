# The CPU kernels and a driver without Python or torch, under sanitizers, instead of the extension module.
# FASTKD_SANITIZE names them: "address;undefined" or "thread".
#
#     cmake -G Ninja -S csrc -B build/asan "-DFASTKD_SANITIZE=address;undefined"
#     cmake --build build/asan && build/asan/sanitize
#
# ThreadSanitizer does not understand GCC's libgomp, which is not instrumented: it would report races across every
# OpenMP barrier. With "thread", tests/openmp_on_threads.cpp implements the kernels' OpenMP calls on threads instead.
#
# FASTKD_UNSANITIZED_ISA names an instruction set that is only linked, to save half a minute: do not run it.

list(JOIN FASTKD_SANITIZE "," sanitizers)
if(NOT sanitizers MATCHES "^(address|undefined|address,undefined|thread)$")
  message(FATAL_ERROR "FASTKD_SANITIZE: expected address, undefined, address;undefined or thread, got '${FASTKD_SANITIZE}'")
endif()
if(sanitizers STREQUAL "thread" AND NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  message(FATAL_ERROR "FASTKD_SANITIZE=thread needs GCC: tests/openmp_on_threads.cpp implements GCC's OpenMP calls")
endif()

set(CMAKE_REQUIRED_FLAGS "-fsanitize=${sanitizers}")
check_cxx_source_compiles("int main() { return 0; }" FASTKD_SANITIZERS_LINK)
unset(CMAKE_REQUIRED_FLAGS)
if(NOT FASTKD_SANITIZERS_LINK)
  message(FATAL_ERROR "FASTKD_SANITIZE: ${CMAKE_CXX_COMPILER} cannot link with -fsanitize=${sanitizers}")
endif()

file(GLOB sanitize_sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/tests/check_*.cpp")
# The checks are not under test: only the kernels are instrumented. Memory from malloc is checked all the same.
set_source_files_properties(${sanitize_sources} PROPERTIES COMPILE_OPTIONS "-O1;-fno-sanitize=all")
add_executable(sanitize tests/sanitize.cpp ${cpu_common} ${sanitize_sources})
if(sanitizers STREQUAL "thread")
  target_sources(sanitize PRIVATE tests/openmp_on_threads.cpp)
  target_compile_definitions(sanitize PRIVATE FASTKD_SANITIZE_THREAD)
  find_package(Threads REQUIRED)
  target_link_libraries(sanitize PRIVATE Threads::Threads)
endif()

function(sanitize_options target)
  target_compile_definitions(${target} PRIVATE FASTKD_SANITIZE)
  # A CPU reads unaligned addresses, except by instructions that fault; a GPU does not, so the emulation checks them.
  target_compile_options(${target} PRIVATE -fsanitize=${sanitizers} ${sanitizer_flags} -fno-sanitize=alignment)
  target_link_options(${target} PRIVATE -fsanitize=${sanitizers})
endfunction()
