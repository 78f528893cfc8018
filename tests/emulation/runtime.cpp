// The emulator's runtime: a block's threads are fibers of one OS thread, so that every switch between them is a known place; blocks run
// in parallel. The compiler calls `__tsan_*` in front of every load and store of a kernel (-fsanitize=thread, without that library), and
// `__ubsan_*` where one would be misaligned, an index outside its array, or integer arithmetic undefined.
//
// A violation ends the launch with a message, before the access: fibers are left where they are.
#include <dlfcn.h>
#include <link.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <mutex>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define CALLER reinterpret_cast<uintptr_t>(__builtin_return_address(0))

namespace {

constexpr uint32_t MAX_THREADS = 1024, LANES = 32, MAX_WARPS = MAX_THREADS / LANES, BARRIERS = 16;
constexpr size_t STACK_BYTES = 256 << 10, GUARD_BYTES = 64 << 10, MAX_SHARED = 256 << 10;
// Loads and stores of a worker between two looks at the clock.
constexpr uint32_t FUEL = 1 << 20;
constexpr size_t MESSAGE_BYTES = 4096;

// Order of the enums in emulation.h.
enum { SYNCTHREADS, SYNCTHREADS_OR, SYNCTHREADS_AND, SYNCTHREADS_COUNT, NAMED_BARRIER };
enum { SHFL, SHFL_UP, SHFL_DOWN, SHFL_XOR };
enum { BALLOT, ANY_LANE, ALL_LANE, REDUCE_ADD, REDUCE_MIN_U, REDUCE_MAX_U, REDUCE_MIN_I, REDUCE_MAX_I, REDUCE_OR, REDUCE_AND, REDUCE_XOR };
enum { ATOMIC_ADD, ATOMIC_OR, ATOMIC_AND, ATOMIC_XOR, ATOMIC_MIN_U, ATOMIC_MAX_U, ATOMIC_MIN_I, ATOMIC_MAX_I, ATOMIC_EXCH, ATOMIC_CAS };

// A collective is known by its kind; every lane must bring the same.
enum Kind : uint8_t {
    SYNCWARP,
    SHUFFLES,
    VOTES = SHUFFLES + 4,
    MATCH = VOTES + 11,
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
    uint32_t present, ready, done, at_barrier;
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
constexpr Stamp ATOMIC = 1 << 11, UNDER_WAY = 1 << 10;
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

// ---- Switching stacks -------------------------------------------------------------------------------------------------------------

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

// ---- Failing ----------------------------------------------------------------------------------------------------------------------

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

[[noreturn]] __attribute__((format(printf, 4, 5), cold, noinline)) void fail(Worker& w, uint32_t thread, uintptr_t site, const char* format, ...) {
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

// ---- Memory -----------------------------------------------------------------------------------------------------------------------

enum class Access { Read, Write, Atomic, Matrix, CopyIssue };

bool over(const Worker& w, Stamp stamp) { return w.clock[stamp >> 5 & (MAX_WARPS - 1)] > stamp >> TIME_SHIFT; }

const char* action(Access access) {
    switch (access) {
        case Access::Read: return "reads";
        case Access::Matrix: return "reads with ldmatrix";
        case Access::Atomic: return "updates atomically";
        case Access::CopyIssue: return "copies (cp.async) to";
        default: return "writes";
    }
}

[[noreturn]] __attribute__((cold, noinline)) void
race(Worker& w, uintptr_t site, Access access, uint32_t byte, Stamp other, bool other_wrote) {
    const uint32_t thread = other & (MAX_THREADS - 1), here = w.thread;
    const uint32_t other_site = other_wrote ? w.writer_sites[byte / 4] : w.reader_sites[byte / 4];
    const bool same_warp = thread / LANES == here / LANES;
    fail(w, here, site, "race: %s byte %u of shared memory, which thread %u %s at {%x} with no %s in between", action(access), byte, thread,
         other_wrote ? (other & ATOMIC ? "updated atomically" : "wrote") : "read", other_site,
         same_warp ? "__syncwarp or barrier" : "barrier");
}

__attribute__((cold, noinline)) void unusable(Worker& w, uintptr_t site, Access access, uint32_t byte, Stamp writer) {
    if (writer == 0)
        fail(w, w.thread, site, "%s byte %u of shared memory, which was never written", action(access), byte);
    fail(w, w.thread, site, "%s byte %u of shared memory before the wait that covers the cp.async to it by thread %u at {%x}",
         action(access), byte, writer & (MAX_THREADS - 1), w.writer_sites[byte / 4]);
}

template <typename T>
T peek(const void* address) {
    T value;
    memcpy(&value, address, sizeof value);
    return value;
}

bool uniform(const Stamp* stamps) {
    const auto low = peek<uint64_t>(stamps), high = peek<uint64_t>(stamps + 2);
    return low == high && static_cast<uint32_t>(low) == low >> 32;
}

void fill(Stamp* stamps, Stamp value, uint32_t count) {
    for (uint32_t i = 0; i < count; ++i) stamps[i] = value;
}

template <Access ACCESS>
void touch(Worker& w, uint32_t byte, uint32_t bytes, uintptr_t site) {
    constexpr bool reads = ACCESS == Access::Read || ACCESS == Access::Matrix;
    const Stamp now = w.now;
    const uint32_t end = byte + bytes, thread = w.thread;
    while (byte < end) {
        const bool whole = byte % 4 == 0 && end - byte >= 4 && uniform(w.writers + byte) && uniform(w.readers + byte) &&
                           uniform(w.other_readers + byte);
        const uint32_t step = whole ? 4 : 1;
        const Stamp writer = w.writers[byte];
        if constexpr (ACCESS != Access::Write && ACCESS != Access::CopyIssue) {
            if (writer == 0) unusable(w, site, ACCESS, byte, writer);
        }
        if (writer & UNDER_WAY) unusable(w, site, ACCESS, byte, writer);
        const bool own = ACCESS != Access::Matrix && (writer & (MAX_THREADS - 1)) == thread;
        if (writer != 0 && !own && !over(w, writer) && !(ACCESS == Access::Atomic && writer & ATOMIC))
            race(w, site, ACCESS, byte, writer, true);
        const Stamp first = w.readers[byte], second = w.other_readers[byte];
        if constexpr (reads) {
            if (first != now && second != now) {
                const bool first_over = first == 0 || (first & (MAX_THREADS - 1)) == thread || over(w, first);
                const bool second_over = second == 0 || (second & (MAX_THREADS - 1)) == thread || over(w, second);
                if (first_over) {
                    fill(w.readers + byte, now, step);
                    if (second_over && second != 0) fill(w.other_readers + byte, 0, step);
                } else if (second_over || (first & (MAX_THREADS - 1)) / LANES == thread / LANES) {
                    fill(second_over ? w.other_readers + byte : w.readers + byte, now, step);
                } else {
                    fill(w.other_readers + byte, now, step);
                }
                w.reader_sites[byte / 4] = static_cast<uint32_t>(site - 1 - w.launch->image);
            }
        } else {
            if (first != 0 && (first & (MAX_THREADS - 1)) != thread && !over(w, first)) race(w, site, ACCESS, byte, first, false);
            if (second != 0 && (second & (MAX_THREADS - 1)) != thread && !over(w, second)) race(w, site, ACCESS, byte, second, false);
            const Stamp flags = ACCESS == Access::Atomic ? ATOMIC : ACCESS == Access::CopyIssue ? UNDER_WAY : 0;
            fill(w.writers + byte, now | flags, step);
            fill(w.readers + byte, 0, step);
            fill(w.other_readers + byte, 0, step);
            w.writer_sites[byte / 4] = static_cast<uint32_t>(site - 1 - w.launch->image);
        }
        byte += step;
    }
}

// Says where `address` is, in words.
void describe(const Worker& w, uintptr_t address, char* text, size_t size) {
    const Launch& launch = *w.launch;
    const Allocation* nearest = nullptr;
    uint64_t distance = ~uint64_t{0};
    for (uint32_t i = 0; i < launch.num_allocations; ++i) {
        const Allocation& allocation = launch.allocations[i];
        const uint64_t away = address < allocation.base                     ? allocation.base - address
                              : address >= allocation.base + allocation.bytes ? address - (allocation.base + allocation.bytes)
                                                                              : 0;
        if (away < distance) nearest = &allocation, distance = away;
    }
    const uint64_t past_shared = address - (w.shared_base + w.shared_bytes), before_shared = w.shared_base - address;
    constexpr uint64_t NEAR = 1 << 30;
    if (address < 4096)
        snprintf(text, size, "a null pointer%s", address == 0 ? "" : " and a little");
    else if (past_shared < MAX_SHARED)
        snprintf(text, size, "byte %lu of the block's shared memory of %u bytes", static_cast<unsigned long>(address - w.shared_base),
                 w.shared_bytes);
    else if (before_shared < MAX_SHARED)
        snprintf(text, size, "%lu bytes before shared memory", static_cast<unsigned long>(before_shared));
    else if (nearest == nullptr || distance > NEAR)
        snprintf(text, size, "an address of no allocation");
    else if (address < nearest->base)
        snprintf(text, size, "%lu bytes before `%s` (%lu bytes)", static_cast<unsigned long>(distance), nearest->name,
                 static_cast<unsigned long>(nearest->bytes));
    else
        snprintf(text, size, "byte %lu of `%s`, which has %lu bytes", static_cast<unsigned long>(address - nearest->base), nearest->name,
                 static_cast<unsigned long>(nearest->bytes));
}

[[noreturn]] __attribute__((cold, noinline)) void outside(Worker& w, uintptr_t address, size_t bytes, Access access, uintptr_t site) {
    char where[256];
    describe(w, address, where, sizeof where);
    fail(w, w.thread, site, "out of bounds: %s %zu bytes at %s", action(access), bytes, where);
}

bool in_allocation(Worker& w, uintptr_t address, size_t bytes) {
    const uintptr_t recent = address - w.recent.base;
    if (recent < w.recent.bytes && bytes <= w.recent.bytes - recent) return true;
    const Launch& launch = *w.launch;
    for (uint32_t i = 0; i < launch.num_allocations; ++i) {
        const Allocation& allocation = launch.allocations[i];
        const uintptr_t offset = address - allocation.base;
        if (offset < allocation.bytes && bytes <= allocation.bytes - offset) {
            w.recent = allocation;
            return true;
        }
    }
    return false;
}

__attribute__((noinline)) void check_global(Worker& w, uintptr_t address, size_t bytes, Access access, uintptr_t site) {
    if (in_allocation(w, address, bytes)) return;
    // The kernel's constants.
    if (access == Access::Read && address - w.launch->image < w.launch->image_end - w.launch->image) return;
    outside(w, address, bytes, access, site);
}

template <Access ACCESS>
inline __attribute__((always_inline)) void check(const void* pointer, size_t bytes, uintptr_t site) {
    Worker& w = *worker;
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    if (address - w.stack_low < STACK_BYTES) return;
    if (--w.fuel == 0) refuel(w);
    const uintptr_t byte = address - w.shared_base;
    if (byte < w.shared_bytes) {
        if (bytes > w.shared_bytes - byte) outside(w, address, bytes, ACCESS, site);
        touch<ACCESS>(w, static_cast<uint32_t>(byte), static_cast<uint32_t>(bytes), site);
        return;
    }
    check_global(w, address, bytes, ACCESS, site);
}

void aligned(Worker& w, uintptr_t address, size_t alignment, const char* what, uintptr_t site) {
    if (address % alignment == 0) return;
    char where[256];
    describe(w, address, where, sizeof where);
    fail(w, w.thread, site, "misaligned: %s at %s is not a multiple of %zu", what, where, alignment);
}

// ---- Scheduling -------------------------------------------------------------------------------------------------------------------

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
    const bool wander = (random_bits(w) & 63) == 0;
    if (warp->ready == 0) {
        check_warp(w, index);
        w.ready_warps &= ~(1u << index);
    }
    if (warp->ready == 0 || wander) {
        if (w.ready_warps == 0) {
            if (w.running == 0) leave(w);
            deadlock(w);
        }
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
    w.warps[fiber.warp()].done |= 1u << fiber.lane();
    --w.running;
    reschedule(w);
    __builtin_unreachable();
}

void tick(Worker& w, uint32_t warp) {
    if (++w.clocks[warp][warp] >= MAX_TIME) fail(w, w.thread, 0, "more barriers in one block than the emulator counts");
}

void refresh(Worker& w) { w.now = w.clock[w.current->warp()] << TIME_SHIFT | w.thread; }

// ---- Collectives ------------------------------------------------------------------------------------------------------------------

float half_to_float(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 0) return std::copysign(std::ldexp(static_cast<float>(fraction), -24), sign ? -1.0f : 1.0f);
    const uint32_t wide = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    return peek<float>(&wide);
}

float bf16_to_float(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    return peek<float>(&wide);
}

// Exact products, added up in double, rounded once.
void multiply(Fiber* lanes, bool bf16) {
    double a[16][16], b[16][8];
    const auto widen = [bf16](uint32_t pair, int high) -> double {
        const auto bits = static_cast<uint16_t>(high ? pair >> 16 : pair);
        return bf16 ? bf16_to_float(bits) : half_to_float(bits);
    };
    for (int lane = 0; lane < 32; ++lane) {
        const Fiber& fiber = lanes[lane];
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 2; ++i) {
            a[g][2 * t + i] = widen(fiber.a[0], i);
            a[g + 8][2 * t + i] = widen(fiber.a[1], i);
            a[g][2 * t + 8 + i] = widen(fiber.a[2], i);
            a[g + 8][2 * t + 8 + i] = widen(fiber.a[3], i);
            b[2 * t + i][g] = widen(fiber.b[0], i);
            b[2 * t + 8 + i][g] = widen(fiber.b[1], i);
        }
    }
    for (int row = 0; row < 16; ++row) {
        double sum[8] = {};
        for (int k = 0; k < 16; ++k)
            for (int column = 0; column < 8; ++column) sum[column] += a[row][k] * b[k][column];
        for (int column = 0; column < 8; ++column) {
            float& c = lanes[row % 8 * 4 + column / 2].c[row / 8 * 2 + column % 2];
            c = static_cast<float>(static_cast<double>(c) + sum[column]);
        }
    }
}

// Lane l's word of an 8x8 matrix whose rows are given; transposed or not.
uint32_t fragment(const uint16_t (&matrix)[8][8], uint32_t lane, bool transposed) {
    const uint32_t g = lane / 4, t = 2 * (lane % 4);
    const uint32_t low = transposed ? matrix[t][g] : matrix[g][t], high = transposed ? matrix[t + 1][g] : matrix[g][t + 1];
    return low | high << 16;
}

void load_matrices(Worker& w, Fiber* lanes, uint32_t count, bool transposed) {
    const uint32_t here = w.thread;
    for (uint32_t matrix = 0; matrix < count; ++matrix) {
        uint16_t rows[8][8];
        for (uint32_t row = 0; row < 8; ++row) {
            const Fiber& lane = lanes[matrix * 8 + row];
            w.thread = lane.index;
            w.now = w.clock[lane.warp()] << TIME_SHIFT | lane.index;
            aligned(w, lane.row, 16, "the row of an ldmatrix", lane.site);
            const uintptr_t byte = lane.row - w.shared_base;
            if (byte >= w.shared_bytes || w.shared_bytes - byte < 16) outside(w, lane.row, 16, Access::Matrix, lane.site);
            touch<Access::Matrix>(w, static_cast<uint32_t>(byte), 16, lane.site);
            memcpy(rows[row], reinterpret_cast<const void*>(lane.row), 16);
        }
        for (uint32_t lane = 0; lane < LANES; ++lane) lanes[lane].words[matrix] = fragment(rows, lane, transposed);
    }
    w.thread = here;
    refresh(w);
}

void shuffle(Worker& w, Fiber* lanes, int kind, uint32_t mask) {
    uint64_t values[LANES];
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) values[__builtin_ctz(rest)] = lanes[__builtin_ctz(rest)].value;
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest), width = lanes[lane].width, first = lane & ~(width - 1), last = first + width - 1;
        if (width < 1 || width > 32 || (width & (width - 1)) != 0)
            fail(w, lanes[lane].index, lanes[lane].site, "%s with width %d", COLLECTIVES[SHUFFLES + kind], width);
        const int argument = lanes[lane].argument;
        int source = lane;
        if (kind == SHFL) source = first + (argument & (width - 1));
        if (kind == SHFL_UP) source = argument >= 0 && lane - argument >= first ? lane - argument : lane;
        if (kind == SHFL_DOWN) source = argument >= 0 && lane + argument <= last ? lane + argument : lane;
        if (kind == SHFL_XOR) source = (lane ^ argument) <= last && (lane ^ argument) >= 0 ? lane ^ argument : lane;
        if ((mask >> source & 1) == 0)
            fail(w, lanes[lane].index, lanes[lane].site, "%s reads lane %d, which is not in its mask %#x", COLLECTIVES[SHUFFLES + kind],
                 source, mask);
        lanes[lane].value = values[source];
    }
}

