// A row of a matrix over the lanes of a warp: lane l holds the VECTOR neighbouring columns from (32 * chunk + l) * VECTOR on.
#pragma once

#include "ptx.cuh"

// Types of dense weights, as launchers number them.
constexpr int BF16 = 0, F16 = 1, F32 = 2;

DEVICE float warp_sum(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

// COUNT aligned words, 1, 2 or a multiple of 4.
template <int COUNT>
DEVICE void load_words(const void* global, uint32_t (&words)[COUNT]) {
    if constexpr (COUNT == 1) {
        words[0] = *static_cast<const uint32_t*>(global);
    } else if constexpr (COUNT == 2) {
        const uint2 pair = *static_cast<const uint2*>(global);
        words[0] = pair.x, words[1] = pair.y;
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            const uint4 four = static_cast<const uint4*>(global)[i / 4];
            words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
        }
    }
}

template <int COUNT>
DEVICE void store_words(void* global, const uint32_t (&words)[COUNT]) {
    static_assert(COUNT == 1 || COUNT == 2 || COUNT % 4 == 0, "whole stores");
    if constexpr (COUNT == 1) {
        *static_cast<uint32_t*>(global) = words[0];
    } else if constexpr (COUNT == 2) {
        *static_cast<uint2*>(global) = make_uint2(words[0], words[1]);
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4)
            static_cast<uint4*>(global)[i / 4] = make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }
}

DEVICE float f16_to_float(uint32_t bits) {
    // The exponent and the fraction in place, then 2^(127 - 15): right for subnormals too. All ones stay infinity and NaN.
    const float scaled = __uint_as_float((bits & 0x7fffu) << 13) * 0x1p112f;
    return __uint_as_float(__float_as_uint(scaled) | ((bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u) | (bits & 0x8000u) << 16);
}

// COUNT values of a weight of type TYPE from element `column` on, widened.
template <int TYPE, int COUNT>
DEVICE void load_weights(const void* weight, int64_t column, float (&values)[COUNT]) {
    if constexpr (TYPE == F32) {
        uint32_t words[COUNT];
        load_words(static_cast<const uint32_t*>(weight) + column, words);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) values[i] = __uint_as_float(words[i]);
    } else if constexpr (COUNT == 1) {
        const uint32_t bits = static_cast<const uint16_t*>(weight)[column];
        values[0] = TYPE == BF16 ? bf16_low(bits) : f16_to_float(bits);
    } else {
        uint32_t words[COUNT / 2];
        load_words(static_cast<const uint16_t*>(weight) + column, words);
#pragma unroll
        for (int i = 0; i < COUNT / 2; ++i) {
            values[2 * i] = TYPE == BF16 ? bf16_low(words[i]) : f16_to_float(words[i] & 0xffffu);
            values[2 * i + 1] = TYPE == BF16 ? bf16_high(words[i]) : f16_to_float(words[i] >> 16);
        }
    }
}

// COUNT neighbouring bf16, 1 or as many as `load_words` takes, as they lie in memory: a lone one in the lower half of its word.
template <int COUNT>
DEVICE void load_bf16(const uint16_t* global, uint32_t (&words)[(COUNT + 1) / 2]) {
    if constexpr (COUNT == 1) {
        words[0] = *global;
    } else {
        load_words(global, words);
    }
}

template <int COUNT>
DEVICE void store_bf16(uint16_t* global, const uint32_t (&words)[(COUNT + 1) / 2]) {
    if constexpr (COUNT == 1) {
        *global = static_cast<uint16_t>(words[0]);
    } else {
        store_words(global, words);
    }
}

template <int COUNT>
DEVICE void widen_bf16(const uint32_t (&words)[(COUNT + 1) / 2], float (&values)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) values[i] = i % 2 == 0 ? bf16_low(words[i / 2]) : bf16_high(words[i / 2]);
}

template <int COUNT>
DEVICE void narrow_to_bf16(const float (&values)[COUNT], uint32_t (&words)[(COUNT + 1) / 2]) {
    if constexpr (COUNT == 1) {
        words[0] = float_to_bf16(values[0]);
    } else {
#pragma unroll
        for (int i = 0; i < COUNT / 2; ++i) words[i] = pack_bf16(values[2 * i], values[2 * i + 1]);
    }
}

// Rounds pairs of values to bf16: in `words`, and widened again in place.
template <int COUNT>
DEVICE void round_to_bf16(float (&values)[COUNT], uint32_t (&words)[COUNT / 2]) {
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) {
        words[i] = pack_bf16(values[2 * i], values[2 * i + 1]);
        values[2 * i] = bf16_low(words[i]);
        values[2 * i + 1] = bf16_high(words[i]);
    }
}

// A rotary pair turned by (cos, sin).
DEVICE void turn_pair(float& a, float& b, float cos, float sin) {
    const float before = a;
    a = before * cos - b * sin;
    b = b * cos + before * sin;
}

// The bits of the largest magnitude, which order as the magnitudes do.
template <int COUNT>
DEVICE uint32_t largest_magnitude(const float (&values)[COUNT]) {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) largest = max(largest, __float_as_uint(values[i]) & 0x7fffffffu);
    return largest;
}
