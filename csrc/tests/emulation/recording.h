// Record launches instead of running them.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace fastkd::emulation {

// `kernel` is the type of the kernel, which names its arguments.
struct Launch {
    std::string kernel;
    std::int64_t blocks;
    int threads;
    int shared_bytes;
};

inline bool recording = false;
inline std::vector<Launch> launches;

// From now on record launches, without running them, or run them. Return the launches recorded so far.
inline std::vector<Launch> set_recording(bool on) {
    recording = on;
    return std::exchange(launches, {});
}

// Return true, and record the launch, while launches are recorded.
inline bool recorded(const char* kernel, std::int64_t blocks, int threads, int shared_bytes) {
    if (recording) {
        launches.push_back({kernel, blocks, threads, shared_bytes});
    }
    return recording;
}

} // namespace fastkd::emulation
