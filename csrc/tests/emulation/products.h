// What tensor cores make of the fragments that a warp's lanes hold.
#pragma once

#include "tests/emulation/engine.h"

namespace fastkd::emulation {

// Adds A B to each lane's four sums, from the words of all lanes: four of A, two of B, as cuda/matrix.cuh lays them
// out.
void multiply_fragments(Operation operation, const Slots& slots, float (&products)[32][4]);

} // namespace fastkd::emulation