void vote(Fiber* lanes, int kind, uint32_t mask) {
    uint32_t out = kind == ALL_LANE ? 1 : static_cast<uint32_t>(lanes[__builtin_ctz(mask)].value);
    if (kind == BALLOT || kind == ANY_LANE || kind == REDUCE_ADD || kind == REDUCE_XOR) out = 0;
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
        const uint32_t lane = __builtin_ctz(rest);
        const auto value = static_cast<uint32_t>(lanes[lane].value);
        switch (kind) {
            case BALLOT: out |= value << lane; break;
            case ANY_LANE:
            case REDUCE_OR: out |= value; break;
            case ALL_LANE:
            case REDUCE_AND: out &= value; break;
            case REDUCE_ADD: out += value; break;
            case REDUCE_XOR: out ^= value; break;
            case REDUCE_MIN_U: out = value < out ? value : out; break;
            case REDUCE_MAX_U: out = value > out ? value : out; break;
            case REDUCE_MIN_I: out = static_cast<int32_t>(value) < static_cast<int32_t>(out) ? value : out; break;
            default: out = static_cast<int32_t>(value) > static_cast<int32_t>(out) ? value : out; break;
        }
    }
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) lanes[__builtin_ctz(rest)].value = out;
}

void perform(Worker& w, uint32_t warp, uint8_t kind, uint32_t mask) {
    Fiber* lanes = w.fibers + warp * LANES;
    switch (kind) {
        case SYNCWARP: tick(w, warp); break;
        case MATCH: {
            uint64_t values[LANES];
            for (uint32_t lane = 0; lane < LANES; ++lane) values[lane] = lanes[lane].value;
            for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
                uint32_t same = 0;
                for (uint32_t others = mask; others != 0; others &= others - 1)
                    if (values[__builtin_ctz(others)] == values[__builtin_ctz(rest)]) same |= others & -others;
                lanes[__builtin_ctz(rest)].value = same;
            }
            break;
        }
        case MOVMATRIX: {
            uint16_t matrix[8][8];
            for (uint32_t lane = 0; lane < LANES; ++lane) {
                const auto pair = static_cast<uint32_t>(lanes[lane].value);
                matrix[lane / 4][2 * (lane % 4)] = static_cast<uint16_t>(pair);
                matrix[lane / 4][2 * (lane % 4) + 1] = static_cast<uint16_t>(pair >> 16);
            }
            for (uint32_t lane = 0; lane < LANES; ++lane) lanes[lane].value = fragment(matrix, lane, true);
            break;
        }
        case MMA_BF16: multiply(lanes, true); break;
        case MMA_F16: multiply(lanes, false); break;
        default:
            if (kind >= LDMATRIX && kind < MOVMATRIX)
                load_matrices(w, lanes, kind - LDMATRIX < 2 ? 2 : 4, (kind - LDMATRIX) % 2 != 0);
            else if (kind >= VOTES)
                vote(lanes, kind - VOTES, mask);
            else
                shuffle(w, lanes, kind - SHUFFLES, mask);
    }
}

