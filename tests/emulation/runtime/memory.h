// Every access: where it may be, and in shared memory, when.
#pragma once

#include "failing.h"

namespace {

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
        if ((writer & SEVERAL) == UNDER_WAY) unusable(w, site, ACCESS, byte, writer);
        const bool own = ACCESS != Access::Matrix && (writer & (MAX_THREADS - 1)) == thread && (writer & SEVERAL) != SEVERAL;
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
            Stamp flags = ACCESS == Access::Atomic ? ATOMIC : ACCESS == Access::CopyIssue ? UNDER_WAY : 0;
            if (ACCESS == Access::Atomic && writer & ATOMIC && !own && !over(w, writer)) flags = SEVERAL;
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
    const uint64_t in_shared = address - w.shared_base, before_shared = w.shared_base - address;
    constexpr uint64_t NEAR = 1 << 30;
    if (address < 4096)
        snprintf(text, size, "a null pointer%s", address == 0 ? "" : " and a little");
    else if (in_shared < w.shared_bytes + MAX_SHARED)
        snprintf(text, size, "byte %lu of the block's shared memory of %u bytes", static_cast<unsigned long>(in_shared), w.shared_bytes);
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

}  // namespace
