// Numbers of 16 bits, and products of matrices of them.
#pragma once

#include <cmath>

#include "state.h"

namespace {

float half_to_float(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 0) return std::copysign(std::ldexp(static_cast<float>(fraction), -24), sign ? -1.0f : 1.0f);
    const uint32_t wide = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    return peek<float>(&wide);
}

float bf16_to_float(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    return peek<float>(&wide);
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

template <bool BF16>
double widen(uint32_t pair, int high) {
    const auto bits = static_cast<uint16_t>(high ? pair >> 16 : pair);
    return BF16 ? bf16_to_float(bits) : half_to_float(bits);
}

typedef double Four __attribute__((vector_size(32)));

// sums[row] += a[row] b: the products are exact, the sums are double's.
WIDE void add_products(Four (&sums)[16][2], const double (&a)[16][16], const Four (&b)[16][2]) {
    for (int row = 0; row < 16; ++row) {
        Four low = sums[row][0], high = sums[row][1];
        for (int k = 0; k < 16; ++k) {
            const Four factor = {a[row][k], a[row][k], a[row][k], a[row][k]};
            low += factor * b[k][0];
            high += factor * b[k][1];
        }
        sums[row][0] = low;
        sums[row][1] = high;
    }
}

// Rounds once.
template <bool BF16>
void multiply(Fiber* lanes) {
    double a[16][16];
    Four b[16][2], sums[16][2];
    for (int lane = 0; lane < 32; ++lane) {
        const Fiber& fiber = lanes[lane];
        const int g = lane / 4, t = 2 * (lane % 4);
        for (int i = 0; i < 2; ++i) {
            for (int part = 0; part < 4; ++part) a[g + part % 2 * 8][t + part / 2 * 8 + i] = widen<BF16>(fiber.a[part], i);
            for (int part = 0; part < 2; ++part) b[t + part * 8 + i][g / 4][g % 4] = widen<BF16>(fiber.b[part], i);
            for (int part = 0; part < 2; ++part) sums[g + part * 8][t / 4][t % 4 + i] = fiber.c[part * 2 + i];
        }
    }
    add_products(sums, a, b);
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = 2 * (lane % 4);
        for (int i = 0; i < 4; ++i) lanes[lane].c[i] = static_cast<float>(sums[g + i / 2 * 8][t / 4][t % 4 + i % 2]);
    }
}

// Lane l's word of an 8x8 matrix whose rows are given; transposed or not.
uint32_t fragment(const uint16_t (&matrix)[8][8], uint32_t lane, bool transposed) {
    const uint32_t g = lane / 4, t = 2 * (lane % 4);
    const uint32_t low = transposed ? matrix[t][g] : matrix[g][t], high = transposed ? matrix[t + 1][g] : matrix[g][t + 1];
    return low | high << 16;
}

}  // namespace
