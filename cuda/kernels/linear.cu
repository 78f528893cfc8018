// `linear`, `linear_split`, `swiglu` and `lm_head` for many tokens: out[t, o] = weight[o] . x[t].
//
// The steps of all tiles lie in a row, the tiles of a weight's features side by side, and every block takes an equal stretch of it. Where
// the stretches are whole tiles that is one tile a block. Otherwise blocks share tiles: each leaves its part of one, and the last to
// arrive adds the parts up in their order. So a last wave that would be mostly empty costs nothing.
//
// Constants and tile: those of linear_tiles.cuh, TILE_BLOCKS.
#include "linear_tiles.cuh"

// The block whose stretch holds step `at` of `total`, and where the stretch of `block` begins.
DEVICE int block_of(int at, int total) { return static_cast<int>((static_cast<int64_t>(at + 1) * gridDim.x - 1) / total); }
DEVICE int begin_of(int block, int total) { return static_cast<int>(static_cast<int64_t>(block) * total / gridDim.x); }

// The tile that step `at` is of.
DEVICE int first_token(int at, const Stretches& all) { return at / all.steps % all.token_tiles * TILE_TOKENS; }
DEVICE int first_feature(int at, const Stretches& all) { return at / all.steps / all.token_tiles * TILE_FEATURES; }

// Leaves the part `c` of the tile that step `at` is of. True in the last block to do so, where `c` becomes the sum of all.
DEVICE bool add_parts(Shared& shared, float (&c)[M][N][4], float4* parts, uint32_t* arrivals, int at) {
    constexpr int PART = M * N * THREADS, BATCH = M * N < 16 ? M * N : 16;
    static_assert(M * N % BATCH == 0, "whole batches");
    const int steps = shared.stretches.steps, total = shared.stretches.total, tile = at / steps;
    const int first = block_of(tile * steps, total), last = block_of(tile * steps + steps - 1, total);
    // A block has two parts at most: of the tile that its stretch begins in, and of the one that it ends in, of which it is the first.
    float4* own = parts + (2 * static_cast<int64_t>(blockIdx.x) + (blockIdx.x == first)) * PART + threadIdx.x;
#pragma unroll
    for (int i = 0; i < M * N; ++i) {
        const float(&four)[4] = c[i / N][i % N];
        own[i * THREADS] = make_float4(four[0], four[1], four[2], four[3]);
    }
    if (!arrive_last(arrivals + tile, last - first + 1, shared.last)) return false;
    clear(c);
#pragma unroll 1
    for (int block = first; block <= last; ++block) {
        const float4* part = parts + (2 * static_cast<int64_t>(block) + (block == first)) * PART + threadIdx.x;
#pragma unroll
        for (int begin = 0; begin < M * N; begin += BATCH) {
            // All are under way before the first is waited for.
            float4 batch[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; ++i) batch[i] = load_published_16(part + (begin + i) * THREADS);
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                float(&sum)[4] = c[(begin + i) / N][(begin + i) % N];
                sum[0] += batch[i].x, sum[1] += batch[i].y, sum[2] += batch[i].z, sum[3] += batch[i].w;
            }
        }
    }
    return true;
}

KERNEL void __launch_bounds__(THREADS, TILE_BLOCKS)
linear(const uint16_t* __restrict__ x,       // [x_rows, columns] bf16
       const int32_t* __restrict__ gathered, // [tokens] rows of x, or null: one after the other
       const uint8_t* __restrict__ weight,   // [features, columns]
       uint8_t* first,                        // [tokens, first_end] bf16, or floats, as the others
       uint8_t* second,                       // [tokens, second_end - first_end], or null
       uint8_t* third,                        // [tokens, third_end - second_end], or null
       uint8_t* fourth,                       // [tokens, features - third_end], or null
       float* __restrict__ parts,            // [blocks, 2, M * N, THREADS, 4]
       uint32_t* __restrict__ arrivals,      // [tiles], zero
       int x_rows, int tokens, int columns, int features, int first_end, int second_end, int third_end,
       int floats) {
    Shared& shared = shared_memory<Shared>();
    const Outputs outputs = {first, second, third, fourth, first_end, second_end, third_end, features, floats};
    const Operands in = {x, gathered, weight, x_rows, tokens, columns, features, columns};
    // In shared memory: the products need every register.
    Stretches& all = shared.stretches;
    if (threadIdx.x == 0) {
        all.steps = (columns + COLUMNS - 1) / COLUMNS;
        all.token_tiles = (tokens + TILE_TOKENS - 1) / TILE_TOKENS;
        all.total = all.token_tiles * ((features + TILE_FEATURES - 1) / TILE_FEATURES) * all.steps;
        all.end = begin_of(blockIdx.x + 1, all.total);
    }
    __syncthreads();

    float c[M][N][4];
    for (int at = begin_of(blockIdx.x, all.total); at < all.end;) {
        const int from = at % all.steps, to = min(all.steps, from + all.end - at);
        multiply_tile(shared, in, first_token(at, all), first_feature(at, all), from, to, c);
        if (to - from == all.steps || add_parts(shared, c, reinterpret_cast<float4*>(parts), arrivals, at)) {
            store_tile(c, first_token(at, all), first_feature(at, all), tokens, [&](int token, int feature, const auto&... values) {
                if constexpr (SWIGLU) {
                    outputs.store_swiglu(token, feature, values...);
                } else {
                    outputs.store(token, feature, values...);
                }
            });
        }
        at += to - from;
    }
}
