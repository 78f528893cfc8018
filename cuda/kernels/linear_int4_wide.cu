// out = x W^T for a packed INT4 weight and many tokens: blocks of features x tokens. Activations pass through shared memory in
// TILE_STAGES steps of 64 inputs; the weight comes straight to the registers of the warp that unpacks it, a step before that.
//
// Warps lie TILE_WARPS_ROWS along the features and TILE_WARPS_TOKENS along the tokens, each with TILE_ROW_TILES tiles of 16 features and
// TILE_TOKEN_TILES of 8 tokens. A warp unpacks a step's fragments once, then goes through its tokens: the products of one group live for
// a tile or two of tokens only, so that their scaled sums can have the registers. With TILE_AHEAD it unpacks the next step's while the
// tensor core is busy with this one's.
//
// Constants: those of linear_int4.cuh.
#include "linear_int4.cuh"

constexpr int R = TILE_ROW_TILES, N = TILE_TOKEN_TILES;
constexpr int ROW_TILES = TILE_WARPS_ROWS * R, TOKENS = TILE_WARPS_TOKENS * N * 8, THREADS = TILE_WARPS_ROWS * TILE_WARPS_TOKENS * 32;
// Tiles of tokens at a time: enough independent products to keep the tensor core busy, no more registers than that takes.
constexpr int M = R >= 3 ? 1 : 2;
static_assert(N % M == 0, "whole turns");

// What a block's warps share of a step.
struct Stage {
    // 16-byte pieces of a token's 64 activations: piece i lies at i ^ 4 in odd rows, so that two rows' fragments meet all banks.
    uint4 x[TOKENS][8];
    Int4Scale<SCALE_TYPE> scales[ROW_TILES][GROUPS_PER_TILE][8];
};

struct Shared {
    Stage stages[TILE_STAGES];
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher's sum");

// A thread's part of the copies of a block's steps. What lies beyond the weight or the tokens is the last tile or token again: its results
// are dropped.
struct Loader {
    static constexpr int PIECES = TOKENS * 8, PAIRS = ROW_TILES * GROUPS_PER_TILE * 8;
    const uint16_t* x;
    const Int4Weight& weight;
    int tokens, in_features, row_tile, token;
    uint32_t pieces[(PIECES + THREADS - 1) / THREADS], pairs[(PAIRS + THREADS - 1) / THREADS];

    // In bytes of 32 bits, which the launcher has counted.
    DEVICE void prepare() {
#pragma unroll
        for (uint32_t i = 0; i < (PIECES + THREADS - 1) / THREADS; ++i) {
            const int row = min(token + static_cast<int>((i * THREADS + threadIdx.x) / 8), tokens - 1);
            pieces[i] = (static_cast<uint32_t>(row * in_features) + threadIdx.x % 8 * 8) * sizeof(uint16_t);
        }
#pragma unroll
        for (uint32_t i = 0; i < (PAIRS + THREADS - 1) / THREADS; ++i) {
            const uint32_t place = i * THREADS + threadIdx.x, tile = place / 8 / GROUPS_PER_TILE;
            pairs[i] = static_cast<uint32_t>(min(row_tile + static_cast<int>(tile), weight.row_tiles - 1) * weight.groups) * 8 + place % 8;
        }
    }

