// Compiled without -fsanitize: its memory needs no checks, and sanitizers cannot follow the switches between stacks.
#include "tests/emulation/engine.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tests/emulation/context.h"
#include "tests/emulation/products.h"

#if defined(FASTKD_EMULATION_ADDRESS)
#include <sanitizer/common_interface_defs.h>
#elif defined(FASTKD_EMULATION_THREAD)
#include <sanitizer/tsan_interface.h>
#endif

namespace fastkd::emulation {
namespace {

// ---- fibers ----

// A barrier for `members` threads. When all have arrived, the next generation starts.
struct Barrier {
    int members = 0, arrived = 0;
    std::uint64_t generation = 0;
    Operation operation = Operation::none;
    char order[2]; // addresses for ThreadSanitizer's annotations; two, to keep a thread's next arrival separate
};

struct Warp {
    Barrier barrier;
    Slots slots[2];
    float products[2][32][4];
};

struct Fiber {
    Context context;
    char* stack = nullptr;
    std::size_t stack_size = stack_bytes;
    void* tsan = nullptr;
    void* fake_stack = nullptr;
    int index = 0, exchanges = 0;
    bool done = true;
    const Barrier* waits = nullptr;
    std::uint64_t until = 0; // waits while waits->generation has this value
    const char* at = "";
    std::vector<std::vector<Copy>> groups; // of asynchronous copies; the last one is not committed yet
    bool ready() const { return !done && (waits == nullptr || waits->generation != until); }
};

struct Engine {
    std::vector<std::unique_ptr<Fiber>> fibers; // one per thread of the largest block so far
    std::vector<Warp> warps;
    Barrier block;
    Fiber outside; // the caller of run
    Fiber* current = nullptr;
    int threads = 0, threads_x = 1, running = 0;
    std::int64_t block_index = 0, blocks = 0;
    const std::function<void()>* body = nullptr;
    std::unique_ptr<unsigned char, decltype(&std::free)> shared{nullptr, std::free};
    std::string error;
    Order order = Order::forward;
    std::minstd_rand random;
    char start[1], end[1];
};

Engine engine;
std::mutex one_kernel_at_a_time;

void happens_before(char* what) {
#if defined(FASTKD_EMULATION_THREAD)
    __tsan_release(what);
#else
    static_cast<void>(what);
#endif
}
void happens_after(char* what) {
#if defined(FASTKD_EMULATION_THREAD)
    __tsan_acquire(what);
#else
    static_cast<void>(what);
#endif
}

#if defined(FASTKD_EMULATION_ADDRESS)
Fiber* came_from = nullptr;
#endif

void arrived_on_stack(Fiber& self) {
#if defined(FASTKD_EMULATION_ADDRESS)
    const void* bottom = nullptr;
    std::size_t bytes = 0;
    __sanitizer_finish_switch_fiber(self.fake_stack, &bottom, &bytes);
    if (came_from == &engine.outside) { // the caller's stack becomes known here
        engine.outside.stack = static_cast<char*>(const_cast<void*>(bottom));
        engine.outside.stack_size = bytes;
    }
#else
    static_cast<void>(self);
#endif
}

void change_to(Fiber& to) {
    Fiber& from = *engine.current;
    engine.current = &to;
#if defined(FASTKD_EMULATION_ADDRESS)
    came_from = &from;
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_size);
#elif defined(FASTKD_EMULATION_THREAD)
    __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
    Context::change(from.context, to.context);
    arrived_on_stack(from);
}

int next_of(int i) {
    const int n = engine.threads;
    return engine.order == Order::reverse ? (i + n - 1) % n : (i + 1) % n;
}

// Return the next fiber that is ready, or the caller of run if none is.
Fiber& next_fiber(int after) {
    int i = engine.order == Order::random ? static_cast<int>(engine.random() % engine.threads) : next_of(after);
    for (int tried = 0; tried < engine.threads; ++tried, i = next_of(i)) {
        if (engine.fibers[i]->ready()) {
            return *engine.fibers[i];
        }
    }
    return engine.outside;
}

[[noreturn]] void fail(const std::string& what) {
    engine.error = "block " + std::to_string(engine.block_index) + ", thread (" + std::to_string(thread_x()) + ", " +
                   std::to_string(thread_y()) + "): " + what;
    change_to(engine.outside);
    std::abort(); // not reached
}

void arrive(Barrier& barrier, Operation operation, const char* what) {
    Fiber& self = *engine.current;
    if (barrier.arrived == 0) {
        barrier.operation = operation;
    } else if (barrier.operation != operation) {
        fail(std::string("lanes of one warp are in different operations, one in ") + what);
    }
    if (++barrier.arrived == barrier.members) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    self.waits = &barrier;
    self.until = barrier.generation;
    self.at = what;
    Fiber& next = next_fiber(self.index);
    change_to(next);
    self.waits = nullptr;
}

void fiber_main() {
    arrived_on_stack(*engine.current); // later blocks resume at the end of this loop
    for (;;) {
        Fiber& self = *engine.current;
        self.exchanges = 0;
        happens_after(engine.start);
        (*engine.body)();
        for (const auto& group : self.groups) {
            if (!group.empty()) {
                fail("ends with pending asynchronous copies");
            }
        }
        happens_before(engine.end);
        self.done = true;
        --engine.running;
        Fiber& next = next_fiber(self.index);
        change_to(next);
    }
}

void make_fibers(int count) {
    while (static_cast<int>(engine.fibers.size()) < count) {
        auto fiber = std::make_unique<Fiber>();
        fiber->index = static_cast<int>(engine.fibers.size());
        void* stack =
            mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stack == MAP_FAILED) {
            throw std::runtime_error("emulation: cannot allocate the stacks of a block's threads");
        }
        fiber->stack = static_cast<char*>(stack);
        fiber->context.prepare(fiber->stack, fiber_main);
#if defined(FASTKD_EMULATION_THREAD)
        fiber->tsan = __tsan_create_fiber(0);
#endif
        engine.fibers.push_back(std::move(fiber));
    }
}

