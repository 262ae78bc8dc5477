// Very large results come as fresh memory each time (malloc keeps smaller ones for the next call), and its first touch
// costs more than the kernel that writes it: 1 us per 4 KiB on a virtual machine. Where the system gives huge pages on
// advice, a 2 MiB page costs one touch.
#pragma once

#include <cstdint>

namespace fastkd::cpu {

// Asks for huge pages under [begin, begin + bytes), as far as they lie wholly inside, if that is 16 MiB or more.
// Changes nothing but speed.
void advise_huge_pages(void* begin, std::int64_t bytes);

} // namespace fastkd::cpu
