// SwiGLU, element by element: out = silu(gate) * up, silu(x) = x / (1 + exp(-x)).
//
// Tile: TILE_WARPS warps a block, TILE_VECTORS vectors of eight elements that a thread has under way.
#include "silu.cuh"

constexpr int THREADS = 32 * TILE_WARPS;
constexpr int VECTOR = 8;
constexpr int BLOCK = THREADS * TILE_VECTORS * VECTOR;

KERNEL void __launch_bounds__(THREADS, 1)
silu_mul(const uint16_t* __restrict__ gate, // [count] bf16
         const uint16_t* __restrict__ up,   // [count] bf16
         uint16_t* __restrict__ out,        // [count] bf16
         int64_t count) {
    const int64_t start = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x * VECTOR, whole = count / VECTOR * VECTOR;
    uint32_t gates[TILE_VECTORS][VECTOR / 2] = {}, ups[TILE_VECTORS][VECTOR / 2] = {};
#pragma unroll
    for (int i = 0; i < TILE_VECTORS; ++i) {
        const int64_t place = start + i * THREADS * VECTOR;
        if (place < whole) {
            load_bf16<VECTOR>(gate + place, gates[i]);
            load_bf16<VECTOR>(up + place, ups[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < TILE_VECTORS; ++i) {
        const int64_t place = start + i * THREADS * VECTOR;
        float g[VECTOR], u[VECTOR];
        widen_bf16(gates[i], g);
        widen_bf16(ups[i], u);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) g[j] = swiglu(g[j], u[j]);
        uint32_t words[VECTOR / 2];
        narrow_to_bf16(g, words);
        if (place < whole) store_bf16<VECTOR>(out + place, words);
    }
    // The few after the last whole vector.
    const int64_t place = whole + threadIdx.x;
    if (blockIdx.x == gridDim.x - 1 && place < count) {
        out[place] = float_to_bf16(swiglu(bf16_to_float(gate[place]), bf16_to_float(up[place])));
    }
}
