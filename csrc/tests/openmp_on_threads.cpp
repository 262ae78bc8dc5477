// GCC's OpenMP runtime interface implemented with std::thread, for ThreadSanitizer: it understands the creation and
// joining of these threads, but not libgomp's synchronisation. The kernels are still compiled with -fopenmp; a
// construct that this file lacks is an undefined symbol when the driver is linked.
//
// Chunks of dynamic loops are claimed with relaxed atomics, so that no ordering is added beyond what OpenMP guarantees.
#include <atomic>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Loop {
    std::atomic<long> next;
    long end, step, chunk;
    Loop(long begin, long end, long step, long chunk)
        : next(begin), end(end), step(step), chunk(chunk < 1 ? 1 : chunk) {}
};

struct Team {
    explicit Team(unsigned size) : size(size) {}
    const unsigned size;
    std::mutex mutex;
    std::condition_variable arrived;
    unsigned waiting = 0, generation = 0;
    std::map<unsigned, std::unique_ptr<Loop>> loops; // by order in the region
    std::map<unsigned, bool> singles;
};

// A thread's place in its team, and the number of loops and `single` blocks it has entered.
struct Member {
    Team* team = nullptr;
    unsigned number = 0;
    unsigned loops = 0, singles = 0;
    Loop* loop = nullptr;
};
thread_local Member self;

constexpr unsigned default_threads = 4;
std::mutex critical_section, atomic_section;

void run_team(void (*body)(void*), void* data, unsigned threads, std::unique_ptr<Loop> first_loop) {
    Team team(threads == 0 ? default_threads : threads);
    Loop* const loop = first_loop.get();
    if (loop != nullptr) {
        team.loops[0] = std::move(first_loop);
    }
    const auto work = [&](unsigned number) {
        const Member before = self;
        self = {&team, number, loop == nullptr ? 0u : 1u, 0, loop};
        body(data);
        self = before;
    };
    std::vector<std::thread> others;
    for (unsigned number = 1; number < team.size; ++number) {
        others.emplace_back(work, number);
    }
    work(0);
    for (std::thread& other : others) {
        other.join();
    }
}

bool next_chunk(long* begin, long* end) {
    Loop& loop = *self.loop;
    const long size = loop.step * loop.chunk;
    const long from = loop.next.fetch_add(size, std::memory_order_relaxed);
    if (loop.step > 0 ? from >= loop.end : from <= loop.end) {
        return false;
    }
    const bool last = loop.step > 0 ? from + size > loop.end : from + size < loop.end;
    *begin = from;
    *end = last ? loop.end : from + size;
    return true;
}

bool start_loop(long first, long last, long step, long chunk, long* begin, long* end) {
    static thread_local std::unique_ptr<Loop> alone; // outside of parallel regions
    if (self.team == nullptr) {
        alone = std::make_unique<Loop>(first, last, step, chunk);
        self.loop = alone.get();
    } else {
        const std::lock_guard<std::mutex> lock(self.team->mutex);
        std::unique_ptr<Loop>& loop = self.team->loops[self.loops++];
        if (loop == nullptr) {
            loop = std::make_unique<Loop>(first, last, step, chunk);
        }
        self.loop = loop.get();
    }
    return next_chunk(begin, end);
}

} // namespace

extern "C" {

int omp_get_thread_num() {
    return static_cast<int>(self.number);
}
int omp_get_num_threads() {
    return self.team == nullptr ? 1 : static_cast<int>(self.team->size);
}
int omp_get_max_threads() {
    return default_threads;
}
int omp_in_parallel() {
    return self.team != nullptr && self.team->size > 1;
}

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
    run_team(body, data, threads, nullptr);
}

void GOMP_barrier() {
    Team* const team = self.team;
    if (team == nullptr) {
        return;
    }
    std::unique_lock<std::mutex> lock(team->mutex);
    const unsigned generation = team->generation;
    if (++team->waiting == team->size) {
        team->waiting = 0;
        ++team->generation;
        team->arrived.notify_all();
    } else {
        team->arrived.wait(lock, [&] { return team->generation != generation; });
    }
}

bool GOMP_single_start() {
    if (self.team == nullptr) {
        return true;
    }
    const std::lock_guard<std::mutex> lock(self.team->mutex);
    bool& taken = self.team->singles[self.singles++];
    const bool mine = !taken;
    taken = true;
    return mine;
}

void GOMP_critical_start() {
    critical_section.lock();
}
void GOMP_critical_end() {
    critical_section.unlock();
}
void GOMP_atomic_start() {
    atomic_section.lock();
}
void GOMP_atomic_end() {
    atomic_section.unlock();
}

// Guided loops run as dynamic ones, without shrinking chunks.
#define FASTKD_LOOPS(kind)                                                                                             \
    void GOMP_parallel_loop_##kind(void (*body)(void*), void* data, unsigned threads, long first, long last,           \
                                   long step, long chunk, unsigned) {                                                  \
        run_team(body, data, threads, std::make_unique<Loop>(first, last, step, chunk));                               \
    }                                                                                                                  \
    bool GOMP_loop_##kind##_start(long first, long last, long step, long chunk, long* begin, long* end) {              \
        return start_loop(first, last, step, chunk, begin, end);                                                       \
    }                                                                                                                  \
    bool GOMP_loop_##kind##_next(long* begin, long* end) {                                                             \
        return next_chunk(begin, end);                                                                                 \
    }
FASTKD_LOOPS(dynamic)
FASTKD_LOOPS(nonmonotonic_dynamic)
FASTKD_LOOPS(guided)
FASTKD_LOOPS(nonmonotonic_guided)
#undef FASTKD_LOOPS

void GOMP_loop_end() {
    GOMP_barrier();
}
void GOMP_loop_end_nowait() {
}

} // extern "C"
