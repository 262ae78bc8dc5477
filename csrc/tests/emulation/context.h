// Switching between stacks within one host thread. Include only in engine.cpp: it defines a symbol.
#pragma once

#include <cstddef>
#include <cstring>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fastkd::emulation {

constexpr std::size_t stack_bytes = 512 * 1024; // address space; pages are allocated on first access

#if defined(__x86_64__)
// ucontext saves the signal mask with a system call at every switch, which takes twenty times as long.
extern "C" void fastkd_emulation_switch(void** save, void* to);
asm(R"(
    .text
    .globl fastkd_emulation_switch
    .type fastkd_emulation_switch, @function
fastkd_emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size fastkd_emulation_switch, .-fastkd_emulation_switch
)");

struct Context {
    void* stack_pointer = nullptr;
    void prepare(char* stack, void (*entry)()) {
        auto** top = reinterpret_cast<void**>(stack + stack_bytes) - 1; // the entry sees the stack of a called function
        *top = nullptr;
        *--top = reinterpret_cast<void*>(entry);
        stack_pointer = top - 6;
        std::memset(stack_pointer, 0, 6 * sizeof(void*));
    }
    static void change(Context& from, Context& to) { fastkd_emulation_switch(&from.stack_pointer, to.stack_pointer); }
};
#else
struct Context {
    ucontext_t context;
    void prepare(char* stack, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = stack_bytes;
        makecontext(&context, entry, 0);
    }
    static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

} // namespace fastkd::emulation
