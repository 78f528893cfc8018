// Token rows of a vocabulary shard, zeros for tokens of other shards: a block a token.
//
// Constants: TABLE_TYPE; FLOATS (out is f32, not bf16); VECTOR neighbouring columns of a load, which divide a row.
// Tile: TILE_WARPS warps a block.
#include "rows.cuh"

constexpr int THREADS = 32 * TILE_WARPS;

KERNEL void __launch_bounds__(THREADS, 1)
embed(const int32_t* __restrict__ token_ids, // [rows]
      const void* __restrict__ table,        // [vocab, width]
      void* __restrict__ out,                // [rows, width] bf16 or f32
      int64_t vocab_start, int64_t vocab, int width) {
    const int64_t row = token_ids[blockIdx.x] - vocab_start;
    const bool inside = row >= 0 && row < vocab;
#pragma unroll 4
    for (int column = threadIdx.x * VECTOR; column < width; column += THREADS * VECTOR) {
        float values[VECTOR] = {};
        if (inside) load_weights<TABLE_TYPE>(table, row * width + column, values);
        const int64_t place = static_cast<int64_t>(blockIdx.x) * width + column;
        if constexpr (FLOATS) {
            uint32_t words[VECTOR];
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) words[i] = __float_as_uint(values[i]);
            store_words(static_cast<float*>(out) + place, words);
        } else {
            uint32_t words[(VECTOR + 1) / 2];
            narrow_to_bf16(values, words);
            store_bf16<VECTOR>(static_cast<uint16_t*>(out) + place, words);
        }
    }
}
