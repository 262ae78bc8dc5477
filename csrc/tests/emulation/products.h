// Matrix products of a warp's fragments, as tensor cores compute them.
#pragma once

#include "tests/emulation/engine.h"

namespace fastkd::emulation {

// Add A B to each lane's four sums. `slots` holds every lane's words: four of A, two of B, as in cuda/matrix.cuh.
void multiply_fragments(Operation operation, const Slots& slots, float (&products)[32][4]);

} // namespace fastkd::emulation
