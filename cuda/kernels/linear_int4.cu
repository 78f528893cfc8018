// out = x W^T for a packed INT4 weight and few tokens: the weight streams once from global memory past them.
//
// A block has TILE_ROW_TILES tiles of 16 features and a share of the inputs; its warps take turns at the tiles of 64 inputs, several of
// them under way at a time. Whatever a lane needs of a tile it copies to shared memory itself, 16 bytes of the weight and 16 consecutive
// bytes of a token at a time, so no thread waits for another until the warps add up.
//
// Constants: those of linear_int4.cuh.
// Tile: TILE_WARPS; TILE_ROW_TILES of a block; TILE_TOKEN_TILES of 8 tokens; TILE_STAGES k tiles of a warp under way.
#include "linear_int4.cuh"

constexpr int R = TILE_ROW_TILES, N = TILE_TOKEN_TILES;

// What a warp needs for a k tile, a place a lane.
struct Stage {
    uint4 weight[R][32];
    uint4 x[N][2][32];
    Int4Scale<SCALE_TYPE> scales[R][GROUPS_PER_TILE][32];
    // The four zero points among which a lane's are.
    uint32_t zeros[R][GROUPS_PER_TILE][32];
};

union WarpShared {
    Stage stages[TILE_STAGES];
    // What warps hand to each other in the end: accumulator fragments.
    float4 sums[R * N][32];
};

struct Shared {
    WarpShared warps[TILE_WARPS];
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher's sum");

// Whether the groups of a warp's tiles are equally far apart, and none lies beyond the last.
constexpr bool EVEN_GROUPS =
    GROUP_SIZE != 0 && 64 * TILE_WARPS % (GROUP_SIZE + (GROUP_SIZE == 0)) == 0 && (GROUPS_PER_TILE == 1 || ALIGNED == 2);
constexpr int GROUPS_APART = EVEN_GROUPS ? 64 * TILE_WARPS / (GROUP_SIZE + (GROUP_SIZE == 0)) : 0;

// Where a lane reads: a warp's k tiles are TILE_WARPS apart, and counted from the one that it is at.
struct Lane {
    const Int4Weight& weight;
    const uint16_t* x;
    int tokens, in_features, token, row_tile, k_tile;
    const uint4* words[R];
    const uint16_t* activation[N];
    bool inside[N];
    int64_t group[R];

    // A block's last tiles may be beyond the weight: they are read again and their results dropped.
    DEVICE int tile(int r) const { return min(row_tile + r, weight.row_tiles - 1); }

    DEVICE void start() {
        const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int r = 0; r < R; ++r) {
            words[r] = weight.words + (static_cast<int64_t>(tile(r)) * weight.k_tiles + k_tile) * 32 + lane;
            group[r] = weight.group_index(tile(r), k_tile, 0) + g;
        }
#pragma unroll
        for (int n = 0; n < N; ++n) {
            inside[n] = token + 8 * n + g < tokens;
            activation[n] = x + (inside[n] ? static_cast<int64_t>(token + 8 * n + g) * in_features : 0) + 64 * k_tile + 8 * t;
        }
    }

    DEVICE void advance() {
        k_tile += TILE_STAGES * TILE_WARPS;
#pragma unroll
        for (int r = 0; r < R; ++r) {
            words[r] += TILE_STAGES * TILE_WARPS * 32;
            group[r] += TILE_STAGES * GROUPS_APART * 8;
        }
#pragma unroll
        for (int n = 0; n < N; ++n) activation[n] += TILE_STAGES * TILE_WARPS * 64;
    }

    // Starts the copies of its k tile number `ahead`.
    DEVICE void load(Stage& stage, int ahead) const {
        const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int r = 0; r < R; ++r) cp_async_16(&stage.weight[r][lane], words[r] + ahead * (TILE_WARPS * 32));
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int input = 64 * (k_tile + ahead * TILE_WARPS) + 32 * h + 8 * t;
                if constexpr (ALIGNED != 0) {
                    const bool valid = inside[n] && (ALIGNED == 2 || input < in_features);
                    const uint16_t* from = activation[n] + ahead * (TILE_WARPS * 64) + 32 * h;
                    cp_async_16_or_zero_l1(&stage.x[n][h][lane], ALIGNED == 2 || valid ? from : x, valid);
                } else {
                    stage.x[n][h][lane] = activations(x, token + 8 * n + g, input, tokens, in_features);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
            for (int part = 0; part < GROUPS_PER_TILE; ++part) {
                const int64_t index = EVEN_GROUPS ? group[r] + (ahead * GROUPS_APART + part) * 8
                                                  : weight.group_index(tile(r), k_tile + ahead * TILE_WARPS, part) + g;
                const auto* scale = static_cast<const Int4Scale<SCALE_TYPE>*>(weight.scales) + index;
                if constexpr (SCALE_TYPE == F32) {
                    cp_async_8(&stage.scales[r][part][lane], scale);
                } else {
                    cp_async_4(&stage.scales[r][part][lane], scale);
                }
                if constexpr (ZERO_POINTS) cp_async_4(&stage.zeros[r][part][lane], weight.zeros + (index - g % 4));
            }
        }
    }
};

