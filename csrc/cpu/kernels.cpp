// Selection of the instruction set at run time.
#include "cpu/kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/amx.h"

namespace fastkd::cpu {
namespace {

#define FASTKD_TABLE(isa)                                                                                              \
    Kernels{isa::softmax_kl_forward,                                                                                   \
            isa::softmax_kl_backward,                                                                                  \
            isa::relation_streamed_forward,                                                                            \
            isa::relation_streamed_backward,                                                                           \
            isa::relation_stored_forward,                                                                              \
            isa::relation_stored_backward,                                                                             \
            isa::relation_gram_forward,                                                                                \
            isa::relation_gram_backward,                                                                               \
            isa::pixel_word_workspace,                                                                                 \
            isa::pixel_word_forward,                                                                                   \
            isa::pixel_word_backward,                                                                                  \
            isa::attention_kl_run,                                                                                     \
            isa::exp,                                                                                                  \
            isa::peak},
constexpr Kernels tables[] = {FASTKD_FOR_EACH_ISA(FASTKD_TABLE)};
#undef FASTKD_TABLE

Isa best_isa() {
#if defined(FASTKD_ISA_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        return Isa::avx512;
    }
    // Machines with AVX2 also have F16C, which older compilers cannot query.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return Isa::avx2;
    }
#endif
    return Isa::baseline;
}

Isa chosen_isa() {
    const Isa best = best_isa();
    const char* requested = std::getenv("FASTKD_CPU_ISA");
    if (requested == nullptr || *requested == '\0') {
        return best;
    }
    std::string available;
    for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::amx}) {
        if (isa > best && !(isa == Isa::amx && best == Isa::avx512 && request_tiles())) {
            break;
        }
        if (requested == std::string(isa_name(isa))) {
            return isa;
        }
        available += std::string(available.empty() ? "" : ", ") + isa_name(isa);
    }
    throw std::runtime_error("FASTKD_CPU_ISA: expected an instruction set of this machine (" + available + "), got '" +
                             requested + "'");
}

} // namespace

Isa isa() {
    static const Isa chosen = chosen_isa();
    return chosen;
}

const char* isa_name(Isa isa) {
    switch (isa) {
    case Isa::amx:
        return "amx";
    case Isa::avx512:
        return "avx512";
    case Isa::avx2:
        return "avx2";
    default:
        return "baseline";
    }
}

bool bf16_products() {
#if defined(FASTKD_ISA_X86)
    return isa() >= Isa::avx512 && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

bool amx_products() {
    return isa() == Isa::amx;
}

const Kernels& kernels() {
    return tables[static_cast<int>(isa() == Isa::amx ? Isa::avx512 : isa())];
}

} // namespace fastkd::cpu
