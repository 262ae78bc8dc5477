// Runs a kernel's blocks on the host: every thread of a block is a fiber, and fibers switch only where threads wait for
// each other. What waits for nothing in the kernel therefore really runs before or after what it should have waited
// for.
//
// Blocks follow one another. The order in which fibers and blocks take turns can be chosen: a kernel that gives other
// bits in another order lacks a barrier, or lets blocks meet. ThreadSanitizer is told of the fibers and of the barriers
// alone, so it reports as a race what no barrier orders.
#pragma once

#include <cstdint>
#include <functional>

namespace fastkd::emulation {

// Whose turn is next, and which block's: ascending, descending, or drawn at random (always the same draws).
enum class Order { forward, reverse, random };
void set_order(Order order);

// body() as each thread of each block; throws std::runtime_error if threads wait for what never comes, if lanes of a
// warp meet in different operations, or at what a GPU would stop at (see `check`).
void run(std::int64_t blocks, int threads_x, int threads_y, int shared_bytes, const std::function<void()>& body);

// ---- what kernels call, through cuda/device.cuh and cuda/matrix.cuh
// --------------------------------------------------

int thread_x();
int thread_y();
int lane();
std::int64_t block_x();
std::int64_t grid_x();
unsigned char* dynamic_shared(); // NaN (all ones) when a block starts

void block_barrier();
void warp_barrier();

// Ends the run with an error where `fine` is false.
void check(bool fine, const char* what);

// 32-bit words that each lane lays down and every lane of the warp may then read.
constexpr int slot_words = 8;
using Slots = std::uint32_t[32][slot_words];
enum class Operation { none, barrier, shuffle, load_matrices, multiply_f16, multiply_bf16, multiply_tf32 };

// Waits for the other lanes; the words of all 32, which stay until this lane's next exchange but one. As on a GPU it
// orders no other memory.
const Slots& exchange(Operation operation, const std::uint32_t* words, int count);

// c += A B by whole warps, from each lane's fragments. Products are exact; each 8 of them (4 of tf32) are added to the
// sum exactly, which is then cut off to a float: coarser than rounding, as the hardware is.
void multiply(Operation operation, float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);

// Asynchronous copies of this thread, done by the caller: at once in the order `reverse`, else as late as may be. Both
// are what a GPU may do.
struct Copy {
    void* to;
    const void* from; // null: zeros
    int bytes;
};
bool copies_at_once();
void copy_start(Copy copy);
void copy_commit();
bool copy_next(int groups, Copy* copy); // one more that must be done for at most `groups` groups to be under way

} // namespace fastkd::emulation
