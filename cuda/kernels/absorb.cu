// `absorb_query` and `absorb_output`: a product a head. ROPE columns of a query pass through. A block takes a tile of a head.
//
// Constants and tile: those of linear_tiles.cuh, TILE_BLOCKS; TRANSPOSED for the query, which meets the columns of kv_b.
#include "linear_tiles.cuh"

KERNEL void __launch_bounds__(THREADS, TILE_BLOCKS)
absorb(const uint16_t* __restrict__ x,     // [tokens, heads, x_width] bf16
       const uint8_t* __restrict__ weight, // [heads, weight_head], of which the first `weight_first` of a head do not count
       uint16_t* __restrict__ out,         // [tokens, heads, out_width] bf16
       int tokens, int heads, int x_width, int columns, int out_width, int features, int64_t weight_head,
       int64_t weight_first) {
    Shared& shared = shared_memory<Shared>();
    const int head = blockIdx.z, first_token = blockIdx.x * TILE_TOKENS, first_feature = blockIdx.y * TILE_FEATURES;
    const int x_stride = heads * x_width;
    const int64_t out_stride = static_cast<int64_t>(heads) * out_width;
    const uint16_t* own = x + static_cast<int64_t>(head) * x_width;
    const uint8_t* rows_of_head = weight + (weight_head * head + weight_first) * WEIGHT_BYTES;
    const Operands in = {own, nullptr, rows_of_head, tokens, tokens, columns, features, x_stride};
    uint16_t* to = out + static_cast<int64_t>(head) * out_width;
    float c[M][N][4];
    multiply_tile(shared, in, first_token, first_feature, 0, (columns + COLUMNS - 1) / COLUMNS, c);
    store_tile(c, first_token, first_feature, tokens, [&](int token, int feature, const float(&pair)[2]) {
        store_outputs(to + token * out_stride, feature, features, false, out_width % 2 == 0, pair);
    });

    // What a row has beyond its columns; vectors where all of it is aligned.
    const int rotary = TRANSPOSED && blockIdx.y == 0 ? x_width - columns : 0, rows = min(TILE_TOKENS, tokens - first_token);
    const bool vectors = VECTORS && rotary % 8 == 0 && out_width % 8 == 0;
    const int width = vectors ? 8 : 1, pieces = rotary / width;
    for (int i = threadIdx.x; i < rows * pieces; i += THREADS) {
        const int64_t row = first_token + i / pieces;
        const int column = i % pieces * width;
        const uint16_t* read = own + row * x_stride + columns + column;
        uint16_t* written = to + row * out_stride + features + column;
        if (vectors) {
            *reinterpret_cast<uint4*>(written) = *reinterpret_cast<const uint4*>(read);
        } else {
            *written = *read;
        }
    }
}
