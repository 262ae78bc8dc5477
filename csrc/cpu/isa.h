// Instruction-set dispatch: the sets compiled into this binary, and the one in use.
//
// Every kernel file is compiled once per instruction set into the namespace fastkd::cpu::FASTKD_ISA. Kernel files use
// only that namespace, always-inlined formulas and compiler builtins: the linker keeps one copy of an inline function
// of the standard library, and that copy could be the one compiled for AVX-512.
#pragma once

#if defined(FASTKD_ISA_X86)
#define FASTKD_FOR_EACH_ISA(apply) apply(baseline) apply(avx2) apply(avx512)
#else
#define FASTKD_FOR_EACH_ISA(apply) apply(baseline)
#endif

namespace fastkd::cpu {

// The kernels of amx are those of avx512, with AMX products of bfloat16.
enum class Isa { baseline, avx2, avx512, amx };

// Return the machine's best instruction set, or the one requested by the environment variable FASTKD_CPU_ISA. amx was
// not measured on any machine, so it is used only if requested.
// Determined at the first call. Throws std::runtime_error if the machine lacks the requested one.
Isa isa();
const char* isa_name(Isa isa);
// Return whether isa() is at least avx512 and the machine has AVX512-BF16, which multiplies pairs of bfloat16 into
// float.
bool bf16_products();
// Return whether isa() is amx, whose tiles multiply bfloat16 into float.
bool amx_products();

} // namespace fastkd::cpu