// Waits for the other lanes of `mask`; the last one to arrive does the work of all.
void collective(Worker& w, uint8_t kind, uint32_t mask, uintptr_t site) {
    Fiber& fiber = *w.current;
    Warp& warp = w.warps[fiber.warp()];
    const uint32_t bit = 1u << fiber.lane();
    fiber.kind = kind;
    fiber.mask = mask;
    fiber.site = site;
    if ((mask & bit) == 0) fail(w, fiber.index, site, "%s(mask %#x): the mask lacks the lane itself", COLLECTIVES[kind], mask);
    uint32_t slot = 0;
    while (slot < warp.num_pending && (warp.pending[slot].kind != kind || warp.pending[slot].mask != mask)) ++slot;
    if (slot == warp.num_pending) warp.pending[warp.num_pending++] = {mask, 0, kind};
    Pending& pending = warp.pending[slot];
    pending.arrived |= bit;
    if (pending.arrived == mask) {
        pending = warp.pending[--warp.num_pending];
        perform(w, fiber.warp(), kind, mask);
        make_ready(w, fiber.warp(), mask & ~bit);
        refresh(w);
        return;
    }
    fiber.state = State::Collective;
    reschedule(w);
}

// ---- Barriers ---------------------------------------------------------------------------------------------------------------------

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

