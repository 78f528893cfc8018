// Weights of random numbers, as reference/src/random.rs defines them: element i is `centre` + `spread` * (2 b - 255) / 256, b byte i % 4
// of word i / 4; and packed words, which are all bits.
//
// Constant: ELEMENT, the type of the elements, as rows.cuh counts them.
#include "random.cuh"
#include "rows.cuh"

constexpr int THREADS = 256;

// Rounded to nearest even, subnormals kept; for magnitudes that a half can hold.
DEVICE uint16_t float_to_f16(float value) {
    const uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    // Below 2^-14 the last place of a half is 2^-24, and so is that of 0.5f.
    if (magnitude < 0x38800000u) return static_cast<uint16_t>(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u));
    return static_cast<uint16_t>(sign | (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13);
}

// A matrix, of whose rows `together` lie side by side in `out`, the next as many `stride` rows further on.
KERNEL void __launch_bounds__(THREADS)
random_fill(void* __restrict__ out, int64_t count, int32_t columns, int32_t together, int32_t stride, int32_t first, int32_t seed,
            float centre, float spread) {
    const int64_t word = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (4 * word >= count) return;
    const uint32_t bits = scramble(word, seed);
    int64_t row = 4 * word / columns;
    int32_t column = static_cast<int32_t>(4 * word - row * columns);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (4 * word + i >= count) return;
        // `spread` has eight significant bits: the product is exact, so that it does not matter whether it is fused with the sum.
        const float step = static_cast<float>(2 * static_cast<int32_t>(bits >> 8 * i & 255u) - 255) * 0x1p-8f;
        const float value = spread * step + centre;
        const int64_t place = (row / together * stride + first + row % together) * columns + column;
        if constexpr (ELEMENT == BF16) static_cast<uint16_t*>(out)[place] = float_to_bf16(value);
        if constexpr (ELEMENT == F16) static_cast<uint16_t*>(out)[place] = float_to_f16(value);
        if constexpr (ELEMENT == F32) static_cast<float*>(out)[place] = value;
        if (++column == columns) column = 0, ++row;
    }
}

KERNEL void __launch_bounds__(THREADS) random_words(uint32_t* __restrict__ out, int64_t count, int32_t seed) {
    const int64_t word = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (word < count) out[word] = scramble(word, seed);
}
