// What the ways of `top_k` share about a row: its elements, how they rank, and the ways to go over them.
#pragma once

#include "ptx.cuh"

constexpr uint32_t THREADS = TILE_THREADS, WARPS = THREADS / 32, VECTORS = TILE_VECTORS;
constexpr uint32_t ALL_LANES = 0xffffffffu;

static_assert(THREADS % 32 == 0 && THREADS <= 1024, "whole warps, and a warp holds one number of each of them");

constexpr float LARGEST = 0x1.fffffep127f;
DEVICE float negative_infinity() { return __uint_as_float(0xff800000u); }
DEVICE float not_a_number() { return __uint_as_float(0x7fc00000u); }

// A score as an integer that ranks as the contract wants: numbers in their order with -0.0 as +0.0, NaN below them.
DEVICE uint32_t to_key(float value) {
    const uint32_t bits = __float_as_uint(value + 0.0f);
    return value == value ? bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u) : 0;
}

DEVICE float to_value(uint32_t key) {
    return __uint_as_float(key ^ (static_cast<uint32_t>(static_cast<int32_t>(~key) >> 31) | 0x80000000u));
}

struct alignas(8) Item {
    float value;
    uint32_t position;
};

// An interval, both ends included.
struct Range {
    uint32_t low, high;
    DEVICE bool contains(uint32_t value) const { return value - low <= high - low; }
};

// Everything down to one item of the row.
struct Threshold {
    Item last;
    DEVICE bool selects(float value, uint32_t position) const {
        const bool number = last.value == last.value;
        const bool above = number ? value > last.value : value == value, equal = number ? value == last.value : value != value;
        return above | (equal & (position <= last.position));
    }
};

DEVICE uint32_t lane() { return threadIdx.x % 32; }
DEVICE uint32_t warp() { return threadIdx.x / 32; }

// One row of logits in device memory, read as aligned vectors; `head` elements of the first vector lie before it.
struct Row {
    const float* vectors;
    uint32_t head, length;

    DEVICE Row(const float* logits, int64_t start)
        : vectors(logits + (start & ~int64_t{3})), head(static_cast<uint32_t>(start & 3)), length(0) {}

    DEVICE uint32_t num_vectors() const { return (head + length + 3) / 4; }

    // Position of a vector's first element; wraps around before the row.
    DEVICE uint32_t position(uint32_t vector) const { return 4 * vector - head; }

    // Whether all of a vector lies in the first `limit` elements.
    DEVICE bool covers(uint32_t vector, uint32_t limit) const { return position(vector) < limit && position(vector) + 3 < limit; }

    // Loads what lies in the first `limit` elements of the row; the rest is no number.
    DEVICE void load(uint32_t vector, uint32_t limit, float (&values)[4]) const {
        if (covers(vector, limit)) return load_whole(vector, values);
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) {
            values[j] = position(vector) + j < limit ? vectors[int64_t{4} * vector + j] : not_a_number();
        }
    }

    DEVICE void load_whole(uint32_t vector, float (&values)[4]) const {
        const uint4 bits = load_once_16(vectors + int64_t{4} * vector);
        values[0] = __uint_as_float(bits.x);
        values[1] = __uint_as_float(bits.y);
        values[2] = __uint_as_float(bits.z);
        values[3] = __uint_as_float(bits.w);
    }

    // Calls `f(value, position)` for every element, and for what stands between them: no number, at a position behind the row, so that it
    // comes after all elements.
    template <typename F>
    DEVICE void each(F f) const {
        constexpr uint32_t UNDER_WAY = TILE_BLOCKS * THREADS > 1024 ? 1 : 2;
        for (uint32_t first = threadIdx.x; first < num_vectors(); first += UNDER_WAY * THREADS) {
            float values[UNDER_WAY][4];
#pragma unroll
            for (uint32_t v = 0; v < UNDER_WAY; ++v) load(first + v * THREADS, length, values[v]);
#pragma unroll
            for (uint32_t i = 0; i < 4 * UNDER_WAY; ++i) f(values[i / 4][i % 4], position(first + i / 4 * THREADS) + i % 4);
        }
    }
};

// Items in shared memory.
struct List {
    const Item* items;
    uint32_t length;

    template <typename F>
    DEVICE void each(F f) const {
#pragma unroll 4
        for (uint32_t slot = threadIdx.x; slot < length; slot += THREADS) f(items[slot].value, items[slot].position);
    }
};

// COUNT items a thread in registers.
template <uint32_t COUNT>
struct Items {
    float values[COUNT];
    uint32_t positions[COUNT];

    template <typename F>
    DEVICE void each(F f) const {
#pragma unroll
        for (uint32_t i = 0; i < COUNT; ++i) f(values[i], positions[i]);
    }
};

// A row with no more than k elements selects them all.
DEVICE void write_all(int32_t* out, uint32_t length, uint32_t k) {
    for (uint32_t i = threadIdx.x; i < k; i += THREADS) out[i] = i < length ? static_cast<int32_t>(i) : -1;
}