EXPORT void emulation_syncwarp(uint32_t mask) { collective(*worker, SYNCWARP, mask, CALLER); }

EXPORT uint64_t emulation_shuffle(int kind, uint32_t mask, uint64_t value, int lane, int width) {
    Worker& w = *worker;
    Fiber& fiber = *w.current;
    fiber.value = value;
    fiber.argument = lane;
    fiber.width = width;
    collective(w, static_cast<uint8_t>(SHUFFLES + kind), mask, CALLER);
    return fiber.value;
}

EXPORT uint32_t emulation_vote(int kind, uint32_t mask, uint32_t value) {
    Worker& w = *worker;
    Fiber& fiber = *w.current;
    fiber.value = value;
    collective(w, static_cast<uint8_t>(VOTES + kind), mask, CALLER);
    return static_cast<uint32_t>(fiber.value);
}

EXPORT uint32_t emulation_match(uint32_t mask, uint64_t value) {
    Worker& w = *worker;
    Fiber& fiber = *w.current;
    fiber.value = value;
    collective(w, MATCH, mask, CALLER);
    return static_cast<uint32_t>(fiber.value);
}

EXPORT uint32_t emulation_movmatrix(uint32_t value) {
    Worker& w = *worker;
    Fiber& fiber = *w.current;
    fiber.value = value;
    collective(w, MOVMATRIX, ~0u, CALLER);
    return static_cast<uint32_t>(fiber.value);
}