void run_block(int shared_bytes) {
    if (shared_bytes > 0) {
        std::memset(engine.shared.get(), 0xff, shared_bytes);
    }
    engine.running = engine.threads;
    for (int i = 0; i < engine.threads; ++i) {
        Fiber& fiber = *engine.fibers[i];
        fiber.done = false;
        fiber.waits = nullptr;
        fiber.groups.assign(1, {});
    }
    happens_before(engine.start);
    change_to(next_fiber(engine.order == Order::reverse ? 0 : engine.threads - 1));
    happens_after(engine.end);
    if (engine.error.empty() && engine.running > 0) {
        for (int i = 0; i < engine.threads; ++i) {
            const Fiber& fiber = *engine.fibers[i];
            if (!fiber.done) {
                engine.error = "block " + std::to_string(engine.block_index) + ": " + std::to_string(engine.running) +
                               " threads wait for others that never arrive, thread " + std::to_string(i) + " at " +
                               fiber.at;
                break;
            }
        }
    }
}

} // namespace

void set_order(Order order) {
    const std::lock_guard<std::mutex> lock(one_kernel_at_a_time);
    engine.order = order;
    engine.random.seed(1);
}

void run(std::int64_t blocks, int threads_x, int threads_y, int shared_bytes, const std::function<void()>& body) {
    const std::lock_guard<std::mutex> lock(one_kernel_at_a_time);
    const int threads = threads_x * threads_y;
    if (blocks < 1 || blocks > 0x7fffffff || threads < 1 || threads > 1024 || threads % 32 != 0) {
        throw std::runtime_error("emulation: " + std::to_string(blocks) + " blocks of " + std::to_string(threads) +
                                 " threads: expected 1 to 2^31 - 1 blocks of 1 to 32 whole warps");
    }
    make_fibers(threads);
    engine.threads = threads;
    engine.threads_x = threads_x;
    engine.blocks = blocks;
    engine.body = &body;
    void* shared = nullptr; // a separate allocation, so that AddressSanitizer sees accesses past its end
    if (shared_bytes > 0 && posix_memalign(&shared, 128, shared_bytes) != 0) {
        throw std::runtime_error("emulation: cannot allocate a block's shared memory");
    }
    engine.shared.reset(static_cast<unsigned char*>(shared));
    engine.block = {};
    engine.block.members = threads;
    engine.warps.assign(threads / 32, {});
    for (Warp& warp : engine.warps) {
        warp.barrier.members = 32;
    }
    engine.current = &engine.outside;
    engine.error.clear();
#if defined(FASTKD_EMULATION_THREAD)
    engine.outside.tsan = __tsan_get_current_fiber();
#endif
    for (std::int64_t i = 0; i < blocks && engine.error.empty(); ++i) {
        engine.block_index = engine.order == Order::reverse ? blocks - 1 - i : i;
        run_block(shared_bytes);
    }
    if (!engine.error.empty()) {
        engine.fibers.clear(); // they cannot be resumed; their stacks are leaked, since AddressSanitizer refers to them
        throw std::runtime_error("emulation: " + engine.error);
    }
}

