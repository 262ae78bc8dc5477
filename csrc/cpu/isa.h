// The instruction sets in this binary, and the one in use.
//
// Every kernel file is compiled once for each of them, with FASTKD_ISA naming it, into the namespace
// fastkd::cpu::FASTKD_ISA. Kernel files keep to that namespace, always-inlined formulas and compiler builtins: an
// inline function of the standard library compiled for AVX-512 could become the one copy that the linker keeps for all.
#pragma once

#if defined(FASTKD_ISA_X86)
#define FASTKD_FOR_EACH_ISA(apply) apply(baseline) apply(avx2) apply(avx512)
#else
#define FASTKD_FOR_EACH_ISA(apply) apply(baseline)
#endif

namespace fastkd::cpu {

enum class Isa { baseline, avx2, avx512 };

// The best instruction set of this machine, or the lesser one that the environment variable FASTKD_CPU_ISA asks for;
// decided once. Throws std::runtime_error when that variable asks for one that is not there.
Isa isa();
const char* isa_name(Isa isa);
// Whether isa() is avx512 and the machine also multiplies pairs of bfloat16 into float (AVX512-BF16).
bool bf16_products();

} // namespace fastkd::cpu
