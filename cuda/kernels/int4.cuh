// INT4 weights as packed for the tensor core: w[o, i] = (q[o, i] - z[o, group]) * scale[o, group].
//
// A tile is 16 output features x 64 inputs: 512 bytes, of which lane l = 4 g + t has the 16 from 16 l on. Its word j = 2 h + i is the A
// fragment of one `mma_bf16`, with the inputs k = 32 h + 8 t + 4 i + {0, 1, 2, 3} of the tile where the instruction's order has
// {2t, 2t + 1, 2t + 8, 2t + 9}: products do not mind the order if both operands have it. So what a lane needs of a token's row is 16
// consecutive bytes, from input 32 h + 8 t on: {x, y} are the B fragment of word 2 h, {z, w} that of word 2 h + 1.
//
// Nibbles p and p + 4 of a word are the lower and the upper half of a[p]: a[0] row g, k, k + 1; a[1] row g + 8, the same; a[2] row g,
// k + 2, k + 3; a[3] row g + 8, the same. Words 0, 1 lie in inputs 0 to 31 of the tile, words 2, 3 in the rest: groups are multiples of 32.
//
// scales [row tiles][groups][8]: pairs (row g, row g + 8); zeros [row tiles][groups][8]: bytes, row g's in the lower nibble.
#pragma once

#include "rows.cuh"

// -(128 + z) in both halves, for a zero point in the lowest nibble; 8 where there are none.
DEVICE uint32_t int4_offset(uint32_t zero) { return 0xc300c300u | (zero & 0xfu) * 0x00010001u; }
constexpr uint32_t INT4_OFFSET_SYMMETRIC = 0xc308c308u;

// 128 + q of a[p]: the last mantissa bit of 128 is worth one.
DEVICE uint32_t int4_biased(uint32_t word, int p) { return lop3<(0xf0 & 0xcc) | 0xaa>(word >> (4 * p), 0x000f000fu, 0x43004300u); }

// The fragment q - z of a word, exact. `low` and `high` are the offsets of rows g and g + 8.
DEVICE void int4_fragment(uint32_t word, uint32_t low, uint32_t high, uint32_t (&a)[4]) {
#pragma unroll
    for (int p = 0; p < 4; ++p) a[p] = fma_bf16x2(int4_biased(word, p), 0x3f803f80u, p % 2 == 0 ? low : high);
}

// Cheaper, in units of 1/64: where they stand in the lower byte of a half, nibbles are subnormal bf16 numbers in units of 2^-133 or 2^-129
// (so are those next above the smallest normal one), so that nothing but one shift of a word brings them into place.
constexpr uint32_t INT4_64TH_SYMMETRIC = 0xbe00be00u;

// -z / 64 in both halves, for the zero points of a byte: rows g and g + 8.
DEVICE void int4_offsets_64th(uint32_t zeros, uint32_t& low, uint32_t& high) {
    const uint32_t both = zeros * 0x00010001u;
    low = fma_bf16x2(both & 0x000f000fu, 0xff00ff00u, 0u);
    high = fma_bf16x2(both & 0x00f000f0u, 0xfd00fd00u, 0u);
}

// The fragment (q - z) / 64 of a word, exact.
DEVICE void int4_fragment_64th(uint32_t word, uint32_t low, uint32_t high, uint32_t (&a)[4]) {
    constexpr uint32_t LOW_SCALE = 0x7f007f00u, HIGH_SCALE = 0x7d007d00u;
    a[0] = fma_bf16x2(word & 0x000f000fu, LOW_SCALE, low);
    a[1] = fma_bf16x2(word & 0x00f000f0u, HIGH_SCALE, high);
    a[2] = fma_bf16x2(word >> 8 & 0x000f000fu, LOW_SCALE, low);
    a[3] = fma_bf16x2(word >> 8 & 0x00f000f0u, HIGH_SCALE, high);
}

// A pair of scales as it lies in memory, and widened: x is row g's, y row g + 8's.
template <int TYPE>
struct Int4Scale {
    uint32_t bits;
    DEVICE float2 widen() const {
        if constexpr (TYPE == BF16) return make_float2(bf16_low(bits), bf16_high(bits));
        return make_float2(f16_to_float(bits & 0xffffu), f16_to_float(bits >> 16));
    }
};

template <>
struct Int4Scale<F32> {
    float2 pair;
    DEVICE float2 widen() const { return pair; }
};

// The pair number `index` (a row tile's (groups * tile + group) * 8 + g) of a weight's scales.
template <int TYPE>
DEVICE Int4Scale<TYPE> int4_scale(const void* scales, int64_t index) {
    return static_cast<const Int4Scale<TYPE>*>(scales)[index];
}
