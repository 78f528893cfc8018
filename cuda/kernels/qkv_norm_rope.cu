// What follows a layer's first projections: the norm of the query's latent, MLA's cache rows and, where KEYS, the indexer's keys. Blocks do
// different things: the first a row of the query each, the next a warp's cache row each, the last a warp's key each.
//
// Constants and tile: those of rms_norm.cuh, latent_rope.cuh and, where KEYS, layer_norm_rope.cuh; TILE_WARPS of TILE_THREADS.
#include "latent_rope.cuh"
#include "rms_norm.cuh"
#if KEYS
#include "layer_norm_rope.cuh"
#endif

struct Shared {
    rms::Shared query;
#if KEYS
    key::Shared keys;
#endif
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher's sum");
static_assert(rms::THREADS == 32 * TILE_WARPS, "a block is as many warps, whatever it does");

KERNEL void __launch_bounds__(rms::THREADS, 1)
qkv_norm_rope(const uint16_t* __restrict__ q_a,          // [rows, WIDTH] bf16
              const void* __restrict__ q_weight,         // [WIDTH]
              uint16_t* __restrict__ q_latent,           // [rows, WIDTH] bf16
              const uint16_t* __restrict__ kv_a,         // [rows, RANK + ROPE] bf16
              const void* __restrict__ kv_weight,        // [RANK]
              uint8_t* __restrict__ cache,               // as latent_rope.cu has it
              const uint16_t* __restrict__ keys,         // [rows, KEY_WIDTH] bf16, where KEYS
              const void* __restrict__ key_weight,       // [KEY_WIDTH]
              const void* __restrict__ key_bias,         // [KEY_WIDTH]
              uint8_t* __restrict__ key_cache,           // as layer_norm_rope.cu has it
              const float2* __restrict__ cos_sin,        // [rows, ROPE / 2]
              const int64_t* __restrict__ slot_mapping,  // [rows]
              int slots, int key_slots, int page_size, int rows, float eps, float key_eps) {
    Shared& shared = shared_memory<Shared>();
    const int row_blocks = (rows + TILE_WARPS - 1) / TILE_WARPS, block = static_cast<int>(blockIdx.x) - rows;
    if (block < 0) return rms::norm_rows(shared.query, q_a, nullptr, q_weight, q_latent, blockIdx.x, rows, rows, eps);
    const int row = block % row_blocks * TILE_WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    if (block < row_blocks) return latent::write_row(kv_a, kv_weight, cos_sin, slot_mapping, cache, slots, row, eps);
#if KEYS
    key::write_row(shared.keys, keys, key_weight, key_bias, cos_sin, slot_mapping, key_cache, key_slots, page_size, row, key_eps);
#endif
}