struct Words {
    uint32_t r[4];
};
struct Floats {
    float c[4];
};

EXPORT Words emulation_ldmatrix(int count, int transposed, const void* row) {
    Worker& w = *worker;
    Fiber& fiber = *w.current;
    fiber.row = reinterpret_cast<uintptr_t>(row);
    collective(w, static_cast<uint8_t>(LDMATRIX + (count == 4 ? 2 : 0) + (transposed ? 1 : 0)), ~0u, CALLER);
    return {{fiber.words[0], fiber.words[1], fiber.words[2], fiber.words[3]}};
}

namespace {
Floats multiplied(uint8_t kind, const Floats& c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, uintptr_t site) {
    Worker& w = *worker;
    Fiber& fiber = *w.current;
    memcpy(fiber.c, c.c, sizeof fiber.c);
    fiber.a[0] = a0, fiber.a[1] = a1, fiber.a[2] = a2, fiber.a[3] = a3;
    fiber.b[0] = b0, fiber.b[1] = b1;
    collective(w, kind, ~0u, site);
    return {{fiber.c[0], fiber.c[1], fiber.c[2], fiber.c[3]}};
}
}  // namespace

EXPORT Floats emulation_mma_bf16(float c0, float c1, float c2, float c3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                 uint32_t b1) {
    return multiplied(MMA_BF16, {{c0, c1, c2, c3}}, a0, a1, a2, a3, b0, b1, CALLER);
}

