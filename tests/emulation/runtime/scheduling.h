// Which fiber runs next, and what it means that none can.
#pragma once

#include "memory.h"

namespace {

void where_is(const Worker& w, const Fiber& fiber, char* text, size_t size) {
    const Place place(w, fiber.site);
    switch (fiber.state) {
        case State::Ready: snprintf(text, size, "is running"); break;
        case State::Done: snprintf(text, size, "has returned"); break;
        case State::Collective:
            snprintf(text, size, "waits in %s(mask %#x) at %s", COLLECTIVES[fiber.kind], fiber.mask, place.text);
            break;
        case State::Barrier: {
            const Barrier& barrier = w.barriers[fiber.barrier];
            if (barrier.kind == NAMED_BARRIER)
                snprintf(text, size, "waits at named_barrier(%u, %u) at %s", fiber.barrier, barrier.expected, place.text);
            else
                snprintf(text, size, "waits at %s at %s", BARRIER_NAMES[barrier.kind], place.text);
        }
    }
}

// No lane of the warp can go on: fine at a barrier that all of them reached.
void check_warp(Worker& w, uint32_t index) {
    Warp& warp = w.warps[index];
    if (warp.num_pending > 0) {
        const Pending& pending = warp.pending[0];
        const uint32_t lane = __builtin_ctz(pending.arrived), missing = __builtin_ctz(pending.mask & ~pending.arrived);
        const Fiber& waiting = w.fibers[index * LANES + lane];
        char text[160] = "does not exist";
        if (warp.present >> missing & 1) where_is(w, w.fibers[index * LANES + missing], text, sizeof text);
        fail(w, waiting.index, waiting.site, "%s(mask %#x) is not reached by all its lanes: lane %u %s", COLLECTIVES[waiting.kind],
             waiting.mask, missing, text);
    }
    if (warp.at_barrier == 0) return;
    const Fiber& first = w.fibers[index * LANES + __builtin_ctz(warp.at_barrier)];
    for (uint32_t lane = 0; lane < LANES; ++lane) {
        if ((warp.present >> lane & 1) == 0) continue;
        const Fiber& fiber = w.fibers[index * LANES + lane];
        if (fiber.state == State::Barrier && fiber.barrier == first.barrier) continue;
        char here[160], there[160];
        where_is(w, first, here, sizeof here);
        where_is(w, fiber, there, sizeof there);
        fail(w, first.index, 0, "a barrier is not reached by the whole warp: lane %u %s, lane %u %s", first.lane(), here, lane, there);
    }
}

[[noreturn]] void deadlock(Worker& w) {
    char text[MESSAGE_BYTES / 2];
    char* at = text;
    char* end = text + sizeof text;
    uint32_t waiting = ~0u;
    for (uint32_t index = 0; index < w.num_warps; ++index) {
        char here[160];
        const Fiber& fiber = w.fibers[index * LANES];
        where_is(w, fiber, here, sizeof here);
        if (waiting == ~0u && fiber.state == State::Barrier) waiting = fiber.index;
        if (end - at > 200) at += snprintf(at, end - at, "%swarp %u %s", index == 0 ? "" : ", ", index, here);
    }
    fail(w, ~0u, 0, "a barrier is not reached by all its threads: %s", text);
}

// Runs another fiber. The current one has noted what it waits for.
void reschedule(Worker& w) {
    Fiber& from = *w.current;
    if (w.launch->failed.load(std::memory_order_relaxed) != 0) leave(w);
    uint32_t index = w.warp;
    Warp* warp = &w.warps[index];
    const bool wander = (++w.turns & WANDER) == w.wander;
    if (warp->ready == 0) {
        check_warp(w, index);
        w.ready_warps &= ~(1u << index);
    }
    if (warp->ready == 0 || wander) {
        if (w.ready_warps == 0) {
            if (w.running == 0) leave(w);
            deadlock(w);
        }
        w.wander = random_bits(w) & WANDER;
        const uint32_t rotation = random_bits(w) & 31;
        const uint32_t turned = w.ready_warps >> rotation | (rotation == 0 ? 0 : w.ready_warps << (32 - rotation));
        index = (__builtin_ctz(turned) + rotation) & 31;
        w.warp = index;
        warp = &w.warps[index];
    }
    const uint32_t rotation = warp->rotation;
    const uint32_t turned = warp->ready >> rotation | (rotation == 0 ? 0 : warp->ready << (32 - rotation));
    const uint32_t lane = (__builtin_ctz(turned) + rotation) & 31;
    warp->ready &= ~(1u << lane);
    Fiber& to = w.fibers[index * LANES + lane];
    if (&to == &from)
        settle(w, to);
    else
        resume(w, to, &from.stack_pointer);
}

void make_ready(Worker& w, uint32_t warp, uint32_t lanes) {
    w.warps[warp].ready |= lanes;
    w.ready_warps |= 1u << warp;
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) w.fibers[warp * LANES + __builtin_ctz(rest)].state = State::Ready;
}

void run_fiber() {
    Worker& w = *worker;
    w.launch->entry(w.launch->args);
    Fiber& fiber = *w.current;
    fiber.state = State::Done;
    --w.running;
    reschedule(w);
    __builtin_unreachable();
}

void tick(Worker& w, uint32_t warp) {
    if (++w.clocks[warp][warp] >= MAX_TIME) fail(w, w.thread, 0, "more barriers in one block than the emulator counts");
}

void refresh(Worker& w) { w.now = w.clock[w.current->warp()] << TIME_SHIFT | w.thread; }

}  // namespace
