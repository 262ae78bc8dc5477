#include "cpu/pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastkd::cpu {

void advise_huge_pages(void* begin, std::int64_t bytes, std::int64_t least) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t page = 2 * 1024 * 1024;
    const std::uintptr_t from = (reinterpret_cast<std::uintptr_t>(begin) + page - 1) / page * page;
    const std::uintptr_t to =
        (reinterpret_cast<std::uintptr_t>(begin) + static_cast<std::uintptr_t>(bytes)) / page * page;
    if (begin != nullptr && bytes >= least && to > from) {
        madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE); // if refused, pages stay small
    }
#else
    (void)begin;
    (void)bytes;
    (void)least;
#endif
}

} // namespace fastkd::cpu