EXPORT Floats emulation_mma_f16(float c0, float c1, float c2, float c3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1) {
    return multiplied(MMA_F16, {{c0, c1, c2, c3}}, a0, a1, a2, a3, b0, b1, CALLER);
}

// ---- Asynchronous copies ----------------------------------------------------------------------------------------------------------

EXPORT void emulation_cp_async(void* shared, const void* global, int bytes, int valid) {
    Worker& w = *worker;
    Fiber& fiber = *w.current;
    const uintptr_t site = CALLER, target = reinterpret_cast<uintptr_t>(shared), source = reinterpret_cast<uintptr_t>(global);
    const auto size = static_cast<size_t>(bytes);
    if (--w.fuel == 0) refuel(w);
    aligned(w, target, size, "the target of a cp.async", site);
    aligned(w, source, size, "the source of a cp.async", site);
    const uintptr_t byte = target - w.shared_base;
    if (byte >= w.shared_bytes || size > w.shared_bytes - byte) outside(w, target, size, Access::CopyIssue, site);
    // A source that is not read must be mapped all the same: anywhere in an allocation.
    if (!in_allocation(w, source, valid ? size : 1)) outside(w, source, size, Access::Read, site);
    touch<Access::CopyIssue>(w, static_cast<uint32_t>(byte), static_cast<uint32_t>(size), site);
    fiber.copies.push_back({source, static_cast<uint32_t>(byte), static_cast<uint16_t>(size), !valid});
}

EXPORT void emulation_cp_async_commit() {
    Fiber& fiber = *worker->current;
    fiber.groups.push_back(static_cast<uint32_t>(fiber.copies.size()));
}

EXPORT void emulation_cp_async_wait(int pending) {
    Worker& w = *worker;
    Fiber& fiber = *w.current;
    while (fiber.groups.size() - fiber.retired > static_cast<size_t>(pending)) {
        for (const uint32_t end = fiber.groups[fiber.retired]; fiber.delivered < end; ++fiber.delivered) {
            const Copy& copy = fiber.copies[fiber.delivered];
            auto* target = reinterpret_cast<void*>(w.shared_base + copy.target);
            if (copy.zeros)
                memset(target, 0, copy.bytes);
            else
                memcpy(target, reinterpret_cast<const void*>(copy.source), copy.bytes);
            fill(w.writers + copy.target, w.now, copy.bytes);
        }
        ++fiber.retired;
    }
    if (fiber.retired == fiber.groups.size() && fiber.delivered == fiber.copies.size()) {
        fiber.copies.clear();
        fiber.groups.clear();
        fiber.retired = fiber.delivered = 0;
    }
}

// ---- Atomics and single instructions ----------------------------------------------------------------------------------------------

