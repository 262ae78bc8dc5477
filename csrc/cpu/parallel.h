// Parallel loops.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastkd::cpu::FASTKD_ISA {

// Call body(index, thread) for every index. thread < threads selects the scratch memory.
template <class Body>
inline __attribute__((always_inline)) void parallel_for(int threads, std::int64_t count, const Body& body) {
#if defined(_OPENMP)
    if (threads > 1 && count > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
        for (std::int64_t i = 0; i < count; ++i) {
            body(i, omp_get_thread_num());
        }
        return;
    }
#endif
    (void)threads;
    for (std::int64_t i = 0; i < count; ++i) {
        body(i, 0);
    }
}

} // namespace fastkd::cpu::FASTKD_ISA
