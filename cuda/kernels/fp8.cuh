// e4m3 (OCP FP8 e4m3fn: bias 7, largest 448, no infinity) in software, for sm_80 has no instruction for it.
#pragma once

#include "ptx.cuh"

// Four e4m3 bytes as bf16, exactly: bytes 0 and 2 in `even_pair` (byte 0 low), bytes 1 and 3 in `odd_pair` (byte 1 low).
//
// The seven low bits of an e4m3, four places up in a bf16, are its value times 2^-120 (subnormals too: both formats have gradual
// underflow); one exact multiplication corrects the bias. The -0.0 that is added keeps the sign of zeros. NaN codes give 480.
DEVICE void e4m3x4_to_bf16(uint32_t word, uint32_t& even_pair, uint32_t& odd_pair) {
    constexpr uint32_t TWO_TO_120 = 0x7b807b80, MINUS_ZERO = 0x80008000, SIGNS = 0x80008000, VALUES = 0x07f007f0;
    even_pair = fma_bf16x2((word << 8 & SIGNS) | (word << 4 & VALUES), TWO_TO_120, MINUS_ZERO);
    odd_pair = fma_bf16x2((word & SIGNS) | (word >> 4 & VALUES), TWO_TO_120, MINUS_ZERO);
}

// The nearest e4m3, ties to even; what exceeds 448 becomes 448.
DEVICE uint32_t float_to_e4m3(float value) {
    constexpr uint32_t LARGEST = 0x43e00000, SMALLEST_NORMAL = 0x3c800000;
    const uint32_t bits = __float_as_uint(value);
    const uint32_t magnitude = min(bits & 0x7fffffffu, LARGEST);
    const uint32_t normal = (magnitude + 0x7ffffu + (magnitude >> 20 & 1u) >> 20) - (120u << 3);
    // The spacing of f32 at 2^14 is that of e4m3's subnormals, 2^-9: the addition rounds.
    const uint32_t subnormal = __float_as_uint(__uint_as_float(magnitude) + 16384.0f) - __float_as_uint(16384.0f);
    return (bits >> 24 & 0x80u) | (magnitude < SMALLEST_NORMAL ? subnormal : normal);
}

// Four of them in a word, the first in its lowest byte.
DEVICE uint32_t pack_e4m3(float a, float b, float c, float d) {
    return float_to_e4m3(a) | float_to_e4m3(b) << 8 | float_to_e4m3(c) << 16 | float_to_e4m3(d) << 24;
}

// The largest magnitude of what a scale covers -> the scale; 448 then stands for it. The floor keeps scale and reciprocal normal.
DEVICE float e4m3_scale(float largest) { return fmaxf(largest, 0x1p-100f) / 448.0f; }

// value / scale to f32's precision, given the scale's reciprocal: one correction of the product by its exact remainder.
DEVICE float divide_by_scale(float value, float scale, float reciprocal) {
    const float quotient = value * reciprocal;
    return fmaf(fmaf(-quotient, scale, value), reciprocal, quotient);
}

// `values / scale` as codes, packed in order.
template <int COUNT>
DEVICE void quantise(const float (&values)[COUNT], float scale, uint32_t (&codes)[COUNT / 4]) {
    const float reciprocal = 1.0f / scale;
#pragma unroll
    for (int i = 0; i < COUNT / 4; ++i) {
        codes[i] = pack_e4m3(divide_by_scale(values[4 * i], scale, reciprocal), divide_by_scale(values[4 * i + 1], scale, reciprocal),
                             divide_by_scale(values[4 * i + 2], scale, reciprocal), divide_by_scale(values[4 * i + 3], scale, reciprocal));
    }
}
