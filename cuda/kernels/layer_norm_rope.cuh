// The indexer's key of a token: LayerNorm and RoPE of a row, written to its slot of the paged cache by a warp, which holds it in registers.
//
// Constants: KEY_WIDTH, ROPE; KEY_WEIGHT_TYPE, KEY_BIAS_TYPE; HALF (pairs are ROPE / 2 columns apart) or neighbours; KEY_FP8 (cache in 8
// bits). Tile: TILE_WARPS rows a block, TILE_VECTOR columns a lane and chunk.
//
// Arithmetic is f32 with u = 2^-24; n = CHUNKS * TILE_VECTOR + 5 additions lie on any path to a sum. With d = (n + 2) u mean|x| the error
// of the mean, the deviation's relative error is at most r = (n + 7) u / 2 + d^2 / (2 (var + eps)) + 2^-22 (the last for rsqrtf), and
// the normed value's |w| (d + u |x - mean|) / deviation + |y - bias| (r + 3 u) + u |y|. It is then rounded to bf16; a rotated value gains
// 2 u (|a cos| + |b sin|) and is rounded again. Both sides of a rounding boundary that lies within these distances are right.
#pragma once

#include "fp8.cuh"
#include "rows.cuh"

namespace key {

constexpr int CHUNKS = (KEY_WIDTH + 32 * TILE_VECTOR - 1) / (32 * TILE_VECTOR);
static_assert(KEY_WIDTH % 16 == 0 && ROPE % 2 == 0 && ROPE <= KEY_WIDTH, "vectors of a row are aligned, pairs lie inside it");
static_assert(TILE_VECTOR == 4 || TILE_VECTOR == 8, "8 or 16 bytes of bf16");

struct Shared {
    // The columns that rotate, for lanes that hold the other half of a pair.
    float rotary[TILE_WARPS][ROPE];
};

// Rotates the columns of a lane's vector that are rotary: `y` holds them, `cos_sin` is the row's.
DEVICE void rotate(float (&y)[TILE_VECTOR], int column, const float2 (&turns)[TILE_VECTOR], const float* rotary) {
    if constexpr (HALF) {
#pragma unroll
        for (int i = 0; i < TILE_VECTOR; ++i) {
            const int c = column + i;
            if (c < ROPE / 2) {
                y[i] = y[i] * turns[i].x - rotary[c + ROPE / 2] * turns[i].y;
            } else if (c < ROPE) {
                y[i] = y[i] * turns[i].x + rotary[c - ROPE / 2] * turns[i].y;
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < TILE_VECTOR; i += 2) {
            if (column + i < ROPE) turn_pair(y[i], y[i + 1], turns[i].x, turns[i].y);
        }
    }
}

DEVICE void write_row(Shared& shared, const uint16_t* __restrict__ x, const void* __restrict__ weight, const void* __restrict__ bias,
                      const float2* __restrict__ cos_sin, const int64_t* __restrict__ slot_mapping, uint8_t* __restrict__ cache, int slots,
                      int page_size, int row, float eps) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Everything is under way before anything is used: a row is one latency of memory.
    const int64_t slot = slot_mapping[row];
    float y[CHUNKS][TILE_VECTOR] = {}, w[CHUNKS][TILE_VECTOR] = {}, b[CHUNKS][TILE_VECTOR] = {};
    float2 turns[CHUNKS][TILE_VECTOR] = {};
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        const int column = (chunk * 32 + lane) * TILE_VECTOR;
        if (column < KEY_WIDTH) {
            load_weights<BF16>(x + static_cast<int64_t>(row) * KEY_WIDTH, column, y[chunk]);
            load_weights<KEY_WEIGHT_TYPE>(weight, column, w[chunk]);
            load_weights<KEY_BIAS_TYPE>(bias, column, b[chunk]);
        }
#pragma unroll
        for (int i = 0; i < TILE_VECTOR; i += HALF ? 1 : 2) {
            const int c = column + i;
            const int pair = !HALF ? c / 2 : c < ROPE / 2 ? c : c - ROPE / 2;
            if (c < ROPE) turns[chunk][i] = cos_sin[static_cast<int64_t>(row) * (ROPE / 2) + pair];
        }
    }

    float sum = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
        for (int i = 0; i < TILE_VECTOR; ++i) sum += y[chunk][i];
    }
    const float mean = warp_sum(sum) * (1.0f / KEY_WIDTH);
    float squares = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        const bool inside = (chunk * 32 + lane) * TILE_VECTOR < KEY_WIDTH;
#pragma unroll
        for (int i = 0; i < TILE_VECTOR; ++i) {
            y[chunk][i] = inside ? y[chunk][i] - mean : 0.0f;
            squares += y[chunk][i] * y[chunk][i];
        }
    }
    const float reciprocal = rsqrtf(warp_sum(squares) * (1.0f / KEY_WIDTH) + eps);

    uint32_t words[CHUNKS][TILE_VECTOR / 2];
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
        for (int i = 0; i < TILE_VECTOR; ++i) y[chunk][i] = w[chunk][i] * (y[chunk][i] * reciprocal) + b[chunk][i];
        round_to_bf16(y[chunk], words[chunk]);
    }
    const float* rotary = nullptr;
    if constexpr (HALF) {
        float* own = shared.rotary[warp];
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
            for (int i = 0; i < TILE_VECTOR; ++i) {
                const int column = (chunk * 32 + lane) * TILE_VECTOR + i;
                if (column < ROPE) own[column] = y[chunk][i];
            }
        }
        __syncwarp();
        rotary = own;
    }
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        rotate(y[chunk], (chunk * 32 + lane) * TILE_VECTOR, turns[chunk], rotary);
        round_to_bf16(y[chunk], words[chunk]);
    }

    if (slot < 0 || slot >= slots) return;
    if constexpr (KEY_FP8) {
        uint32_t largest = 0;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) largest = max(largest, largest_magnitude(y[chunk]));
        const float scale = e4m3_scale(__uint_as_float(__reduce_max_sync(0xffffffffu, largest)));
        const int page = static_cast<int>(slot) / page_size, place = static_cast<int>(slot) % page_size;
        uint8_t* codes = cache + static_cast<int64_t>(page) * page_size * (KEY_WIDTH + 4);
        if (lane == 0) reinterpret_cast<float*>(codes + static_cast<int64_t>(page_size) * KEY_WIDTH)[place] = scale;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            const int column = (chunk * 32 + lane) * TILE_VECTOR;
            uint32_t packed[TILE_VECTOR / 4];
            quantise(y[chunk], scale, packed);
            if (column < KEY_WIDTH) store_words(codes + static_cast<int64_t>(place) * KEY_WIDTH + column, packed);
        }
    } else {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            const int column = (chunk * 32 + lane) * TILE_VECTOR;
            if (column < KEY_WIDTH) store_words(cache + 2 * (slot * KEY_WIDTH + column), words[chunk]);
        }
    }
}

} // namespace key
