// What a launch, a worker (an OS thread with one block at a time) and a fiber (a thread of the block) are.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include <atomic>
#include <mutex>
#include <thread>
#include <vector>

#include "../codes.h"

#define EXPORT extern "C" __attribute__((visibility("default")))
#define CALLER reinterpret_cast<uintptr_t>(__builtin_return_address(0))

namespace {

using namespace emulation;

constexpr uint32_t MAX_THREADS = 1024, LANES = 32, MAX_WARPS = MAX_THREADS / LANES, BARRIERS = 16;
constexpr size_t STACK_BYTES = 256 << 10, MAX_SHARED = 256 << 10;
// Loads and stores of a worker between two looks at the clock.
constexpr uint32_t FUEL = 1 << 20;
// Switches, less one, after which another warp goes on though this one could.
constexpr uint32_t WANDER = 511;
constexpr size_t MESSAGE_BYTES = 4096;

// A collective is known by its kind; every lane must bring the same.
enum Kind : uint8_t {
    SYNCWARP,
    SHUFFLES,
    VOTES = SHUFFLES + NUM_SHUFFLES,
    MATCH = VOTES + NUM_VOTES,
    LDMATRIX,
    MOVMATRIX = LDMATRIX + 4,
    MMA_BF16,
    MMA_F16
};
const char* const COLLECTIVES[] = {"__syncwarp",
                                   "__shfl_sync",
                                   "__shfl_up_sync",
                                   "__shfl_down_sync",
                                   "__shfl_xor_sync",
                                   "__ballot_sync",
                                   "__any_sync",
                                   "__all_sync",
                                   "__reduce_add_sync",
                                   "__reduce_min_sync",
                                   "__reduce_max_sync",
                                   "__reduce_min_sync",
                                   "__reduce_max_sync",
                                   "__reduce_or_sync",
                                   "__reduce_and_sync",
                                   "__reduce_xor_sync",
                                   "__match_any_sync",
                                   "ldmatrix_x2",
                                   "ldmatrix_x2_trans",
                                   "ldmatrix_x4",
                                   "ldmatrix_x4_trans",
                                   "movmatrix_trans",
                                   "mma_bf16",
                                   "mma_f16"};
const char* const BARRIER_NAMES[] = {"__syncthreads", "__syncthreads_or", "__syncthreads_and", "__syncthreads_count", "named_barrier"};

struct Allocation {
    const char* name;
    uintptr_t base;
    uint64_t bytes;
};

struct Launch {
    void (*entry)(void**);
    void** args;
    const Allocation* allocations;
    uint32_t num_allocations;
    uint32_t grid[3];
    uint32_t threads;
    uint32_t shared_bytes;
    uint64_t seed;
    uint64_t seconds;
    std::atomic<uint64_t> next_block;
    std::atomic<uint32_t> failed;
    std::atomic<uint32_t> reported;
    uintptr_t image, image_end;
    double deadline;
    std::mutex more_lock;
    std::vector<std::thread> more;
    char message[MESSAGE_BYTES];
};

struct Copy {
    uintptr_t source;
    uint32_t target;
    uint16_t bytes;
    bool zeros;
};

enum class State : uint8_t { Ready, Collective, Barrier, Done };

struct Fiber {
    void* stack_pointer;
    uintptr_t stack_low;
    uintptr_t site;
    uint32_t index;
    State state;
    uint8_t kind;
    uint8_t barrier;
    uint32_t mask;
    // A collective's operands and results.
    union {
        struct {
            uint64_t value;
            int32_t argument, width;
        };
        struct {
            float c[4];
            uint32_t a[4], b[2];
        };
        struct {
            uintptr_t row;
            uint32_t words[4];
        };
    };
    int32_t barrier_result;
    std::vector<Copy> copies;
    std::vector<uint32_t> groups;
    uint32_t delivered, retired;
    uint32_t warp() const { return index / LANES; }
    uint32_t lane() const { return index % LANES; }
};

struct Pending {
    uint32_t mask, arrived;
    uint8_t kind;
};

struct Warp {
    uint32_t present, ready, at_barrier;
    uint32_t rotation;
    uint32_t num_pending;
    Pending pending[LANES];
};

struct Barrier {
    uint32_t arrived, expected, sum;
    uint8_t kind;
    uint32_t first;
    uint32_t lanes[MAX_WARPS];
};

// When and by whom a byte of shared memory was accessed last: the warp's clock, flags, the thread.
using Stamp = uint32_t;
// Both flags: several threads updated it atomically, the last one is named.
constexpr Stamp ATOMIC = 1 << 11, UNDER_WAY = 1 << 10, SEVERAL = ATOMIC | UNDER_WAY;
constexpr uint32_t TIME_SHIFT = 12, MAX_TIME = 1 << 20;

struct Worker {
    uintptr_t stack_low;
    uintptr_t shared_base;
    uint32_t shared_bytes;
    uint32_t fuel;
    Allocation recent;
    Stamp now;
    uint32_t thread;
    const uint32_t* clock;
    Stamp *writers, *readers, *other_readers;
    uint32_t *writer_sites, *reader_sites;

    Launch* launch;
    Fiber* current;
    void* main_stack;
    uint32_t warp;
    uint32_t ready_warps;
    uint32_t num_warps, running;
    uint32_t block[3];
    uint64_t random;
    uint32_t turns, wander, dawdled, yields;
    uint32_t shared_used;
    Warp warps[MAX_WARPS];
    Barrier barriers[BARRIERS];
    // clocks[w][v]: what warp w knows of warp v's clock; an access by v at time t is over for w once clocks[w][v] > t.
    uint32_t clocks[MAX_WARPS][MAX_WARPS];
    Fiber fibers[MAX_THREADS];
    uint32_t num_fibers;
};

__thread Worker* worker __attribute__((tls_model("initial-exec")));

double seconds_now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

uint32_t random_bits(Worker& w) {
    w.random ^= w.random << 13;
    w.random ^= w.random >> 7;
    w.random ^= w.random << 17;
    return static_cast<uint32_t>(w.random >> 20);
}

}  // namespace
