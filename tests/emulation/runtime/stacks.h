// Going from one fiber to another.
#pragma once

#include "state.h"

namespace {

extern "C" void emulation_switch(void** save, void* load) __attribute__((visibility("hidden")));
[[noreturn]] void run_fiber();
extern "C" [[noreturn]] __attribute__((visibility("hidden"), used)) void emulation_fiber_main() { run_fiber(); }

#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.hidden emulation_switch
.globl emulation_switch
.type emulation_switch, @function
emulation_switch:
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
.size emulation_switch, .-emulation_switch
.section .note.GNU-stack,"",@progbits
.text
)");
void* first_frame(uintptr_t top) {
    auto* stack = reinterpret_cast<uintptr_t*>(top & ~uintptr_t{15});
    *--stack = 0;
    *--stack = reinterpret_cast<uintptr_t>(&emulation_fiber_main);
    for (int i = 0; i < 6; ++i) *--stack = 0;
    return stack;
}
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 4
.hidden emulation_switch
.globl emulation_switch
.type emulation_switch, %function
emulation_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size emulation_switch, .-emulation_switch
.section .note.GNU-stack,"",%progbits
.text
)");
void* first_frame(uintptr_t top) {
    auto* stack = reinterpret_cast<uintptr_t*>((top & ~uintptr_t{15}) - 160);
    memset(stack, 0, 160);
    stack[11] = reinterpret_cast<uintptr_t>(&emulation_fiber_main);
    return stack;
}
#else
#error "the emulator switches stacks on x86-64 and aarch64"
#endif

// Makes `fiber` the one that accesses belong to.
void settle(Worker& w, Fiber& fiber) {
    w.current = &fiber;
    w.stack_low = fiber.stack_low;
    w.thread = fiber.index;
    w.clock = w.clocks[fiber.warp()];
    w.now = w.clock[fiber.warp()] << TIME_SHIFT | fiber.index;
}

void resume(Worker& w, Fiber& fiber, void** save) {
    settle(w, fiber);
    emulation_switch(save, fiber.stack_pointer);
}

}  // namespace