    // Starts those of k tile `k_tile`.
    DEVICE void start(Stage& stage, int k_tile) const {
        const uint32_t thread = threadIdx.x;
        const auto* k_x = reinterpret_cast<const uint8_t*>(x + k_tile * 64);
        const int input = k_tile * 64 + thread % 8 * 8;
        // A thread's rows are all even or all odd.
        static_assert(THREADS % 16 == 0, "whole pairs of rows");
        uint4* first = &stage.x[thread / 8][thread % 8 ^ 4 * (thread / 8 % 2)];
#pragma unroll
        for (uint32_t i = 0; i < (PIECES + THREADS - 1) / THREADS; ++i) {
            if (PIECES % THREADS != 0 && i * THREADS + thread >= PIECES) break;
            uint4* to = first + i * THREADS;
            if constexpr (ALIGNED == 2) {
                cp_async_16(to, k_x + pieces[i]);
            } else if constexpr (ALIGNED == 1) {
                const bool valid = input < in_features;
                cp_async_16_or_zero(to, valid ? k_x + pieces[i] : k_x, valid);
            } else {
                const int row = static_cast<int>((i * THREADS + thread) / 8);
                *to = activations(x, token + row, input, tokens, in_features);
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < (PAIRS + THREADS - 1) / THREADS; ++i) {
            const uint32_t place = i * THREADS + thread, tile = place / 8 / GROUPS_PER_TILE, part = place / 8 % GROUPS_PER_TILE;
            if (PAIRS % THREADS != 0 && place >= PAIRS) break;
            const auto* scale =
                static_cast<const Int4Scale<SCALE_TYPE>*>(weight.scales) + (pairs[i] + weight.group(k_tile, static_cast<int>(part)) * 8);
            if constexpr (SCALE_TYPE == F32) {
                cp_async_8(&stage.scales[tile][part][place % 8], scale);
            } else {
                cp_async_4(&stage.scales[tile][part][place % 8], scale);
            }
        }
    }
};

// What a lane needs of a step's weight.
struct Packed {
    uint4 words[R];
    uint32_t zeros[R][GROUPS_PER_TILE];

    // `places` are those of its tiles of the first step, in bytes of 32 bits.
    DEVICE void load(const Int4Weight& weight, const uint32_t (&places)[R], int row_tile, int k_tile) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
            words[r] = load_once_16(reinterpret_cast<const uint8_t*>(weight.words + k_tile * 32) + places[r]);
#pragma unroll
            for (int part = 0; part < GROUPS_PER_TILE; ++part) {
                if constexpr (ZERO_POINTS) {
                    const int tile = min(row_tile + r, weight.row_tiles - 1);
                    zeros[r][part] = weight.zeros[weight.group_index(tile, k_tile, part) + threadIdx.x % 32 / 4];
                }
            }
        }
    }

    DEVICE void unpack(uint32_t (&a)[R][4][4]) const {
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const uint32_t all[4] = {words[r].x, words[r].y, words[r].z, words[r].w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t pair = ZERO_POINTS ? zeros[r][i / WORDS_PER_GROUP] : 0x88u;
                int4_fragment(all[i], int4_offset(pair), int4_offset(pair >> 4), a[r][i]);
            }
        }
    }
};

// The products of a step on top of the sums.
DEVICE void multiply(const Stage& stage, const uint32_t (&a)[R][4][4], int row_tile, int token, float (&sums)[R][N][4]) {
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int part = 0; part < GROUPS_PER_TILE; ++part) {
        float2 scales[R];
#pragma unroll
        for (int r = 0; r < R; ++r) scales[r] = stage.scales[row_tile + r][part][g].widen();
#pragma unroll
        for (int n = 0; n < N; n += M) {
            float products[M][R][4] = {};
            uint4 x[M][WORDS_PER_GROUP / 2];
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int h = 0; h < WORDS_PER_GROUP / 2; ++h) {
                    const uint32_t piece = 4 * (part + h) + t;
                    x[m][h] = stage.x[token + 8 * (n + m) + g][piece ^ 4 * (g % 2)];
                }
            }
#pragma unroll
            for (int i = 0; i < WORDS_PER_GROUP; ++i) {
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    const uint4 eight = x[m][i / 2];
                    const uint32_t b[2] = {i % 2 == 0 ? eight.x : eight.z, i % 2 == 0 ? eight.y : eight.w};
#pragma unroll
                    for (int r = 0; r < R; ++r) mma_bf16(products[m][r], a[r][part * WORDS_PER_GROUP + i], b);
                }
            }
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int r = 0; r < R; ++r) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[r][n + m][i] += (i < 2 ? scales[r].x : scales[r].y) * products[m][r][i];
                }
            }
        }
    }
}