namespace {
template <typename T, typename S>
T updated(int operation, T old, T value, T expected) {
    switch (operation) {
        case ATOMIC_ADD: return old + value;
        case ATOMIC_OR: return old | value;
        case ATOMIC_AND: return old & value;
        case ATOMIC_XOR: return old ^ value;
        case ATOMIC_MIN_U: return value < old ? value : old;
        case ATOMIC_MAX_U: return value > old ? value : old;
        case ATOMIC_MIN_I: return static_cast<S>(value) < static_cast<S>(old) ? value : old;
        case ATOMIC_MAX_I: return static_cast<S>(value) > static_cast<S>(old) ? value : old;
        case ATOMIC_EXCH: return value;
        default: return old == expected ? value : old;
    }
}

template <typename T, typename S>
T update(int operation, T* address, T value, T expected) {
    T old = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(address, &old, updated<T, S>(operation, old, value, expected), false, __ATOMIC_SEQ_CST,
                                        __ATOMIC_RELAXED)) {
    }
    return old;
}
}  // namespace

EXPORT uint64_t emulation_atomic(int operation, int bytes, void* address, uint64_t value, uint64_t expected) {
    const uintptr_t site = CALLER;
    aligned(*worker, reinterpret_cast<uintptr_t>(address), static_cast<size_t>(bytes), "an atomic update", site);
    check<Access::Atomic>(address, static_cast<size_t>(bytes), site);
    if (bytes == 4)
        return update<uint32_t, int32_t>(operation, static_cast<uint32_t*>(address), static_cast<uint32_t>(value),
                                         static_cast<uint32_t>(expected));
    return update<uint64_t, int64_t>(operation, static_cast<uint64_t*>(address), value, expected);
}

EXPORT void emulation_fence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

EXPORT Words emulation_load_published(const void* global, int bytes) {
    const uintptr_t site = CALLER;
    aligned(*worker, reinterpret_cast<uintptr_t>(global), static_cast<size_t>(bytes), "a load", site);
    check<Access::Read>(global, static_cast<size_t>(bytes), site);
    Words words{};
    for (int i = 0; i < bytes / 4; ++i) words.r[i] = __atomic_load_n(static_cast<const uint32_t*>(global) + i, __ATOMIC_ACQUIRE);
    return words;
}

namespace {
uint32_t round_to_bf16(float value) {
    const auto bits = peek<uint32_t>(&value);
    // The hardware's one NaN.
    if (value != value) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// a * b + c rounded once: the product is exact in double, the sum is rounded to odd there, and so the second rounding is right.
uint32_t fma_bf16(uint32_t a, uint32_t b, uint32_t c) {
    const double product = static_cast<double>(bf16_to_float(static_cast<uint16_t>(a))) * bf16_to_float(static_cast<uint16_t>(b));
    const double addend = bf16_to_float(static_cast<uint16_t>(c));
    double sum = product + addend;
    if (sum != sum) return 0x7fff;
    const double back = sum - product, error = (product - (sum - back)) + (addend - back);
    if (error != 0 && std::isfinite(sum)) {
        auto bits = peek<uint64_t>(&sum);
        if ((bits & 1) == 0) {
            bits += (error > 0) == (sum > 0) ? 1 : -1;
            sum = peek<double>(&bits);
        }
    }
    // To bf16 from double, ties to even, subnormals with the spacing 2^-133.
    if (sum == 0 || std::isinf(sum)) return round_to_bf16(static_cast<float>(sum));
    int exponent;
    std::frexp(sum, &exponent);
    const int unit = exponent - 8 < -133 ? -133 : exponent - 8;
    return round_to_bf16(static_cast<float>(std::ldexp(std::nearbyint(std::ldexp(sum, -unit)), unit)));
}
}  // namespace

EXPORT uint32_t emulation_pack_bf16(float low, float high) { return round_to_bf16(low) | round_to_bf16(high) << 16; }

EXPORT uint32_t emulation_fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
    return fma_bf16(a & 0xffff, b & 0xffff, c & 0xffff) | fma_bf16(a >> 16, b >> 16, c >> 16) << 16;
}

EXPORT float emulation_exp2(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}

EXPORT uint32_t emulation_thread() { return worker->thread; }
EXPORT uint32_t emulation_threads() { return worker->launch->threads; }
EXPORT uint32_t emulation_block(int dimension) { return worker->block[dimension]; }
EXPORT uint32_t emulation_grid(int dimension) { return worker->launch->grid[dimension]; }
EXPORT void* emulation_shared() { return reinterpret_cast<void*>(worker->shared_base); }

// ---- What the compiler calls ------------------------------------------------------------------------------------------------------

