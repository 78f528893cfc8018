// MLA's cache row of a token: RMSNorm of the latent and RoPE of the shared key part, written to its slot by a warp, which holds it in
// registers.
//
// Constants: RANK, ROPE; LATENT_WEIGHT_TYPE; LATENT_FP8 (cache in 8 bits). Tile: TILE_VECTOR columns a lane and chunk.
//
// Arithmetic is f32 with u = 2^-24; CHUNKS * TILE_VECTOR + 5 additions lie on any path to the sum of squares, and five roundings beside
// them, so a normed value's relative error is at most (CHUNKS * TILE_VECTOR + 10) u / 2 + 2^-22 (rsqrtf) + 3 u; a rotated one's error is
// 2 u (|a cos| + |b sin|). Each is then rounded to bf16: both sides of a rounding boundary that lies within this distance are right.
#pragma once

#include "fp8.cuh"
#include "rows.cuh"

namespace latent {

constexpr int CHUNKS = (RANK + 32 * TILE_VECTOR - 1) / (32 * TILE_VECTOR);
constexpr int PAIRS = ROPE / 2;
// Values that share a scale, and the lanes that hold them: a chunk is one group or two.
constexpr int GROUP = 128, GROUP_LANES = GROUP / TILE_VECTOR;
constexpr int GROUPS = (RANK + GROUP - 1) / GROUP;
constexpr int USED_BYTES = RANK + 4 * GROUPS + 2 * ROPE, ROW_BYTES = (USED_BYTES + 15) / 16 * 16;
static_assert(RANK % 16 == 0 && (RANK + ROPE) % 8 == 0 && ROPE % 2 == 0, "vectors of a row are aligned, pairs are words");
static_assert(TILE_VECTOR == 4 || TILE_VECTOR == 8, "8 or 16 bytes of bf16");

DEVICE void write_row(const uint16_t* __restrict__ x, const void* __restrict__ weight, const float2* __restrict__ cos_sin,
                      const int64_t* __restrict__ slot_mapping, uint8_t* __restrict__ cache, int slots, int row, float eps) {
    const int lane = threadIdx.x % 32;
    // Everything is under way before anything is used: a row is one latency of memory.
    const int64_t slot = slot_mapping[row];
    x += static_cast<int64_t>(row) * (RANK + ROPE);
    cos_sin += static_cast<int64_t>(row) * PAIRS;
    float y[CHUNKS][TILE_VECTOR] = {}, w[CHUNKS][TILE_VECTOR] = {};
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        const int column = (chunk * 32 + lane) * TILE_VECTOR;
        if (column < RANK) {
            load_weights<BF16>(x, column, y[chunk]);
            load_weights<LATENT_WEIGHT_TYPE>(weight, column, w[chunk]);
        }
    }
    uint32_t rotary[(PAIRS + 31) / 32] = {};
#pragma unroll
    for (int pair = lane, i = 0; i < (PAIRS + 31) / 32; pair += 32, ++i) {
        if (pair < PAIRS) {
            const uint32_t key = reinterpret_cast<const uint32_t*>(x + RANK)[pair];
            const float2 turn = cos_sin[pair];
            float a = bf16_low(key), b = bf16_high(key);
            turn_pair(a, b, turn.x, turn.y);
            rotary[i] = pack_bf16(a, b);
        }
    }

    float squares = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
        for (int i = 0; i < TILE_VECTOR; ++i) squares += y[chunk][i] * y[chunk][i];
    }
    const float reciprocal = rsqrtf(warp_sum(squares) * (1.0f / RANK) + eps);
    uint32_t words[CHUNKS][TILE_VECTOR / 2];
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
        for (int i = 0; i < TILE_VECTOR; ++i) y[chunk][i] = w[chunk][i] * (y[chunk][i] * reciprocal);
        round_to_bf16(y[chunk], words[chunk]);
    }

    if (slot < 0 || slot >= slots) return;
    uint8_t* out = cache + slot * (LATENT_FP8 ? ROW_BYTES : 2 * (RANK + ROPE));
    if constexpr (LATENT_FP8) {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            const int column = (chunk * 32 + lane) * TILE_VECTOR;
            const uint32_t own = largest_magnitude(y[chunk]);
            uint32_t largest = 0;
#pragma unroll
            for (int group = 0; group < 32 / GROUP_LANES; ++group) {
                const bool inside = lane / GROUP_LANES == group;
                const uint32_t of_group = __reduce_max_sync(0xffffffffu, inside ? own : 0u);
                if (inside) largest = of_group;
            }
            const float scale = e4m3_scale(__uint_as_float(largest));
            uint32_t packed[TILE_VECTOR / 4];
            quantise(y[chunk], scale, packed);
            if (column < RANK) {
                store_words(out + column, packed);
                if (column % GROUP == 0) reinterpret_cast<float*>(out + RANK)[column / GROUP] = scale;
            }
        }
        if (lane < (ROW_BYTES - USED_BYTES) / 4) reinterpret_cast<uint32_t*>(out + USED_BYTES)[lane] = 0;
    } else {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            const int column = (chunk * 32 + lane) * TILE_VECTOR;
            if (column < RANK) store_words(out + 2 * column, words[chunk]);
        }
    }
    uint32_t* key = reinterpret_cast<uint32_t*>(out + (LATENT_FP8 ? RANK + 4 * GROUPS : 2 * RANK));
#pragma unroll
    for (int pair = lane, i = 0; i < (PAIRS + 31) / 32; pair += 32, ++i) {
        if (pair < PAIRS) key[pair] = rotary[i];
    }
}

} // namespace latent
