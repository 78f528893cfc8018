// What an expert gives for a token, on its way to the weighted sum, in 16 bits a feature: it would else be most of what many tokens move.
//
// Of 32 features, features g, g + 8, g + 16 and g + 24 share 8 bytes: the exponent of the largest, and 14 bits each in units of 2^-12 of
// its power of two. What is rounded away is at most 2^-13 of the largest magnitude of the four (half a unit; next to a power of two, all
// of it), a sixteenth of what the rounding to bf16 takes at the end. Below 2^-115 it is nothing. One NaN or infinity makes NaN of the four.
#pragma once

#include "int4.cuh"

// 1.5 * 2^23: what is added to it stands as an integer in the low bits.
constexpr float PART_INTEGER = 12582912.0f;

DEVICE uint2 pack_part(const float (&four)[4]) {
    const float largest = max_nan(max_nan(fabsf(four[0]), fabsf(four[1])), max_nan(fabsf(four[2]), fabsf(four[3])));
    const uint32_t exponent = max(__float_as_uint(largest) >> 23, 12u);
    const float scale = __uint_as_float((266u - exponent) << 23);
    uint32_t q[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) q[i] = __float_as_uint(fminf(fmaf(four[i], scale, PART_INTEGER), PART_INTEGER + 8191.0f)) & 0x3fffu;
    return make_uint2(q[0] | q[1] << 14 | q[2] << 28, q[2] >> 4 | q[3] << 10 | exponent << 24);
}

// Four integers, and what to multiply them with.
DEVICE float unpack_part(uint2 part, float (&four)[4]) {
    const uint32_t middle = part.x >> 28 | part.y << 4;
    four[0] = static_cast<float>(static_cast<int32_t>(part.x << 18) >> 18);
    four[1] = static_cast<float>(static_cast<int32_t>(part.x << 4) >> 18);
    four[2] = static_cast<float>(static_cast<int32_t>(middle << 18) >> 18);
    four[3] = static_cast<float>(static_cast<int32_t>(part.y << 8) >> 18);
    const uint32_t exponent = part.y >> 24;
    return __uint_as_float(exponent == 255u ? 0x7fc00000u : (exponent - 12u) << 23);
}