KERNEL void __launch_bounds__(THREADS, TILE_BLOCKS)
linear_int4_wide(const uint16_t* __restrict__ x,    // [tokens, in_features] bf16
                 const uint4* __restrict__ words,   // [row_tiles, k_tiles, 32]
                 const void* __restrict__ scales,   // [row_tiles, groups, 8] pairs
                 const uint8_t* __restrict__ zeros, // [row_tiles, groups, 8], or null
                 void* __restrict__ out,            // [tokens, out_features] bf16 or f32
                 float4* __restrict__ partials,     // [token blocks, row blocks, splits, R * N, THREADS], where there are splits
                 uint32_t* __restrict__ tickets,    // [token blocks, row blocks], zero
                 int tokens, int in_features, int out_features, int groups, int group_size, int k_tiles_per_split) {
    Shared& shared = shared_memory<Shared>();
    const int row_tiles = (out_features + FEATURES_PER_TILE - 1) / FEATURES_PER_TILE, k_tiles = (in_features + 63) / 64;
    const Int4Weight weight{words, scales, zeros, row_tiles, k_tiles, groups, group_size};
    const int row_tile = blockIdx.x * ROW_TILES, token = blockIdx.y * TOKENS;
    Loader loader{x, weight, tokens, in_features, row_tile, token};
    loader.prepare();
    const int first = blockIdx.z * k_tiles_per_split, end = min(first + k_tiles_per_split, weight.k_tiles);
    const int warp = threadIdx.x / 32, own_row_tile = warp / TILE_WARPS_TOKENS * R, own_token = warp % TILE_WARPS_TOKENS * (8 * N);

#pragma unroll
    for (int s = 0; s < TILE_STAGES - 1; ++s) {
        if (first + s < end) loader.start(shared.stages[s], first + s);
        cp_async_commit();
    }
    uint32_t places[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const int tile = min(row_tile + own_row_tile + r, weight.row_tiles - 1);
        places[r] = (static_cast<uint32_t>(tile * weight.k_tiles) * 32 + threadIdx.x % 32) * sizeof(uint4);
    }
    Packed packed;
    uint32_t a[TILE_AHEAD + 1][R][4][4];
    if (first < end) packed.load(weight, places, row_tile + own_row_tile, first);
    if constexpr (TILE_AHEAD) {
        packed.unpack(a[0]);
        if (first + 1 < end) packed.load(weight, places, row_tile + own_row_tile, first + 1);
    }
    float sums[R][N][4] = {};
    int stage = 0;
    for (int base = first; base < end; base += TILE_AHEAD + 1) {
#pragma unroll
        for (int i = 0; i < TILE_AHEAD + 1; ++i) {
            const int k_tile = base + i;
            if (k_tile >= end) break;
            cp_async_wait<TILE_STAGES - 2>();
            // This step's operands are there, and the step before's are no longer read.
            __syncthreads();
            const int ahead = k_tile + TILE_STAGES - 1, free = stage == 0 ? TILE_STAGES - 1 : stage - 1;
            if (ahead < end) loader.start(shared.stages[free], ahead);
            cp_async_commit();
            packed.unpack(a[(i + TILE_AHEAD) % (TILE_AHEAD + 1)]);
            if (k_tile + 1 + TILE_AHEAD < end) packed.load(weight, places, row_tile + own_row_tile, k_tile + 1 + TILE_AHEAD);
            multiply(shared.stages[stage], a[i], own_row_tile, own_token, sums);
            stage = stage == TILE_STAGES - 1 ? 0 : stage + 1;
        }
    }

    const int splits = gridDim.z, group = blockIdx.y * gridDim.x + blockIdx.x;
    if (splits == 1) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const float4 sum = make_float4(sums[r][n][0], sums[r][n][1], sums[r][n][2], sums[r][n][3]);
                store_fragment(out, sum, row_tile + own_row_tile + r, token + own_token + 8 * n, out_features, tokens);
            }
        }
        return;
    }
    float4* all = partials + static_cast<int64_t>(group) * splits * (R * N * THREADS) + threadIdx.x;
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const float4 sum = make_float4(sums[r][n][0], sums[r][n][1], sums[r][n][2], sums[r][n][3]);
            all[(static_cast<int>(blockIdx.z) * (R * N) + r * N + n) * THREADS] = sum;
        }
    }
    if (!is_last_block(tickets + group, splits)) return;
#pragma unroll 1
    for (int i = 0; i < R * N; ++i) {
        float4 sum = load_published_16(all + i * THREADS);
#pragma unroll 1
        for (int split = 1; split < splits; ++split) add(sum, load_published_16(all + (split * (R * N) + i) * THREADS));
        store_fragment(out, sum, row_tile + own_row_tile + i / N, token + own_token + 8 * (i % N), out_features, tokens);
    }
}
