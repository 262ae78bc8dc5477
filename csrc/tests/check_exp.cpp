// Check exp of arrays of every length, including row tails.
#include "tests/sanitize.h"

namespace fastkd::sanitize {
namespace {

template <class T>
void lengths() {
    for (std::int64_t count = 0; count <= 67; ++count) {
        Buffer<T> input(count), output(count);
        for (std::int64_t i = 0; i < count; ++i) {
            input[i] = static_cast<T>(-0.7 * static_cast<double>(i));
        }
        if (count > 40) {
            input[20] = -std::numeric_limits<T>::infinity();
            input[40] = std::numeric_limits<T>::quiet_NaN();
        }
        cpu::kernels().exp(input.data(), output.data(), count, dtype_of<T>);
        for (std::int64_t i = 0; i < count; ++i) {
            expect(near(output[i], std::exp(static_cast<double>(input[i])), 4 * rounding<T>, 0),
                   "exp of element " + std::to_string(i) + " of " + std::to_string(count));
        }
    }
}

void run() {
    lengths<float>();
    lengths<double>();
}

const Check check{"exp", run};

} // namespace
} // namespace fastkd::sanitize