// The products of a k tile on top of the sums.
DEVICE void multiply(const Stage& stage, float (&sums)[R][N][4]) {
    const uint32_t lane = threadIdx.x % 32, g = lane / 4;
    uint4 x[N][2];
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) x[n][h] = stage.x[n][h][lane];
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const uint4 four = stage.weight[r][lane];
        const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int part = 0; part < GROUPS_PER_TILE; ++part) {
            uint32_t low = INT4_OFFSET_SYMMETRIC, high = INT4_OFFSET_SYMMETRIC;
            if constexpr (ZERO_POINTS) {
                const uint32_t zeros = stage.zeros[r][part][lane] >> (8 * (g % 4));
                low = int4_offset(zeros), high = int4_offset(zeros >> 4);
            }
            float products[N][4] = {};
#pragma unroll
            for (int word = part * WORDS_PER_GROUP; word < (part + 1) * WORDS_PER_GROUP; ++word) {
                uint32_t a[4];
                int4_fragment(words[word], low, high, a);
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    const uint4 eight = x[n][word / 2];
                    const uint32_t b[2] = {word % 2 == 0 ? eight.x : eight.z, word % 2 == 0 ? eight.y : eight.w};
                    mma_bf16(products[n], a, b);
                }
            }
            const float2 scale = stage.scales[r][part][lane].widen();
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[r][n][i] += (i < 2 ? scale.x : scale.y) * products[n][i];
            }
        }
    }
}

KERNEL void __launch_bounds__(TILE_WARPS * 32, TILE_BLOCKS)
linear_int4(const uint16_t* __restrict__ x,    // [tokens, in_features] bf16
            const uint4* __restrict__ words,   // [row_tiles, k_tiles, 32]
            const void* __restrict__ scales,   // [row_tiles, groups, 8] pairs
            const uint8_t* __restrict__ zeros, // [row_tiles, groups, 8], or null
            void* __restrict__ out,            // [tokens, out_features] bf16 or f32
            float4* __restrict__ partials,     // [token blocks, row blocks, splits, R * N, 32], where there are splits
            uint32_t* __restrict__ tickets,    // [token blocks, row blocks], zero
            int tokens, int in_features, int out_features, int groups, int group_size, int k_tiles_per_split) {
    Shared& shared = shared_memory<Shared>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row_tiles = (out_features + FEATURES_PER_TILE - 1) / FEATURES_PER_TILE, k_tiles = (in_features + 63) / 64;
    const Int4Weight weight{words, scales, zeros, row_tiles, k_tiles, groups, group_size};
    const int row_tile = blockIdx.x * R, token = blockIdx.z * (8 * N);
    const int end = min(static_cast<int>(blockIdx.y + 1) * k_tiles_per_split, weight.k_tiles);
    const int first = blockIdx.y * k_tiles_per_split + warp;

    WarpShared& own = shared.warps[warp];
    Lane from{weight, x, tokens, in_features, token, row_tile, first};
    from.start();
#pragma unroll
    for (int s = 0; s < TILE_STAGES; ++s) {
        if (first + s * TILE_WARPS < end) from.load(own.stages[s], s);
        cp_async_commit();
    }
    float sums[R][N][4] = {};
    for (; from.k_tile < end; from.advance()) {
#pragma unroll
        for (int s = 0; s < TILE_STAGES; ++s) {
            if (from.k_tile + s * TILE_WARPS >= end) break;
            cp_async_wait<TILE_STAGES - 1>();
            multiply(own.stages[s], sums);
            if (from.k_tile + (s + TILE_STAGES) * TILE_WARPS < end) from.load(own.stages[s], s + TILE_STAGES);
            cp_async_commit();
        }
    }

    // Lanes may be done with the stages at different times.
    __syncwarp();
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int n = 0; n < N; ++n) own.sums[r * N + n][lane] = make_float4(sums[r][n][0], sums[r][n][1], sums[r][n][2], sums[r][n][3]);
    }
    __syncthreads();
    const int splits = gridDim.y, group = blockIdx.z * gridDim.x + blockIdx.x;
    float4* all = partials + static_cast<int64_t>(group) * splits * (R * N * 32);
    for (int fragment = warp; fragment < R * N; fragment += TILE_WARPS) {
        float4 sum = shared.warps[0].sums[fragment][lane];
#pragma unroll
        for (int w = 1; w < TILE_WARPS; ++w) add(sum, shared.warps[w].sums[fragment][lane]);
        if (splits == 1) {
            store_fragment(out, sum, row_tile + fragment / N, token + fragment % N * 8, out_features, tokens);
        } else {
            all[(blockIdx.y * (R * N) + fragment) * 32 + lane] = sum;
        }
    }
    if (splits == 1 || !is_last_block(tickets + group, splits)) return;
    for (int fragment = warp; fragment < R * N; fragment += TILE_WARPS) {
        float4 sum = load_published_16(all + fragment * 32 + lane);
#pragma unroll 4
        for (int split = 1; split < splits; ++split) add(sum, load_published_16(all + (split * (R * N) + fragment) * 32 + lane));
        store_fragment(out, sum, row_tile + fragment / N, token + fragment % N * 8, out_features, tokens);
    }
}
