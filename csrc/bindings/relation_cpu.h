// Calls of the CPU's relation kernels, one per form.
#pragma once

#include "bindings/relation.h"
#include "cpu/kernels.h"

namespace fastkd::bindings {

struct CpuRelation {
    static constexpr const char* extra = "threads";

    static int threads(const RelationCall& call) { return static_cast<int>(call.extra); }
    static cpu::RelationPlan plan(const RelationCall& call, bool backward) {
        return cpu::plan_relation(call.options, call.student_width, call.teacher_width,
                                  call.form == RelationCall::Form::stored, backward, threads(call), call.limit);
    }
    static cpu::GramPlan gram_plan(const RelationCall& call, bool backward) {
        return cpu::plan_gram(call.options, call.student_width, call.teacher_width, backward, threads(call),
                              call.limit);
    }

    static void check(const RelationCall& call) {
        if (call.extra < 1 || call.extra > 4096) {
            throw py::value_error("threads: expected 1 to 4096, got " + std::to_string(call.extra));
        }
    }
    static std::pair<std::int64_t, std::int64_t> workspace(const RelationCall& call, bool backward) {
        if (call.form == RelationCall::Form::gram) {
            const cpu::GramPlan planned = gram_plan(call, backward);
            return {planned.bytes, planned.minimum};
        }
        const cpu::RelationPlan planned = plan(call, backward);
        return {planned.bytes, planned.minimum};
    }
    static void forward(const RelationCall& call, const relation::Forward& args) {
        const cpu::Kernels& kernels = cpu::kernels();
        if (call.form == RelationCall::Form::gram) {
            kernels.relation_gram_forward(args, gram_plan(call, false), threads(call));
        } else if (call.form == RelationCall::Form::stored) {
            kernels.relation_stored_forward(args, plan(call, false), threads(call));
        } else {
            kernels.relation_streamed_forward(args, plan(call, false), threads(call));
        }
    }
    static void backward(const RelationCall& call, const relation::Backward& args) {
        const cpu::Kernels& kernels = cpu::kernels();
        if (call.form == RelationCall::Form::gram) {
            kernels.relation_gram_backward(args, gram_plan(call, true));
        } else if (call.form == RelationCall::Form::stored) {
            kernels.relation_stored_backward(args, plan(call, true));
        } else {
            kernels.relation_streamed_backward(args, plan(call, true));
        }
    }
};

} // namespace fastkd::bindings
