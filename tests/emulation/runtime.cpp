// The emulator's runtime: a block's threads are fibers of one OS thread, so that every switch between them is a known place; blocks run
// in parallel. The compiler calls `__tsan_*` in front of every load and store of a kernel (-fsanitize=thread, without that library), and
// `__ubsan_*` where one would be misaligned, an index outside its array, or integer arithmetic undefined.
//
// A violation ends the launch with a message, before the access: fibers are left where they are.
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include "runtime/barriers.h"
#include "runtime/collectives.h"
#include "runtime/copies.h"
#include "runtime/hooks.h"
#include "runtime/instructions.h"
#include "runtime/waiting.h"

namespace {

std::mutex idle_lock;
std::vector<Worker*> idle;

void* map(size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? nullptr : memory;
}

Worker* take_worker() {
    {
        const std::lock_guard<std::mutex> guard(idle_lock);
        if (!idle.empty()) {
            Worker* w = idle.back();
            idle.pop_back();
            return w;
        }
    }
    auto* w = new Worker{};
    w->shared_base = reinterpret_cast<uintptr_t>(map(3 * MAX_SHARED)) + MAX_SHARED;
    Stamp** stamps[] = {&w->writers, &w->readers, &w->other_readers};
    for (Stamp** shadow : stamps) *shadow = static_cast<Stamp*>(map(MAX_SHARED * sizeof(Stamp)));
    w->writer_sites = static_cast<uint32_t*>(map(MAX_SHARED));
    w->reader_sites = static_cast<uint32_t*>(map(MAX_SHARED));
    return w;
}

// Stacks for whole warps; what runs off the lowest one of a warp hits a page that is not there.
bool add_stacks(Worker& w, uint32_t threads) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    while (w.num_fibers < threads) {
        void* memory = map(LANES * STACK_BYTES + page);
        if (memory == nullptr || mprotect(memory, page, PROT_NONE) != 0) return false;
        for (uint32_t lane = 0; lane < LANES; ++lane, ++w.num_fibers) {
            w.fibers[w.num_fibers].stack_low = reinterpret_cast<uintptr_t>(memory) + page + lane * STACK_BYTES;
            w.fibers[w.num_fibers].index = w.num_fibers;
        }
    }
    return true;
}

bool stacks_sufficed(const Worker& w, uint32_t threads) {
    for (uint32_t thread = 0; thread < threads; ++thread)
        if (*reinterpret_cast<const uint64_t*>(w.fibers[thread].stack_low) != 0) return false;
    return true;
}

void give_up(Launch& launch, const char* message) {
    if (launch.reported.exchange(1) == 0) snprintf(launch.message, MESSAGE_BYTES, "%s", message);
    launch.failed.store(1);
}

void run_block(Worker& w, uint64_t block) {
    const Launch& launch = *w.launch;
    w.block[0] = static_cast<uint32_t>(block % launch.grid[0]);
    w.block[1] = static_cast<uint32_t>(block / launch.grid[0] % launch.grid[1]);
    w.block[2] = static_cast<uint32_t>(block / launch.grid[0] / launch.grid[1]);
    w.random = (launch.seed + 1) * 0x9e3779b97f4a7c15u ^ (block + 1) * 0xd1342543de82ef95u;
    if (w.random == 0) w.random = 1;
    memset(reinterpret_cast<void*>(w.shared_base), 0xff, w.shared_bytes);
    const size_t padded = (w.shared_bytes + 15) & ~size_t{15};
    for (Stamp* shadow : {w.writers, w.readers, w.other_readers}) memset(shadow, 0, padded * sizeof(Stamp));
    memset(w.barriers, 0, sizeof w.barriers);
    w.num_warps = (launch.threads + LANES - 1) / LANES;
    w.running = launch.threads;
    w.ready_warps = 0;
    w.dawdled = 0;
    for (uint32_t index = 0; index < w.num_warps; ++index) {
        Warp& warp = w.warps[index];
        const uint32_t lanes = launch.threads - index * LANES;
        warp.present = lanes >= LANES ? ~0u : (1u << lanes) - 1;
        warp.ready = warp.present;
        warp.at_barrier = warp.num_pending = 0;
        warp.rotation = random_bits(w) & 31;
        w.ready_warps |= 1u << index;
        memset(w.clocks[index], 0, sizeof w.clocks[index]);
        w.clocks[index][index] = 1;
    }
    for (uint32_t thread = 0; thread < launch.threads; ++thread) {
        Fiber& fiber = w.fibers[thread];
        fiber.state = State::Ready;
        fiber.site = 0;
        fiber.copies.clear();
        fiber.groups.clear();
        fiber.delivered = fiber.retired = 0;
        // Not all stacks at the same place of the cache.
        fiber.stack_pointer = first_frame(fiber.stack_low + STACK_BYTES - 64 - thread * 11 % 64 * 64);
    }
    w.warp = random_bits(w) % w.num_warps;
    Warp& warp = w.warps[w.warp];
    const uint32_t lane = __builtin_ctz(warp.ready);
    warp.ready &= ~(1u << lane);
    resume(w, w.fibers[w.warp * LANES + lane], &w.main_stack);
}

