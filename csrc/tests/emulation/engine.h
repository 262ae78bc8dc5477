// Run a kernel's thread blocks on the host: every thread of a block is a fiber, and fibers switch only where threads
// wait for each other. So code that lacks a barrier really runs before or after the code it should have waited for.
//
// Blocks run one after another. The order of fibers and blocks is selectable: a kernel whose results depend on it lacks
// a barrier, or its blocks share memory. ThreadSanitizer knows only the fibers and the barriers, so it reports accesses
// that no barrier orders as races.
#pragma once

#include <cstdint>
#include <functional>

namespace fastkd::emulation {

// The order of threads and blocks: ascending, descending, or threads at random (fixed seed) and blocks ascending.
enum class Order { forward, reverse, random };
void set_order(Order order);

// Call body() once per thread of each block. Throws std::runtime_error on a deadlock, if lanes of a warp meet in
// different operations, and where `check` fails.
void run(std::int64_t blocks, int threads_x, int threads_y, int shared_bytes, const std::function<void()>& body);

// ---- called by kernels, through cuda/device.cuh and cuda/matrix.cuh ----

int thread_x();
int thread_y();
int lane();
std::int64_t block_x();
std::int64_t grid_x();
unsigned char* dynamic_shared(); // filled with ones (NaN) when a block starts

void block_barrier();
void warp_barrier();

// End the run with an error if `fine` is false.
void check(bool fine, const char* what);

// 32-bit words that each lane writes for every lane of the warp to read.
constexpr int slot_words = 8;
using Slots = std::uint32_t[32][slot_words];
enum class Operation { none, barrier, shuffle, load_matrices, multiply_f16, multiply_bf16, multiply_tf32 };

// Wait for the other lanes and return the words of all 32, valid until this lane's second exchange from now. As on a
// GPU, this orders no other memory accesses.
const Slots& exchange(Operation operation, const std::uint32_t* words, int count);

// Compute c += A B over a warp, from each lane's fragments. Products are exact; 8 at a time (tf32: 4) are added
// exactly, and the sum is truncated to a float, as the hardware does.
void multiply(Operation operation, float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);

// Asynchronous copies of this thread, which the caller executes: immediately in the order `reverse`, otherwise as late
// as possible. A GPU may do either.
struct Copy {
    void* to;
    const void* from; // null: zeros
    int bytes;
};
bool copies_at_once();
void copy_start(Copy copy);
void copy_commit();
// Get the next copy to execute before at most `groups` groups are pending; return false if there is none.
bool copy_next(int groups, Copy* copy);

} // namespace fastkd::emulation
