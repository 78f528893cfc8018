// Atomics, and what is one instruction on a GPU.
#pragma once

#include "matrices.h"
#include "memory.h"

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

// After some atomics of a block, lets other blocks go first: what is signalled before it is written then shows.
void dawdle(Worker& w) {
    constexpr uint32_t AT_MOST = 4;
    if (w.dawdled == AT_MOST || random_bits(w) % 2 != 0) return;
    ++w.dawdled;
    const timespec pause{0, 50000};
    nanosleep(&pause, nullptr);
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
    Worker& w = *worker;
    const uint64_t old = bytes == 4 ? update<uint32_t, int32_t>(operation, static_cast<uint32_t*>(address), static_cast<uint32_t>(value),
                                                                static_cast<uint32_t>(expected))
                                    : update<uint64_t, int64_t>(operation, static_cast<uint64_t*>(address), value, expected);
    if (reinterpret_cast<uintptr_t>(address) - w.shared_base >= w.shared_bytes) dawdle(w);
    return old;
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
    // Mostly a mere product, which f32 holds exactly where it has no subnormals.
    const float quick = bf16_to_float(static_cast<uint16_t>(a)) * bf16_to_float(static_cast<uint16_t>(b));
    if ((c & 0x7fff) == 0 && std::fabs(quick) >= 0x1p-126f) return round_to_bf16(quick);
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
