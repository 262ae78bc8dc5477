// Check pixel_word, forward and backward, against plain loops in double that build the pixels x pixels matrices:
// features and logits, rows and maps, masked pixels that are NaN, words that one network lacks.
#include "tests/pixel_word_oracle.h"

namespace fastkd::sanitize {
namespace {

using pixel_word::Array;

// One network's pixels, as passed to the kernel and in double with masked ones set to zero.
template <class S>
struct Input {
    Input(const Case& c, bool maps, const Layout& layout, std::int64_t columns, const std::vector<std::uint8_t>& mask,
          Random& random)
        : layout(layout), maps(maps),
          rows(c.batch, maps ? columns : c.pixels, maps ? c.pixels : columns, layout, Values::normal, random) {
        const bool own = layout.stride_batch != 0 && layout.stride_row != 0;
        for (std::int64_t b = 0; b < c.batch; ++b) {
            for (std::int64_t p = 0; p < c.pixels; ++p) {
                const bool valid = mask.empty() || mask[b * c.pixels + p] != 0;
                for (std::int64_t d = 0; d < columns; ++d) {
                    S& x = maps ? rows.row(b, d)[p] : rows.row(b, p)[d];
                    exact.push_back(valid ? to_double(x) : 0);
                    if (!valid && own) {
                        x = to_storage<S>(std::nan(""));
                    }
                }
            }
        }
    }
    Array array() {
        const std::int64_t row = layout.stride_row;
        return {rows.data(), dtype_of<S>, layout.stride_batch, maps ? 1 : row, maps ? row : 1};
    }
    Layout layout;
    bool maps;
    Rows<S> rows;
    Doubles exact; // (B, N, columns)
};

std::vector<std::uint8_t> random_mask(std::int64_t batch, std::int64_t count, bool masked, Random& random) {
    std::vector<std::uint8_t> mask(masked ? batch * count : 0);
    for (std::size_t i = 0; i < mask.size(); ++i) { // every sample has at least one
        mask[i] = random.bits() % 3 != 0 || static_cast<std::int64_t>(i) % count == count / 2;
    }
    return mask;
}

struct ExactBuffer { // of the exact size, so that sanitizers see accesses beyond the end
    explicit ExactBuffer(const std::vector<std::uint8_t>& mask) : buffer(static_cast<std::int64_t>(mask.size())) {
        std::copy(mask.begin(), mask.end(), buffer.data());
    }
    const std::uint8_t* data() const { return buffer.size() > 0 ? buffer.data() : nullptr; }
    Buffer<std::uint8_t> buffer;
};

template <class S>
void compare(const Case& c) {
    using T = Compute<S>;
    Random random(static_cast<std::uint64_t>(c.pixels * 131 + c.words_s * 17 + c.width_s * 7 + c.threads));
    const auto mask = random_mask(c.batch, c.pixels, c.masked_pixels, random);
    const auto mask_s = random_mask(c.batch, c.words_s, c.masked_words, random);
    const bool words_may_differ = c.terms == pixel_word::pixel_pixel;
    const auto mask_t = words_may_differ ? random_mask(c.batch, c.words_t, c.masked_words, random) : mask_s;
    const ExactBuffer pixel_mask(mask), word_mask_s(mask_s), word_mask_t(mask_t);
    Input<S> student(c, c.maps_s, c.student, c.columns_s(), mask, random);
    Input<S> teacher(c, c.maps_t, c.teacher, c.columns_t(), mask, random);
    const auto words_of = [&](std::int64_t count, std::int64_t width) {
        const Layout layout{"contiguous", count * width, width, 0};
        return Rows<T>(c.batch, count, width, layout, Values::normal, random);
    };
    Rows<T> words_s = words_of(c.words_s, c.width_s), words_t = words_of(c.words_t, c.width_t);
    for (Rows<T>* words : {&words_s, &words_t}) {
        for (std::int64_t i = 0, n = c.batch * (words == &words_s ? c.words_s * c.width_s : c.words_t * c.width_t);
             c.bf16_words && i < n; ++i) {
            T& x = words->row(0, 0)[i];
            x = static_cast<T>(to_double(to_storage<BFloat16>(to_double(x))));
        }
    }
    Rows<T> grad_loss(c.batch, pixel_word::term_count, 1, layouts(c.batch, 4, 1)[c.threads % 5], Values::normal,
                      random);
    const Layout grad_strides = layouts(c.batch, 4, 1)[c.threads % 5];

    pixel_word::Problem problem{};
    problem.student = {student.array(),    c.features() ? words_s.data() : nullptr,
                       word_mask_s.data(), c.words_s,
                       c.width_s,          c.scale(c.width_s),
                       c.bf16_words};
    problem.teacher = {teacher.array(),    c.features() ? words_t.data() : nullptr,
                       word_mask_t.data(), c.words_t,
                       c.width_t,          c.scale(c.width_t),
                       c.bf16_words};
    problem.pixel_mask = pixel_mask.data();
    problem.batch = c.batch;
    problem.pixels = c.pixels;
    problem.dtype = dtype_of<T>;
    problem.cosine = c.cosine;
    problem.terms = c.terms;
    const std::int64_t most = std::max(c.words_s, c.words_t);
    Buffer<T> loss(c.batch * pixel_word::term_count);
    Buffer<T> logits(c.features() ? c.batch * (c.words_s + c.words_t) * c.pixels : 0);
    Buffer<T> norms(c.cosine ? c.batch * c.pixels : 0), grams(c.batch * 3 * most * most);
    Buffer<double> columns(2 * c.batch * most);
    const pixel_word::Kept kept{c.features() ? logits.data() : nullptr, c.cosine ? norms.data() : nullptr,
                                c.terms & pixel_word::word_to_pixel ? columns.data() : nullptr,
                                c.terms & pixel_word::second_order ? grams.data() : nullptr};
    const auto workspace_of = [&](bool backward) {
        problem.workspace_limit = std::int64_t(32) << 20;
        if (c.tight) {
            problem.workspace_limit = cpu::kernels().pixel_word_workspace(problem, backward, c.threads).minimum;
        }
        const pixel_word::Workspace workspace = cpu::kernels().pixel_word_workspace(problem, backward, c.threads);
        expect(workspace.minimum <= workspace.bytes + 384 && workspace.bytes <= problem.workspace_limit, "workspace");
        return workspace.bytes;
    };
    {
        Buffer<char> workspace(workspace_of(false));
        cpu::kernels().pixel_word_forward({problem, kept, loss.data(), workspace.data()}, c.threads);
    }
    // The gradient has the student's layout, dense or not; the gaps between its rows must stay untouched.
    const bool maps = student.array().column != 1;
    const std::int64_t rows = maps ? c.columns_s() : c.pixels, length = maps ? c.pixels : c.columns_s();
    const std::int64_t step = c.grad.stride_row;
    Buffer<S> grad(extent(c.grad, c.batch, rows, length));
    Buffer<T> grad_words(c.batch * c.words_s * c.width_s);
    S* const to = grad.data() + c.grad.offset;
    {
        if (c.features() && problem.teacher.width > 0) {
            problem.teacher.pixels.data = nullptr; // its logits were saved
        }
        Buffer<char> workspace(workspace_of(true));
        pixel_word::Backward args{};
        args.problem = problem;
        args.kept = kept;
        args.grad_loss = grad_loss.data();
        args.grad_loss_strides[0] = grad_strides.stride_batch;
        args.grad_loss_strides[1] = grad_strides.stride_row;
        args.grad_pixels = {c.for_pixels ? to : nullptr, dtype_of<S>, c.grad.stride_batch, maps ? 1 : step,
                            maps ? step : 1};
        args.grad_words = c.for_words ? grad_words.data() : nullptr;
        args.workspace = workspace.data();
        cpu::kernels().pixel_word_backward(args, c.threads);
    }

    const std::string where =
        std::string(name_of(dtype_of<S>)) + " " + std::to_string(c.batch) + "x" + std::to_string(c.pixels) + " words " +
        std::to_string(c.words_s) + "/" + std::to_string(c.words_t) + " widths " + std::to_string(c.width_s) + "/" +
        std::to_string(c.width_t) + " terms " + std::to_string(c.terms) + (c.cosine ? " cosine" : "") +
        (c.masked_pixels ? " pixels masked" : "") + (c.masked_words ? " words masked" : "") +
        (c.maps_s ? " maps " : " rows ") + c.student.name + (c.maps_t ? ", maps " : ", rows ") + c.teacher.name + ", " +
        std::to_string(c.threads) + " threads, sample ";
    const double loose = 1e3 * rounding<T>;
    for (std::int64_t b = 0; b < c.batch; ++b) {
        const auto words_at = [&](Rows<T>& words, std::int64_t count, std::int64_t width) {
            Doubles exact;
            for (std::int64_t i = 0; i < count * width; ++i) {
                exact.push_back(to_double(words.row(b, 0)[i]));
            }
            return exact;
        };
        const Doubles l_s = words_at(words_s, c.words_s, c.width_s), l_t = words_at(words_t, c.words_t, c.width_t);
        const double* v_s = &student.exact[b * c.pixels * c.columns_s()];
        const auto part = [&](const std::vector<std::uint8_t>& all, std::int64_t count) {
            return all.empty() ? nullptr : all.data() + b * count;
        };
        const std::uint8_t* valid_s = part(mask_s, c.words_s);
        const Attention s = attention(c, v_s, c.features() ? l_s.data() : nullptr, c.width_s, c.words_s, valid_s);
        const Attention t =
            attention(c, &teacher.exact[b * c.pixels * c.columns_t()], c.features() ? l_t.data() : nullptr, c.width_t,
                      c.words_t, part(mask_t, c.words_t));
        double want[pixel_word::term_count], weights[pixel_word::term_count], size = 0;
        for (int term = 0; term < pixel_word::term_count; ++term) {
            weights[term] = to_double(*grad_loss.row(b, term));
            size += std::fabs(weights[term]) * 8;
        }
        const std::int64_t valid_words = valid_s == nullptr ? c.words_s : std::count(valid_s, valid_s + c.words_s, 1);
        Doubles du(c.pixels * c.words_s);
        oracle(c, s, t, part(mask, c.pixels), valid_words, weights, want, du);
        for (int term = 0; term < pixel_word::term_count; ++term) {
            const double got = loss[b * pixel_word::term_count + term];
            expect(near(got, want[term], loose, loose), where + std::to_string(b) + ": loss " + std::to_string(term) +
                                                            " " + std::to_string(got) + ", not " +
                                                            std::to_string(want[term]));
        }
        // dV and dL from du, and the largest magnitudes in their sums.
        bool right = true;
        const double scale = c.scale(c.width_s);
        Doubles dl(c.words_s * c.width_s);
        for (std::int64_t p = 0; p < c.pixels; ++p) {
            Doubles dv(c.columns_s());
            for (std::int64_t w = 0; w < c.words_s; ++w) {
                const double dm = scale * du[p * c.words_s + w];
                for (std::int64_t d = 0; d < c.width_s; ++d) {
                    dv[d] += dm * l_s[w * c.width_s + d] / s.word_norms[w];
                    dl[w * c.width_s + d] += dm * v_s[p * c.width_s + d] / s.pixel_norms[p];
                }
                dv[w % c.columns_s()] += c.features() ? 0 : dm;
            }
            const bool valid = part(mask, c.pixels) == nullptr || part(mask, c.pixels)[p] != 0;
            unscale(dv.data(), v_s + p * c.width_s, c.width_s, s.pixel_norms[p], c.cosine);
            const double bound = (valid ? 4 * size * scale : 0) / (s.pixel_norms[p] < 1e-9 ? 1 : s.pixel_norms[p]);
            for (std::int64_t d = 0; d < c.columns_s() && c.for_pixels; ++d) {
                const double got = to_double(to[b * c.grad.stride_batch + (maps ? d * step + p : p * step + d)]);
                right = right && near(got, dv[d], 2 * rounding<S>, smallest<S> + loose * bound);
            }
        }
        expect(right, where + std::to_string(b) + ": gradient of the pixels");
        right = true;
        for (std::int64_t w = 0; w < c.words_s && c.for_words; ++w) {
            unscale(&dl[w * c.width_s], &l_s[w * c.width_s], c.width_s, s.word_norms[w], c.cosine);
            const double bound = 16 * size * scale * static_cast<double>(c.words_s) / s.word_norms[w];
            for (std::int64_t d = 0; d < c.width_s; ++d) {
                const double got = grad_words[(b * c.words_s + w) * c.width_s + d];
                right = right && near(got, dl[w * c.width_s + d], 2 * rounding<T>, loose * bound);
            }
        }
        expect(right, where + std::to_string(b) + ": gradient of the words");
    }
    std::vector<bool> own(grad.size());
    for (std::int64_t i = 0; i < c.batch * rows * length && c.for_pixels; ++i) {
        own[c.grad.offset + i / length / rows * c.grad.stride_batch + i / length % rows * step + i % length] = true;
    }
    bool untouched = true;
    const S nothing = Buffer<S>(1)[0];
    for (std::int64_t i = 0; i < grad.size(); ++i) {
        untouched = untouched && (own[i] || std::memcmp(&grad[i], &nothing, sizeof(S)) == 0);
    }
    expect(untouched, where + "any: the gaps between the gradient's rows were written");
}

template <class S>
void shapes(int offset) {
    constexpr int some_terms[] = {15, 4, 1, 2, 8, 12, 3, 6};
    int turn = offset; // cycles through options instead of a full product
    int shape = 0;
    for (const std::int64_t pixels : {1, 15, 16, 17, 64, 65, 129, 300, 512}) { // around panel sizes, and several chunks
        for (const std::int64_t width : {0, 1, 3, 16, 33, 260}) {
            for (const std::int64_t words : {1, 5, 20, 33}) {
                if (shape++ % shape_stride != 0) {
                    continue;
                }
                ++turn;
                if (turn % 3 != 0 && pixels * words > 3000) {
                    continue;
                }
                Case c{};
                c.batch = pixels > 200 ? 2 : 1 + turn % 3;
                c.pixels = pixels;
                c.terms = some_terms[turn % 8];
                c.words_s = words;
                c.words_t = c.terms == pixel_word::pixel_pixel ? words + turn % 4 : words;
                c.width_s = width;
                c.width_t = width == 0 ? 0 : (turn % 4 == 2 ? width + 3 : width);
                c.cosine = width > 0 && turn / 2 % 3 == 0;
                c.maps_s = turn / 3 % 2 == 0;
                c.maps_t = turn / 5 % 2 == 0;
                c.masked_pixels = turn / 7 % 3 == 0;
                c.masked_words = turn / 2 % 3 == 1;
                c.temperature = turn % 5 == 0 ? 0.3 : 1.0;
                c.threads = thread_counts[turn / 4 % 4];
                c.tight = turn % 4 == 1;
                c.bf16_words = sizeof(S) == 2 && turn % 7 < 5;
                c.for_words = width > 0 && turn % 5 != 1;
                c.for_pixels = !c.for_words || turn % 5 != 2;
                const auto of = [&](bool maps, std::int64_t columns) {
                    return maps ? layouts(c.batch, columns, pixels) : layouts(c.batch, pixels, columns);
                };
                c.student = of(c.maps_s, c.columns_s())[turn % 5];
                c.teacher = of(c.maps_t, c.columns_t())[turn * 2 % 5];
                const bool maps = c.maps_s && c.student.stride_row != 1; // a map of one pixel is a row
                c.grad = of(maps, c.columns_s())[maps && pixels == 1 ? 1 : turn % 3];
                compare<S>(c);
            }
        }
    }
}

void run() {
    shapes<float>(0);
    shapes<BFloat16>(3);
    if (every_dtype) {
        shapes<double>(1);
        shapes<Half>(2);
    }
}

const Check check{"pixel_word", run};

} // namespace
} // namespace fastkd::sanitize
