// What lets a thread wait for another block, of this launch or of another that runs at the same time.
#pragma once

#include "memory.h"
#include "scheduling.h"

EXPORT void emulation_run(Launch* launch);

namespace {

// Blocks that wait for each other must all be resident: the next one gets an OS thread of its own.
void start_next_block(Launch& launch) {
    const uint64_t blocks = static_cast<uint64_t>(launch.grid[0]) * launch.grid[1] * launch.grid[2];
    if (launch.next_block.load() >= blocks) return;
    const std::lock_guard<std::mutex> guard(launch.more_lock);
    if (launch.more.size() < blocks) launch.more.emplace_back(emulation_run, &launch);
}

// The threads of `start_next_block`: they may start more before they end.
void join_more(Launch& launch) {
    while (true) {
        std::vector<std::thread> threads;
        {
            const std::lock_guard<std::mutex> guard(launch.more_lock);
            threads.swap(launch.more);
        }
        if (threads.empty()) return;
        for (std::thread& thread : threads) thread.join();
    }
}

// Others go first: the other threads of the block, and other blocks.
void yield(Worker& w) {
    constexpr uint32_t PATIENCE = 63;
    if ((++w.yields & PATIENCE) == 0) {
        start_next_block(*w.launch);
        refuel(w);
        const timespec pause{0, 20000};
        nanosleep(&pause, nullptr);
    }
    const Fiber& fiber = *w.current;
    // The lane after this one is next.
    w.warps[fiber.warp()].rotation = (fiber.lane() + 1) % LANES;
    make_ready(w, fiber.warp(), 1u << fiber.lane());
    reschedule(w);
}

}  // namespace

EXPORT Words emulation_load_awaited(const void* global) {
    const uintptr_t site = CALLER;
    Worker& w = *worker;
    aligned(w, reinterpret_cast<uintptr_t>(global), 16, "a load", site);
    check<Access::Read>(global, 16, site);
    yield(w);
    Words words{};
    for (int i = 0; i < 4; ++i) words.r[i] = __atomic_load_n(static_cast<const uint32_t*>(global) + i, __ATOMIC_RELAXED);
    return words;
}

EXPORT void emulation_store_awaited(void* global, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    const uintptr_t site = CALLER;
    aligned(*worker, reinterpret_cast<uintptr_t>(global), 16, "a store", site);
    check<Access::Write>(global, 16, site);
    const uint32_t words[4] = {x, y, z, w};
    for (int i = 0; i < 4; ++i) {
        // Words arrive one by one, and others see it.
        yield(*worker);
        __atomic_store_n(static_cast<uint32_t*>(global) + i, words[i], __ATOMIC_RELAXED);
    }
}

EXPORT uint32_t emulation_load_acquire(const uint32_t* global) {
    const uintptr_t site = CALLER;
    Worker& w = *worker;
    aligned(w, reinterpret_cast<uintptr_t>(global), sizeof *global, "a load", site);
    check<Access::Read>(global, sizeof *global, site);
    yield(w);
    return __atomic_load_n(global, __ATOMIC_ACQUIRE);
}

EXPORT void emulation_store_release(uint32_t* global, uint32_t value) {
    const uintptr_t site = CALLER;
    Worker& w = *worker;
    aligned(w, reinterpret_cast<uintptr_t>(global), sizeof *global, "a store", site);
    check<Access::Write>(global, sizeof *global, site);
    __atomic_store_n(global, value, __ATOMIC_RELEASE);
}

EXPORT uint64_t emulation_nanoseconds() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<uint64_t>(time.tv_sec) * 1000000000u + static_cast<uint64_t>(time.tv_nsec);
}
