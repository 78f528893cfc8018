// The rotary table of a step, in f64 until a cosine is done: a thread an angle.
//
// Tile: TILE_WARPS warps a block.
//
// With u = 2^-53: a power of `ratio`, itself off by u, is off by at most (3 j + 2) u, the angle by u more; the reduction by less than
// 2^-50 for angles below 2^31, the polynomials by 2^-44. What is left is rounded to f32.
#include "ptx.cuh"

// A cosine and a sine, for |x| <= pi / 4 and a little more: Taylor's, whose first term left out is x^14 / 14! and x^15 / 15!.
DEVICE double small_cos(double x) {
    const double s = x * x;
    double sum = 1.0 / 479001600.0;
    sum = fma(sum, s, -1.0 / 3628800.0);
    sum = fma(sum, s, 1.0 / 40320.0);
    sum = fma(sum, s, -1.0 / 720.0);
    sum = fma(sum, s, 1.0 / 24.0);
    sum = fma(sum, s, -0.5);
    return fma(sum, s, 1.0);
}
DEVICE double small_sin(double x) {
    const double s = x * x;
    double sum = 1.0 / 6227020800.0;
    sum = fma(sum, s, -1.0 / 39916800.0);
    sum = fma(sum, s, 1.0 / 362880.0);
    sum = fma(sum, s, -1.0 / 5040.0);
    sum = fma(sum, s, 1.0 / 120.0);
    sum = fma(sum, s, -1.0 / 6.0);
    return fma(sum * s, x, x);
}

KERNEL void __launch_bounds__(32 * TILE_WARPS, 1)
rope_table(const int32_t* __restrict__ positions, // [rows]
           float2* __restrict__ cos_sin,          // [rows, pairs]
           int rows, int pairs, double ratio) {   // ratio: theta^(-1 / pairs)
    const int64_t place = static_cast<int64_t>(blockIdx.x) * (32 * TILE_WARPS) + threadIdx.x;
    if (place >= static_cast<int64_t>(rows) * pairs) return;
    const int row = static_cast<int>(place / pairs), pair = static_cast<int>(place % pairs);

    double frequency = 1.0, power = ratio;
    for (int bits = pair; bits != 0; bits >>= 1) {
        if (bits & 1) frequency *= power;
        power *= power;
    }
    const double angle = positions[row] * frequency;
    // Quarter turns, and what is left of them: pi / 2 in two pieces.
    const double quarters = rint(angle * 0.63661977236758134308);
    const double rest = fma(-quarters, 6.123233995736766036e-17, fma(-quarters, 1.5707963267948965580, angle));
    const double cosine = small_cos(rest), sine = small_sin(rest);
    switch (static_cast<int64_t>(quarters) & 3) {
        case 0: cos_sin[place] = make_float2(static_cast<float>(cosine), static_cast<float>(sine)); break;
        case 1: cos_sin[place] = make_float2(static_cast<float>(-sine), static_cast<float>(cosine)); break;
        case 2: cos_sin[place] = make_float2(static_cast<float>(-cosine), static_cast<float>(-sine)); break;
        default: cos_sin[place] = make_float2(static_cast<float>(sine), static_cast<float>(-cosine)); break;
    }
}
