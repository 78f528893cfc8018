// Barriers of the block.
#pragma once

#include "scheduling.h"

namespace {

void open(Worker& w, Barrier& barrier) {
    uint32_t latest[MAX_WARPS] = {};
    for (uint32_t warp = 0; warp < w.num_warps; ++warp) {
        if (barrier.lanes[warp] == 0) continue;
        tick(w, warp);
        for (uint32_t other = 0; other < w.num_warps; ++other)
            latest[other] = w.clocks[warp][other] > latest[other] ? w.clocks[warp][other] : latest[other];
    }
    int result = 0;
    if (barrier.kind == SYNCTHREADS_OR) result = barrier.sum != 0;
    if (barrier.kind == SYNCTHREADS_AND) result = barrier.sum == barrier.expected;
    if (barrier.kind == SYNCTHREADS_COUNT) result = static_cast<int>(barrier.sum);
    for (uint32_t warp = 0; warp < w.num_warps; ++warp) {
        const uint32_t lanes = barrier.lanes[warp];
        if (lanes == 0) continue;
        memcpy(w.clocks[warp], latest, sizeof latest);
        w.warps[warp].at_barrier &= ~lanes;
        w.warps[warp].rotation = random_bits(w) & 31;
        for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) w.fibers[warp * LANES + __builtin_ctz(rest)].barrier_result = result;
        make_ready(w, warp, lanes);
        barrier.lanes[warp] = 0;
    }
    barrier.arrived = 0;
    barrier.sum = 0;
}

}  // namespace



EXPORT int emulation_barrier(int kind, int id, int threads, int predicate) {
    Worker& w = *worker;
    Fiber& fiber = *w.current;
    const uintptr_t site = CALLER;
    if (kind == NAMED_BARRIER && (id < 1 || id > 15 || threads < 32 || threads % 32 != 0 || threads > static_cast<int>(w.launch->threads)))
        fail(w, fiber.index, site, "named_barrier(%d, %d) in a block of %u threads", id, threads, w.launch->threads);
    Barrier& barrier = w.barriers[id];
    const uint32_t expected = kind == NAMED_BARRIER ? static_cast<uint32_t>(threads) : w.launch->threads;
    if (barrier.arrived == 0) {
        barrier.kind = static_cast<uint8_t>(kind);
        barrier.expected = expected;
        barrier.first = fiber.index;
    } else if (barrier.kind != kind || barrier.expected != expected) {
        char text[160];
        where_is(w, w.fibers[barrier.first], text, sizeof text);
        fail(w, fiber.index, site, "%s of %u threads, while thread %u %s", BARRIER_NAMES[kind], expected, barrier.first, text);
    }
    ++barrier.arrived;
    barrier.sum += predicate != 0;
    barrier.lanes[fiber.warp()] |= 1u << fiber.lane();
    fiber.barrier = static_cast<uint8_t>(id);
    fiber.site = site;
    fiber.state = State::Barrier;
    w.warps[fiber.warp()].at_barrier |= 1u << fiber.lane();
    if (barrier.arrived == barrier.expected) {
        // A named barrier counts warps: half of one does not count.
        for (uint32_t warp = 0; warp < w.num_warps; ++warp)
            if (barrier.lanes[warp] != 0 && barrier.lanes[warp] != w.warps[warp].present)
                fail(w, fiber.index, site, "%s: only lanes %#x of warp %u reached it", BARRIER_NAMES[kind], barrier.lanes[warp], warp);
        open(w, barrier);
    }
    reschedule(w);
    return fiber.barrier_result;
}