struct Image {
    uintptr_t inside, low, high;
};

int find_image(dl_phdr_info* info, size_t, void* data) {
    auto& image = *static_cast<Image*>(data);
    uintptr_t low = ~uintptr_t{0}, high = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& header = info->dlpi_phdr[i];
        if (header.p_type != PT_LOAD) continue;
        const uintptr_t start = info->dlpi_addr + header.p_vaddr, end = start + header.p_memsz;
        low = start < low ? start : low;
        high = end > high ? end : high;
    }
    if (image.inside < low || image.inside >= high) return 0;
    image.low = low;
    image.high = high;
    return 1;
}

}  // namespace

EXPORT void* emulation_map(size_t bytes) { return map(bytes); }
EXPORT void emulation_unmap(void* memory, size_t bytes) { munmap(memory, bytes); }

// Prepares a launch; `allocations` and `args` must outlive it.
EXPORT Launch* emulation_launch(void (*entry)(void**), void** args, const Allocation* allocations, uint32_t num_allocations,
                                const uint32_t* grid, uint32_t threads, uint32_t shared_bytes, uint64_t seed, uint64_t seconds) {
    if (threads == 0 || threads > MAX_THREADS || shared_bytes > MAX_SHARED) return nullptr;
    auto* launch = new Launch{};
    launch->entry = entry;
    launch->args = args;
    launch->allocations = allocations;
    launch->num_allocations = num_allocations;
    memcpy(launch->grid, grid, sizeof launch->grid);
    launch->threads = threads;
    launch->shared_bytes = shared_bytes;
    launch->seed = seed;
    launch->seconds = seconds;
    launch->deadline = seconds_now() + static_cast<double>(seconds);
    Image image{reinterpret_cast<uintptr_t>(entry), 0, 0};
    dl_iterate_phdr(find_image, &image);
    launch->image = image.low;
    launch->image_end = image.high;
    return launch;
}

// Runs blocks until none is left or one failed; any number of OS threads may do so at once.
EXPORT void emulation_run(Launch* launch) {
    Worker* w = take_worker();
    const uint64_t blocks = static_cast<uint64_t>(launch->grid[0]) * launch->grid[1] * launch->grid[2];
    w->launch = launch;
    w->shared_bytes = launch->shared_bytes;
    w->fuel = FUEL;
    w->recent = {};
    worker = w;
    if (!add_stacks(*w, launch->threads)) give_up(*launch, "no memory for the stacks of a block");
    while (launch->failed.load() == 0) {
        const uint64_t block = launch->next_block.fetch_add(1);
        if (block >= blocks) break;
        run_block(*w, block);
    }
    if (!stacks_sufficed(*w, launch->threads)) give_up(*launch, "the local variables of a thread are too large for the emulator");
    worker = nullptr;
    const std::lock_guard<std::mutex> guard(idle_lock);
    idle.push_back(w);
}

// Waits until all blocks that were started are through. Every thread has left `emulation_run`.
EXPORT void emulation_join(Launch* launch) { join_more(*launch); }

// The message of a launch that failed, or null. Valid until the launch is freed.
EXPORT const char* emulation_message(const Launch* launch) { return launch->failed.load() != 0 ? launch->message : nullptr; }

EXPORT void emulation_free_launch(Launch* launch) { delete launch; }
