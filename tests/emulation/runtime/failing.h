// How a launch ends early.
#pragma once

#include <stdarg.h>
#include <stdio.h>

#include "stacks.h"

namespace {

// A place in the kernel, for the device to find the source line of.
struct Place {
    char text[32];
    Place(const Worker& w, uintptr_t site) {
        if (site == 0)
            snprintf(text, sizeof text, "?");
        else
            snprintf(text, sizeof text, "{%lx}", static_cast<unsigned long>(site - 1 - w.launch->image));
    }
};

[[noreturn]] void leave(Worker& w) {
    void* unused;
    emulation_switch(&unused, w.main_stack);
    __builtin_unreachable();
}

[[noreturn]] __attribute__((format(printf, 4, 5), cold, noinline)) void
fail(Worker& w, uint32_t thread, uintptr_t site, const char* format, ...) {
    Launch& launch = *w.launch;
    if (launch.reported.exchange(1) == 0) {
        char* at = launch.message;
        char* end = launch.message + MESSAGE_BYTES;
        at += snprintf(at, end - at, "block (%u, %u, %u)", w.block[0], w.block[1], w.block[2]);
        if (thread != ~0u) at += snprintf(at, end - at, ", thread %u (warp %u, lane %u)", thread, thread / LANES, thread % LANES);
        if (site != 0) at += snprintf(at, end - at, " at %s", Place(w, site).text);
        at += snprintf(at, end - at, ": ");
        va_list list;
        va_start(list, format);
        vsnprintf(at, end - at, format, list);
        va_end(list);
    }
    launch.failed.store(1);
    leave(w);
}

__attribute__((cold, noinline)) void refuel(Worker& w) {
    w.fuel = FUEL;
    if (w.launch->failed.load(std::memory_order_relaxed) != 0) leave(w);
    if (seconds_now() > w.launch->deadline)
        fail(w, w.thread, 0, "the kernel has not ended after %lu s", static_cast<unsigned long>(w.launch->seconds));
}

}  // namespace
