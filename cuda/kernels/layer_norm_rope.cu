// The indexer's keys by themselves: a warp each.
//
// Constants and tile: those of layer_norm_rope.cuh.
#include "layer_norm_rope.cuh"

static_assert(!HALF || sizeof(key::Shared) == TILE_SHARED_BYTES, "the launcher's sum");

KERNEL void __launch_bounds__(TILE_WARPS * 32, 1)
layer_norm_rope(const uint16_t* __restrict__ x,           // [rows, KEY_WIDTH] bf16
                const void* __restrict__ weight,          // [KEY_WIDTH]
                const void* __restrict__ bias,            // [KEY_WIDTH]
                const float2* __restrict__ cos_sin,       // [rows, ROPE / 2]
                const int64_t* __restrict__ slot_mapping, // [rows]
                uint8_t* __restrict__ cache,              // [slots, KEY_WIDTH] bf16, or pages of codes and scales
                int slots, int page_size, int rows, float eps) {
    const int row = blockIdx.x * TILE_WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    key::write_row(shared_memory<key::Shared>(), x, weight, bias, cos_sin, slot_mapping, cache, slots, page_size, row, eps);
}
