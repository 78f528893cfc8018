// RoPE in place on some columns of every head: a block a token.
//
// Constants: PAIRS of a head; HALF (pairs are PAIRS columns apart) or neighbours; VECTOR neighbouring columns of a load, which divide
// what lies between any two places that are loaded from. Tile: TILE_WARPS warps a block.
//
// A rotated value is off by at most 2 u (|a cos| + |b sin|), u = 2^-24, and is then rounded to bf16.
#include "rows.cuh"

constexpr int THREADS = 32 * TILE_WARPS;
// Pairs of a thread, which come in so many loads.
constexpr int GROUP = HALF ? VECTOR : (VECTOR + 1) / 2, LOADS = 2 * GROUP / VECTOR;
constexpr int GROUPS = PAIRS / GROUP;
static_assert(PAIRS % GROUP == 0, "a head is whole groups, and aligned as they are");

KERNEL void __launch_bounds__(THREADS, 1)
rope(uint16_t* __restrict__ x,           // [rows, heads, width] bf16
     const float2* __restrict__ cos_sin, // [rows, PAIRS]
     int heads, int width, int offset) { // columns offset..offset + 2 * PAIRS
    const int64_t row = blockIdx.x;
    for (int unit = threadIdx.x; unit < heads * GROUPS; unit += THREADS) {
        const int head = unit / GROUPS, pair = unit % GROUPS * GROUP;
        uint16_t* const columns = x + (row * heads + head) * width + offset;
        uint16_t* places[LOADS];
        uint32_t words[LOADS][(VECTOR + 1) / 2];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            places[i] = columns + (HALF ? pair + i * PAIRS : 2 * pair + i);
            load_bf16<VECTOR>(places[i], words[i]);
        }
        float turns[2 * GROUP];
        load_weights<F32>(cos_sin + row * PAIRS, 2 * pair, turns);

        float values[LOADS][VECTOR];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) widen_bf16(words[i], values[i]);
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
            const int first = HALF ? i : 2 * i, second = HALF ? GROUP + i : 2 * i + 1;
            float& a = values[first / VECTOR][first % VECTOR];
            float& b = values[second / VECTOR][second % VECTOR];
            turn_pair(a, b, turns[2 * i], turns[2 * i + 1]);
        }
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            narrow_to_bf16(values[i], words[i]);
            store_bf16<VECTOR>(places[i], words[i]);
        }
    }
}