int thread_x() {
    return engine.current->index % engine.threads_x;
}
int thread_y() {
    return engine.current->index / engine.threads_x;
}
int lane() {
    return engine.current->index % 32;
}
std::int64_t block_x() {
    return engine.block_index;
}
std::int64_t grid_x() {
    return engine.blocks;
}
unsigned char* dynamic_shared() {
    check(engine.shared != nullptr, "dynamic shared memory in a launch without any");
    return engine.shared.get();
}

void check(bool fine, const char* what) {
    if (!fine) {
        fail(what);
    }
}

// Consecutive barriers alternate between the two `order` addresses.
void block_barrier() {
    Barrier& barrier = engine.block;
    char* order = &barrier.order[barrier.generation % 2];
    happens_before(order);
    arrive(barrier, Operation::barrier, "a barrier of the block");
    happens_after(order);
}

void warp_barrier() {
    Barrier& barrier = engine.warps[engine.current->index / 32].barrier;
    char* order = &barrier.order[barrier.generation % 2];
    happens_before(order);
    arrive(barrier, Operation::barrier, "a barrier of the warp");
    happens_after(order);
}

namespace {

// Write the words and wait for the warp. The last lane to arrive computes the product before the others continue.
Warp& write_and_wait(Operation operation, const std::uint32_t* words, int count, const char* what, int* turn,
                     bool multiplies) {
    Fiber& self = *engine.current;
    Warp& warp = engine.warps[self.index / 32];
    *turn = self.exchanges++ % 2;
    for (int i = 0; i < count; ++i) {
        warp.slots[*turn][self.index % 32][i] = words[i];
    }
    if (multiplies && warp.barrier.arrived == 31) {
        multiply_fragments(operation, warp.slots[*turn], warp.products[*turn]);
    }
    arrive(warp.barrier, operation, what);
    return warp;
}

} // namespace

const Slots& exchange(Operation operation, const std::uint32_t* words, int count) {
    int turn;
    Warp& warp = write_and_wait(operation, words, count,
                                operation == Operation::shuffle ? "a shuffle" : "a load of matrices", &turn, false);
    return warp.slots[turn];
}

void multiply(Operation operation, float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    const std::uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    Fiber& self = *engine.current;
    Warp& warp = engine.warps[self.index / 32];
    float (&products)[4] = warp.products[self.exchanges % 2][self.index % 32];
    for (int i = 0; i < 4; ++i) {
        products[i] = c[i];
    }
    int turn;
    write_and_wait(operation, words, 6, "a matrix product", &turn, true);
    for (int i = 0; i < 4; ++i) {
        c[i] = products[i];
    }
}

bool copies_at_once() {
    return engine.order == Order::reverse;
}

void copy_start(Copy copy) {
    engine.current->groups.back().push_back(copy);
}

void copy_commit() {
    engine.current->groups.emplace_back();
}

bool copy_next(int groups, Copy* copy) {
    auto& all = engine.current->groups; // the last one is not committed: waits ignore it
    while (static_cast<int>(all.size()) - 1 > groups) {
        if (!all.front().empty()) {
            *copy = all.front().front();
            all.front().erase(all.front().begin());
            return true;
        }
        all.erase(all.begin());
    }
    return false;
}

} // namespace fastkd::emulation