#define HOOKS(bytes)                                                                                     \
    EXPORT void __tsan_read##bytes(void* address) { check<Access::Read>(address, bytes, CALLER); }       \
    EXPORT void __tsan_write##bytes(void* address) { check<Access::Write>(address, bytes, CALLER); }     \
    EXPORT void __tsan_unaligned_read##bytes(void* address) { check<Access::Read>(address, bytes, CALLER); } \
    EXPORT void __tsan_unaligned_write##bytes(void* address) { check<Access::Write>(address, bytes, CALLER); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
EXPORT void __tsan_read_range(void* address, unsigned long bytes) { check<Access::Read>(address, bytes, CALLER); }
EXPORT void __tsan_write_range(void* address, unsigned long bytes) { check<Access::Write>(address, bytes, CALLER); }
EXPORT void __tsan_init() {}
EXPORT void __tsan_func_entry(void*) {}
EXPORT void __tsan_func_exit() {}

namespace {
struct Location {
    const char* file;
    uint32_t line, column;
};
struct TypeName {
    uint16_t kind, info;
    char name[1];
};
struct Mismatch {
    Location location;
    const TypeName* type;
    uint8_t log_alignment, kind;
};
struct Bounds {
    Location location;
    const TypeName *array, *index;
};
}  // namespace

EXPORT void __ubsan_handle_type_mismatch_v1(const Mismatch* data, uintptr_t address) {
    aligned(*worker, address, size_t{1} << data->log_alignment, data->type->name, CALLER);
}
EXPORT void __ubsan_handle_out_of_bounds(const Bounds* data, uintptr_t index) {
    fail(*worker, worker->thread, CALLER, "index %ld of an array of type %s", static_cast<long>(index), data->array->name);
}
#define UNDEFINED(name, what) \
    EXPORT void __ubsan_handle_##name() { fail(*worker, worker->thread, CALLER, what); }
UNDEFINED(divrem_overflow, "division by zero, or of the smallest integer by -1")
UNDEFINED(add_overflow, "a signed sum overflows")
UNDEFINED(sub_overflow, "a signed difference overflows")
UNDEFINED(mul_overflow, "a signed product overflows")
UNDEFINED(negate_overflow, "a signed negation overflows")
UNDEFINED(shift_out_of_bounds, "a shift by a negative number or by the type's width or more")

// ---- The device's side ------------------------------------------------------------------------------------------------------------

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
    w->shared_base = reinterpret_cast<uintptr_t>(map(MAX_SHARED + 2 * MAX_SHARED)) + MAX_SHARED;
    Stamp** stamps[] = {&w->writers, &w->readers, &w->other_readers};
    for (Stamp** shadow : stamps) *shadow = static_cast<Stamp*>(map(MAX_SHARED * sizeof(Stamp)));
    w->writer_sites = static_cast<uint32_t*>(map(MAX_SHARED));
    w->reader_sites = static_cast<uint32_t*>(map(MAX_SHARED));
    return w;
}

bool add_stacks(Worker& w, uint32_t threads) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    for (; w.num_fibers < threads; ++w.num_fibers) {
        void* memory = map(STACK_BYTES + page);
        if (memory == nullptr || mprotect(memory, page, PROT_NONE) != 0) return false;
        w.fibers[w.num_fibers].stack_low = reinterpret_cast<uintptr_t>(memory) + page;
        w.fibers[w.num_fibers].index = w.num_fibers;
    }
    return true;
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
    for (uint32_t index = 0; index < w.num_warps; ++index) {
        Warp& warp = w.warps[index];
        const uint32_t lanes = launch.threads - index * LANES;
        warp.present = lanes >= LANES ? ~0u : (1u << lanes) - 1;
        warp.ready = warp.present;
        warp.done = warp.at_barrier = warp.num_pending = 0;
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
    if (!add_stacks(*w, launch->threads)) {
        if (launch->reported.exchange(1) == 0) snprintf(launch->message, MESSAGE_BYTES, "no memory for the stacks of a block");
        launch->failed.store(1);
    }
    while (launch->failed.load() == 0) {
        const uint64_t block = launch->next_block.fetch_add(1);
        if (block >= blocks) break;
        run_block(*w, block);
    }
    worker = nullptr;
    const std::lock_guard<std::mutex> guard(idle_lock);
    idle.push_back(w);
}

// The message of a launch that failed, or null. Valid until the launch is freed.
EXPORT const char* emulation_message(const Launch* launch) { return launch->failed.load() != 0 ? launch->message : nullptr; }

EXPORT void emulation_free_launch(Launch* launch) { delete launch; }
