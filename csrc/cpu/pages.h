// Memory of large results: huge pages, and stores past the caches. malloc maps fresh memory for a very large result on
// each call (it mostly reuses those below 16 MiB), and page faults then cost more than the kernel: 1 us per 4 KiB page
// on a virtual machine. With transparent huge pages enabled by madvise there is one fault per 2 MiB.
#pragma once

#include <cstdint>

namespace fastkd::cpu {

constexpr std::int64_t stream_bytes = 4 * 1024 * 1024; // larger gradients are stored past the caches

// Request huge pages for the whole pages of [begin, begin + bytes) if that is `least` or more. Affects speed only.
void advise_huge_pages(void* begin, std::int64_t bytes, std::int64_t least = 16 * 1024 * 1024);

} // namespace fastkd::cpu
