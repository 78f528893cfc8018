// MLA's cache rows by themselves: a warp each.
//
// Constants and tile: those of latent_rope.cuh, TILE_WARPS rows a block.
#include "latent_rope.cuh"

KERNEL void __launch_bounds__(TILE_WARPS * 32, 1)
latent_rope(const uint16_t* __restrict__ x,           // [rows, RANK + ROPE] bf16
            const void* __restrict__ weight,          // [RANK]
            const float2* __restrict__ cos_sin,       // [rows, ROPE / 2]
            const int64_t* __restrict__ slot_mapping, // [rows]
            uint8_t* __restrict__ cache,              // [slots, RANK + ROPE] bf16, or [slots, ROW_BYTES]
            int slots, int rows, float eps) {
    const int row = blockIdx.x * TILE_WARPS + threadIdx.x / 32;
    if (row < rows) latent::write_row(x, weight, cos_sin, slot_mapping, cache, slots, row, eps);
}
