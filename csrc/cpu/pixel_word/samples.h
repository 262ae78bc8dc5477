// Arguments restricted to a group of samples, so that the workspace does not have to hold the whole batch.
#pragma once

#include "common/pixel_word.h"

namespace fastkd::pixel_word {

template <class P>
inline P* advanced(P* data, std::int64_t bytes) {
    return data == nullptr ? nullptr : reinterpret_cast<P*>(reinterpret_cast<std::uintptr_t>(data) + bytes);
}

inline void advance(Array& array, std::int64_t samples) {
    array.data = advanced(array.data, samples * array.batch * element_size(array.dtype));
}

inline void advance(Side& side, std::int64_t samples, std::int64_t size) {
    advance(side.pixels, samples);
    side.words = advanced(side.words, samples * side.word_count * side.width * size);
    side.word_mask = advanced(side.word_mask, samples * side.word_count);
}

// Restrict the arguments that forward and backward share to samples [first, first + count).
template <class Args>
Args shared_part(Args args, std::int64_t first, std::int64_t count) {
    Problem& problem = args.problem;
    const std::int64_t size = element_size(problem.dtype);
    const std::int64_t student = problem.student.word_count, teacher = problem.teacher.word_count;
    const std::int64_t words = student > teacher ? student : teacher;
    advance(problem.student, first, size);
    advance(problem.teacher, first, size);
    problem.pixel_mask = advanced(problem.pixel_mask, first * problem.pixels);
    problem.batch = count;
    args.kept.logits = advanced(args.kept.logits, first * (student + teacher) * problem.pixels * size);
    args.kept.norms = advanced(args.kept.norms, first * problem.pixels * size);
    args.kept.columns = advanced(args.kept.columns, first * 2 * words * 8);
    args.kept.grams = advanced(args.kept.grams, first * 3 * words * words * size);
    return args;
}

inline Forward part_of(const Forward& all, std::int64_t first, std::int64_t count) {
    Forward args = shared_part(all, first, count);
    args.loss = advanced(args.loss, first * term_count * element_size(args.problem.dtype));
    return args;
}

inline Backward part_of(const Backward& all, std::int64_t first, std::int64_t count) {
    Backward args = shared_part(all, first, count);
    const std::int64_t size = element_size(args.problem.dtype);
    const Side& student = args.problem.student;
    args.grad_loss = advanced(args.grad_loss, first * args.grad_loss_strides[0] * size);
    advance(args.grad_pixels, first);
    args.grad_words = advanced(args.grad_words, first * student.word_count * student.width * size);
    return args;
}

} // namespace fastkd::pixel_word
