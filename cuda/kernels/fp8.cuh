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

// The code of a magnitude's nearest e4m3, ties to even; what exceeds 448 becomes 448.
DEVICE uint32_t magnitude_to_e4m3(uint32_t bits) {
    constexpr uint32_t LARGEST = 0x43e00000, SMALLEST_NORMAL = 0x3c800000;
    const uint32_t magnitude = min(bits & 0x7fffffffu, LARGEST);
    const uint32_t normal = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3);
    // The spacing of f32 at 2^14 is that of e4m3's subnormals, 2^-9: the addition rounds.
    const uint32_t subnormal = __float_as_uint(__uint_as_float(magnitude) + 16384.0f) - __float_as_uint(16384.0f);
    return magnitude < SMALLEST_NORMAL ? subnormal : normal;
}

// The nearest e4m3, likewise.
DEVICE uint32_t float_to_e4m3(float value) { return (__float_as_uint(value) >> 24 & 0x80u) | magnitude_to_e4m3(__float_as_uint(value)); }

// Four codes in a word, the first in its lowest byte.
DEVICE uint32_t pack_e4m3(float a, float b, float c, float d) {
    const uint32_t bits[4] = {__float_as_uint(a), __float_as_uint(b), __float_as_uint(c), __float_as_uint(d)};
    const uint32_t magnitudes = magnitude_to_e4m3(bits[0]) | magnitude_to_e4m3(bits[1]) << 8 | magnitude_to_e4m3(bits[2]) << 16 |
                                magnitude_to_e4m3(bits[3]) << 24;
    const uint32_t tops = __byte_perm(__byte_perm(bits[0], bits[1], 0x0073), __byte_perm(bits[2], bits[3], 0x0073), 0x5410);
    return (tops & 0x80808080u) | magnitudes;
}

// value / divisor, given the divisor's reciprocal: the product, corrected by its exact remainder.
DEVICE float divide(float value, float divisor, float reciprocal) {
    const float quotient = value * reciprocal;
    return fmaf(fmaf(-quotient, divisor, value), reciprocal, quotient);
}

// The largest magnitude of what a scale covers -> the scale; 448 then stands for it. The floor keeps everything normal.
DEVICE float e4m3_scale(float largest) { return divide(fmaxf(largest, 0x1p-100f), 448.0f, 1.0f / 448.0f); }

// `values / scale` as codes, packed in order.
template <int COUNT>
DEVICE void quantise(const float (&values)[COUNT], float scale, uint32_t (&codes)[COUNT / 4]) {
    // A plain division has branches for what cannot be here. One step of Newton makes the reciprocal as good as rounded.
    const float root = rsqrtf(scale), near = root * root;
    const float reciprocal = fmaf(near, fmaf(-scale, near, 1.0f), near);
#pragma unroll
    for (int i = 0; i < COUNT / 4; ++i) {
        const float* four = values + 4 * i;
        codes[i] = pack_e4m3(divide(four[0], scale, reciprocal), divide(four[1], scale, reciprocal),
                             divide(four[2], scale, reciprocal), divide(four[3], scale, reciprocal));
    }
}
