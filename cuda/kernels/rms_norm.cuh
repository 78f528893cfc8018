// RMSNorm of rows, with the residual add before it where RESIDUAL. A block takes every `step`-th row, which lies in registers; the
// next one is under way while one is summed.
//
// Constants: WIDTH; VECTOR neighbouring columns of a load, which divide WIDTH; WEIGHT_TYPE; X_FLOAT (x is f32, not bf16); RESIDUAL.
// Tile: TILE_VECTORS vectors of a row that a thread holds, as long as a block has threads enough.
//
// Arithmetic is f32 with u = 2^-24. The sum with the residual is off by u. n = CHUNKS * VECTOR + 10 additions lie on any path to the sum of
// squares, so the mean's relative error is at most (n + 5) u, that of the reciprocal root (n + 7) u / 2 + 2^-22 (the last for rsqrtf), and
// a value gains 3 u more before it is rounded to bf16.
#pragma once

#include "rows.cuh"

namespace rms {

constexpr int VECTORS = WIDTH / VECTOR;
constexpr int ENOUGH_WARPS = (VECTORS + 32 * TILE_VECTORS - 1) / (32 * TILE_VECTORS);
constexpr int WARPS = ENOUGH_WARPS < 32 ? ENOUGH_WARPS : 32;
constexpr int THREADS = 32 * WARPS;
constexpr int CHUNKS = (VECTORS + THREADS - 1) / THREADS;
constexpr int WORDS = (VECTOR + 1) / 2, X_WORDS = X_FLOAT ? VECTOR : WORDS;
static_assert(WIDTH % VECTOR == 0, "a row is whole vectors, and aligned as they are");
static_assert(THREADS == TILE_THREADS, "the launcher's block");

struct Shared {
    // What the warps summed, of two rows in turn: no one is done reading a row's when the next row's are written.
    float squares[2][WARPS];
};

struct Row {
    uint32_t x[CHUNKS][X_WORDS], residual[RESIDUAL ? CHUNKS : 1][VECTOR];
};

DEVICE int column(int chunk) { return (chunk * THREADS + static_cast<int>(threadIdx.x)) * VECTOR; }

// VECTOR elements of x as they are in memory, and as numbers: f32 where FLOATS, pairs of bf16 otherwise.
template <bool FLOATS, int COUNT>
DEVICE void load_x(const void* x, int64_t place, uint32_t (&words)[COUNT]) {
    if constexpr (FLOATS) {
        load_words(static_cast<const float*>(x) + place, words);
    } else {
        load_bf16<VECTOR>(static_cast<const uint16_t*>(x) + place, words);
    }
}

template <bool FLOATS, int COUNT>
DEVICE void widen_x(const uint32_t (&words)[COUNT], float (&values)[VECTOR]) {
    if constexpr (FLOATS) {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) values[i] = __uint_as_float(words[i]);
    } else {
        widen_bf16(words, values);
    }
}

DEVICE void load_row(Row& row, const void* x, const float* residual, int64_t start) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        if (column(chunk) < WIDTH) {
            const int64_t place = start + column(chunk);
            load_x<X_FLOAT>(x, place, row.x[chunk]);
            if constexpr (RESIDUAL) load_words(residual + place, row.residual[chunk]);
        }
    }
}

// The sum over the block, the same in every thread.
DEVICE float block_sum(float value, float (&of_warps)[WARPS]) {
    value = warp_sum(value);
    if constexpr (WARPS > 1) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        if (lane == 0) of_warps[warp] = value;
        __syncthreads();
        value = warp_sum(lane < WARPS ? of_warps[lane] : 0.0f);
    }
    return value;
}

// One row, which begins at `start`: with its residual added, where there is one, normed to `words`.
DEVICE void norm_row(const Row& row, int64_t start, float* residual, const float (&w)[CHUNKS][VECTOR], float eps, float (&of_warps)[WARPS],
                     uint32_t (&words)[CHUNKS][WORDS]) {
    float squares = 0.0f, values[CHUNKS][VECTOR];
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        widen_x<X_FLOAT>(row.x[chunk], values[chunk]);
        if constexpr (RESIDUAL) {
            uint32_t sums[VECTOR];
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                values[chunk][i] += __uint_as_float(row.residual[chunk][i]);
                sums[i] = __float_as_uint(values[chunk][i]);
            }
            if (column(chunk) < WIDTH) store_words(residual + start + column(chunk), sums);
        }
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) squares += values[chunk][i] * values[chunk][i];
    }
    const float mean = block_sum(squares, of_warps) * (1.0f / WIDTH);
    const float reciprocal = rsqrtf(mean + eps);

#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) values[chunk][i] = w[chunk][i] * (values[chunk][i] * reciprocal);
        narrow_to_bf16(values[chunk], words[chunk]);
    }
}

DEVICE void load_weight(const void* weight, float (&w)[CHUNKS][VECTOR]) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        if (column(chunk) < WIDTH) load_weights<WEIGHT_TYPE>(weight, column(chunk), w[chunk]);
    }
}

DEVICE void norm_rows(Shared& shared, const void* __restrict__ x, float* __restrict__ residual, const void* __restrict__ weight,
                      uint16_t* __restrict__ out, int64_t first, int64_t step, int rows, float eps) {
    Row current = {};
    float w[CHUNKS][VECTOR] = {};
    load_row(current, x, residual, first * WIDTH);
    load_weight(weight, w);

    int turn = 0;
    for (int64_t row = first; row < rows; row += step) {
        Row next = {};
        if (row + step < rows) load_row(next, x, residual, (row + step) * WIDTH);

        uint32_t words[CHUNKS][WORDS];
        norm_row(current, row * WIDTH, residual, w, eps, shared.squares[turn], words);
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            if (column(chunk) < WIDTH) store_bf16<VECTOR>(out + row * WIDTH + column(chunk), words[chunk]);
        }
        current = next;
        turn ^= 1;
    }
}

} // namespace rms
