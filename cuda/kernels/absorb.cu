// `absorb_query` and `absorb_output`: a product a head. The rotary columns of a query are turned on their way. A block takes a tile of a
// head, or the rotary columns of one: these need nothing of the product.
//
// Constants and tile: those of linear_tiles.cuh, TILE_BLOCKS; TRANSPOSED for the query, which meets the columns of kv_b.
//
// A rotated value is off by at most 2 u (|a cos| + |b sin|), u = 2^-24, and is then rounded to bf16: as in rope.cu, to the bit.
#include "linear_tiles.cuh"

// The tile's rows of a head's rotary columns, WIDTH neighbouring ones at a time.
template <int WIDTH>
DEVICE void turn_columns(const uint16_t* x, const float* cos_sin, uint16_t* out, int rows, int rotary, int64_t x_stride,
                         int64_t out_stride) {
    const int pieces = rotary / WIDTH;
    for (int i = threadIdx.x; i < rows * pieces; i += THREADS) {
        const int64_t row = i / pieces;
        const int column = i % pieces * WIDTH;
        float values[WIDTH], turns[WIDTH];
        if constexpr (WIDTH == 2) {
            // Neither aligned.
            const uint16_t* from = x + row * x_stride + column;
            values[0] = bf16_low(from[0]), values[1] = bf16_low(from[1]);
        } else {
            load_weights<BF16>(x, row * x_stride + column, values);
        }
        load_weights<F32>(cos_sin, row * rotary + column, turns);
#pragma unroll
        for (int j = 0; j < WIDTH; j += 2) turn_pair(values[j], values[j + 1], turns[j], turns[j + 1]);
        store_outputs(out + row * out_stride, column, rotary, false, WIDTH > 2, values);
    }
}

KERNEL void __launch_bounds__(THREADS, TILE_BLOCKS)
absorb(const uint16_t* __restrict__ x,       // [tokens, heads, x_width] bf16
       const uint8_t* __restrict__ weight,   // [heads, weight_head], of which the first `weight_first` of a head do not count
       const float* __restrict__ cos_sin,    // [tokens, x_width - columns], where TRANSPOSED
       uint16_t* __restrict__ out,           // [tokens, heads, out_width] bf16
       int tokens, int heads, int x_width, int columns, int out_width, int features, int64_t weight_head,
       int64_t weight_first) {
    Shared& shared = shared_memory<Shared>();
    const int head = blockIdx.z, first_token = blockIdx.x * TILE_TOKENS, first_feature = blockIdx.y * TILE_FEATURES;
    const int x_stride = heads * x_width;
    const int64_t out_stride = static_cast<int64_t>(heads) * out_width;
    const uint16_t* own = x + static_cast<int64_t>(head) * x_width;
    uint16_t* to = out + static_cast<int64_t>(head) * out_width;
    if (TRANSPOSED && first_feature >= features) {
        const int rotary = x_width - columns, rows = min(TILE_TOKENS, tokens - first_token);
        const uint16_t* from = own + static_cast<int64_t>(first_token) * x_stride + columns;
        const float* turns = cos_sin + static_cast<int64_t>(first_token) * rotary;
        uint16_t* turned = to + first_token * out_stride + features;
        if (VECTORS && rotary % 8 == 0 && out_width % 8 == 0) {
            turn_columns<8>(from, turns, turned, rows, rotary, x_stride, out_stride);
        } else {
            turn_columns<2>(from, turns, turned, rows, rotary, x_stride, out_stride);
        }
        return;
    }
    const uint8_t* rows_of_head = weight + (weight_head * head + weight_first) * WEIGHT_BYTES;
    const Operands in = {own, nullptr, rows_of_head, tokens, tokens, columns, features, x_stride};
    float c[M][N][4];
    multiply_tile(shared, in, first_token, first_feature, 0, (columns + COLUMNS - 1) / COLUMNS, c);
    store_tile(c, first_token, first_feature, tokens, [&](int token, int feature, const float(&pair)[2]) {
        store_outputs(to + token * out_stride, feature, features, false, out_width % 2 == 0, pair);
    });
}
