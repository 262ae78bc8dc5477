// Expected results of pixel_word for one sample, by plain loops in double that build the pixels x pixels matrices.
#pragma once

#include <algorithm>

#include "tests/sanitize.h"

namespace fastkd::sanitize {
namespace {

struct Case {
    std::int64_t batch, pixels, words_s, words_t, width_s, width_t; // a width of 0: logits are given
    bool cosine, maps_s, maps_t, masked_pixels, masked_words;
    int terms;
    double temperature;
    Layout student, teacher, grad; // of (rows, features), or (features, rows) for maps
    int threads;
    bool for_pixels, for_words, tight; // `tight`: the smallest workspace
    bool bf16_words;

    bool features() const { return width_s > 0; }
    std::int64_t columns_s() const { return features() ? width_s : words_s; }
    std::int64_t columns_t() const { return features() ? width_t : words_t; }
    double scale(std::int64_t width) const {
        return 1 / (temperature * (cosine || width == 0 ? 1 : std::sqrt(static_cast<double>(width))));
    }
};

using Doubles = std::vector<double>;

// One network's logits of one sample (N, words), -inf for missing words, and the norms that divide the features.
struct Attention {
    Doubles logits, pixel_norms, word_norms;
};

double norm_of(const double* x, std::int64_t width) {
    double square = 0;
    for (std::int64_t d = 0; d < width; ++d) {
        square += x[d] * x[d];
    }
    return std::fmax(std::sqrt(square), pixel_word::norm_floor);
}

Attention attention(const Case& c, const double* pixels, const double* words, std::int64_t width,
                    std::int64_t word_count, const std::uint8_t* word_mask) {
    Attention to{Doubles(c.pixels * word_count), Doubles(c.pixels, 1), Doubles(word_count, 1)};
    for (std::int64_t p = 0; p < c.pixels && c.cosine; ++p) {
        to.pixel_norms[p] = norm_of(pixels + p * width, width);
    }
    for (std::int64_t w = 0; w < word_count && c.cosine; ++w) {
        to.word_norms[w] = norm_of(words + w * width, width);
    }
    for (std::int64_t p = 0; p < c.pixels; ++p) {
        for (std::int64_t w = 0; w < word_count; ++w) {
            double dot = words == nullptr ? pixels[p * word_count + w] : 0;
            for (std::int64_t d = 0; d < width; ++d) {
                dot += pixels[p * width + d] * words[w * width + d];
            }
            const bool there = word_mask == nullptr || word_mask[w] != 0;
            to.logits[p * word_count + w] =
                there ? dot / (to.pixel_norms[p] * to.word_norms[w]) * c.scale(width) : -HUGE_VAL;
        }
    }
    return to;
}

// Write softmax and log-softmax of `count` logits, `step` apart, excluding masked ones.
void softmax(const double* x, std::int64_t count, std::int64_t step, const std::uint8_t* mask, double* p,
             double* log_p) {
    double max = -HUGE_VAL, sum = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        max = mask == nullptr || mask[i] != 0 ? std::fmax(max, x[i * step]) : max;
    }
    for (std::int64_t i = 0; i < count; ++i) {
        p[i * step] = mask == nullptr || mask[i] != 0 ? std::exp(x[i * step] - max) : 0;
        sum += p[i * step];
    }
    for (std::int64_t i = 0; i < count; ++i) {
        p[i * step] /= sum;
        log_p[i * step] = x[i * step] - max - std::log(sum);
    }
}

double kl(const Doubles& p_t, const Doubles& log_t, const Doubles& log_s) {
    double sum = 0;
    for (std::size_t i = 0; i < p_t.size(); ++i) {
        sum += p_t[i] > 0 ? p_t[i] * (log_t[i] - log_s[i]) : 0;
    }
    return sum;
}

// Compute a sample's four losses and their gradient with respect to the student's scaled logits. `mask` is the pixel
// mask, or null.
void oracle(const Case& c, const Attention& s, const Attention& t, const std::uint8_t* mask, std::int64_t valid_words,
            const double* grad, double* loss, Doubles& du) {
    const std::int64_t n = c.pixels, words = c.words_s;
    double valid = 0;
    for (std::int64_t p = 0; p < n; ++p) {
        valid += mask == nullptr || mask[p] != 0;
    }
    std::fill(loss, loss + pixel_word::term_count, 0.0);
    std::fill(du.begin(), du.end(), 0.0);
    Doubles a(n * words), log_a(n * words), b(n * c.words_t), log_b(n * c.words_t), da(n * words);
    for (std::int64_t p = 0; p < n; ++p) {
        if (mask == nullptr || mask[p] != 0) { // the rest stays 0
            softmax(&s.logits[p * words], words, 1, nullptr, &a[p * words], &log_a[p * words]);
            softmax(&t.logits[p * c.words_t], c.words_t, 1, nullptr, &b[p * c.words_t], &log_b[p * c.words_t]);
        }
    }
    if (c.terms & pixel_word::pixel_to_word) {
        loss[0] = kl(b, log_b, log_a) / valid;
        for (std::int64_t i = 0; i < n * words; ++i) {
            du[i] += grad[0] / valid * (a[i] - b[i]);
        }
    }
    if (c.terms & pixel_word::word_to_pixel) {
        Doubles q_s(n * words), log_s(n * words), q_t(n * words), log_t(n * words);
        for (std::int64_t w = 0; w < words; ++w) {
            if (s.logits[w] > -HUGE_VAL) {
                softmax(&s.logits[w], n, words, mask, &q_s[w], &log_s[w]);
                softmax(&t.logits[w], n, words, mask, &q_t[w], &log_t[w]);
            }
        }
        loss[1] = kl(q_t, log_t, log_s) / static_cast<double>(valid_words);
        for (std::int64_t i = 0; i < n * words; ++i) {
            du[i] += grad[1] / static_cast<double>(valid_words) * (q_s[i] - q_t[i]);
        }
    }
    if (c.terms & pixel_word::pixel_pixel) {
        for (std::int64_t p = 0; p < n; ++p) {
            for (std::int64_t q = 0; q < n; ++q) {
                double r = 0;
                for (std::int64_t w = 0; w < words; ++w) {
                    r += a[p * words + w] * a[q * words + w];
                }
                for (std::int64_t w = 0; w < c.words_t; ++w) {
                    r -= b[p * c.words_t + w] * b[q * c.words_t + w];
                }
                loss[2] += r * r / (valid * valid);
                for (std::int64_t w = 0; w < words; ++w) {
                    da[p * words + w] += 4 * grad[2] / (valid * valid) * r * a[q * words + w];
                }
            }
        }
    }
    if (c.terms & pixel_word::word_word) {
        for (std::int64_t v = 0; v < words; ++v) {
            for (std::int64_t w = 0; w < words; ++w) {
                double r = 0;
                for (std::int64_t p = 0; p < n; ++p) {
                    r += a[p * words + v] * a[p * words + w] - b[p * words + v] * b[p * words + w];
                }
                loss[3] += r * r / (valid * valid);
                for (std::int64_t p = 0; p < n; ++p) {
                    da[p * words + v] += 4 * grad[3] / (valid * valid) * r * a[p * words + w];
                }
            }
        }
    }
    for (std::int64_t p = 0; p < n; ++p) {
        double along = 0;
        for (std::int64_t w = 0; w < words; ++w) {
            along += a[p * words + w] * da[p * words + w];
        }
        for (std::int64_t w = 0; w < words; ++w) {
            du[p * words + w] += a[p * words + w] * (da[p * words + w] - along);
        }
    }
}

// Turn the gradient of x^ = x/norm into the gradient of x: subtract the component along x and divide by the norm.
void unscale(double* dx, const double* x, std::int64_t width, double norm, bool cosine) {
    double along = 0;
    for (std::int64_t d = 0; d < width && cosine; ++d) {
        along += dx[d] * x[d] / (norm * norm);
    }
    for (std::int64_t d = 0; d < width && cosine; ++d) {
        dx[d] = norm <= pixel_word::norm_floor ? 0 : (dx[d] - along * x[d]) / norm;
    }
}

} // namespace
} // namespace fastkd::sanitize
