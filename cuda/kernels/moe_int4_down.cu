// Routed experts, INT4, few tokens: down and the weighted sum. A block has ROW_TILES tiles of 16 features of one token; its warps take the
// token's experts in turn, whole rows each, and what they give is added up in the order of k.
//
// Constants: SCALE_TYPE, GROUP_SIZE, UNIT (inputs that surely share a scale: 32 or 64), ZEROS; TOP_K (at most that many experts a token).
// Tile: TILE_WARPS, TILE_ROW_TILES, TILE_K_TILES (loaded at once), of TILE_BATCH row tiles of a warp.
#include "int4.cuh"

constexpr int WARPS = TILE_WARPS, THREADS = 32 * WARPS, ROW_TILES = TILE_ROW_TILES, K_TILES = TILE_K_TILES, UNITS = 64 / UNIT;
constexpr int WORDS = UNIT / 16, BATCH = TILE_BATCH;

struct Shared {
    float parts[TOP_K][ROW_TILES][16];
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher's sum");

struct Weights {
    const uint4* weight;
    const void* scales;
    const uint8_t* zeros;
    int k_tiles, row_tiles, groups;
};

// K_TILES tiles of inputs of a row tile, and what they meet.
struct Loaded {
    uint4 four[K_TILES], x[K_TILES][2];
    Int4Scale<SCALE_TYPE> scale[K_TILES][UNITS];
    uint32_t zero[K_TILES][UNITS];

    DEVICE void load_x(const uint16_t* activated, int columns, int first, int lane) {
#pragma unroll
        for (int j = 0; j < K_TILES; ++j)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int column = (first + j) * 64 + h * 32 + lane % 4 * 8;
                x[j][h] = column < columns ? *reinterpret_cast<const uint4*>(activated + column) : make_uint4(0, 0, 0, 0);
            }
    }

    DEVICE void load(const Weights& from, int64_t tile, int first, int lane) {
#pragma unroll
        for (int j = 0; j < K_TILES; ++j)
            if (first + j < from.k_tiles) four[j] = load_once_16(from.weight + (tile * from.k_tiles + first + j) * 32 + lane);
#pragma unroll
        for (int j = 0; j < K_TILES; ++j) {
            if (first + j >= from.k_tiles) break;
#pragma unroll
            for (int unit = 0; unit < UNITS; ++unit) {
                const uint32_t input = (first + j) * 64 + unit * UNIT;
                const int group = min(static_cast<int>(input / GROUP_SIZE), from.groups - 1);
                const int64_t index = (tile * from.groups + group) * 8 + lane / 4;
                scale[j][unit] = int4_scale<SCALE_TYPE>(from.scales, index);
                if (ZEROS) zero[j][unit] = from.zeros[index];
            }
        }
    }

    // Adds the products to the sums of rows g and g + 8.
    DEVICE void multiply(float (&acc)[2], int k_tiles, int first) const {
#pragma unroll
        for (int j = 0; j < K_TILES; ++j) {
            if (first + j >= k_tiles) break;
            const uint32_t words[4] = {four[j].x, four[j].y, four[j].z, four[j].w};
#pragma unroll
            for (int unit = 0; unit < UNITS; ++unit) {
                uint32_t low = INT4_64TH_SYMMETRIC, high = INT4_64TH_SYMMETRIC;
                if (ZEROS) int4_offsets_64th(zero[j][unit], low, high);
                float part[4] = {};
#pragma unroll
                for (int i = 0; i < WORDS; ++i) {
                    uint32_t a[4];
                    int4_fragment_64th(words[unit * WORDS + i], low, high, a);
                    const uint4 x16 = x[j][(unit * WORDS + i) / 2];
                    const uint32_t pair[2] = {i % 2 == 0 ? x16.x : x16.z, i % 2 == 0 ? x16.y : x16.w};
                    mma_bf16(part, a, pair);
                }
                const float2 by = scale[j][unit].widen();
                acc[0] = fmaf(part[0], by.x, acc[0]);
                acc[1] = fmaf(part[2], by.y, acc[1]);
            }
        }
    }
};

// `x` [pairs, columns] bf16, columns a multiple of 8; `shared_rows` [tokens, hidden] bf16 or null; `out` [tokens, hidden] bf16. Pairs and
// tokens count from `first_token`'s in `x` alone. An expert that does not exist gives nothing. Grid: tokens, row tiles / ROW_TILES.
KERNEL void __launch_bounds__(THREADS, BATCH > 1 && THREADS <= 128 ? 384 / THREADS : 1)
moe_int4_down(const uint16_t* x, const uint4* weight, const void* scales, const uint8_t* zeros, const int32_t* topk_ids,
              const float* topk_weights, const uint16_t* shared_rows, uint16_t* out, int experts, int columns, int k_tiles, int row_tiles,
              int groups, int hidden, int top_k, int first_token) {
    Shared& shared = shared_memory<Shared>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int64_t token = first_token + static_cast<int>(blockIdx.x);
    const int first_row_tile = blockIdx.y * ROW_TILES;
    const int row = first_row_tile * 16 + threadIdx.x;
    const bool writes = threadIdx.x < ROW_TILES * 16 && row < hidden;
    const Weights weights = {weight, scales, zeros, k_tiles, row_tiles, groups};
    const float beside = writes && shared_rows != nullptr ? bf16_to_float(shared_rows[token * hidden + row]) : 0.0f;

    // A token's rows do not depend on its experts: they are under way first, and then the weights of all of a batch.
    for (int first_job = warp; first_job < top_k * ROW_TILES; first_job += BATCH * WARPS) {
        float acc[BATCH][2] = {}, topk_weight[BATCH];
        int64_t tile[BATCH];
        bool exists[BATCH];
        Loaded loaded[BATCH];
        const uint16_t* activated[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int job = min(first_job + i * WARPS, top_k * ROW_TILES - 1), k = job / ROW_TILES;
            activated[i] = x + (static_cast<int64_t>(blockIdx.x) * top_k + k) * columns;
            loaded[i].load_x(activated[i], columns, 0, lane);
            const int expert = topk_ids[token * top_k + k];
            topk_weight[i] = topk_weights[token * top_k + k];
            exists[i] = expert >= 0 && expert < experts;
            tile[i] = static_cast<int64_t>(exists[i] ? expert : 0) * row_tiles;
            tile[i] += min(first_row_tile + job % ROW_TILES, row_tiles - 1);
        }
        for (int first = 0; first < k_tiles; first += K_TILES) {
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                if (first > 0) loaded[i].load_x(activated[i], columns, first, lane);
                loaded[i].load(weights, tile[i], first, lane);
            }
#pragma unroll
            for (int i = 0; i < BATCH; ++i) loaded[i].multiply(acc[i], k_tiles, first);
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int job = first_job + i * WARPS;
            if (job >= top_k * ROW_TILES) break;
            float(&part)[16] = shared.parts[job / ROW_TILES][job % ROW_TILES];
            if (t == 0) {
                part[g] = exists[i] ? topk_weight[i] * (64.0f * acc[i][0]) : 0.0f;
                part[g + 8] = exists[i] ? topk_weight[i] * (64.0f * acc[i][1]) : 0.0f;
            }
        }
    }
    __syncthreads();

    if (!writes) return;
    float sum = 0.0f;
#pragma unroll 8
    for (int k = 0; k < top_k; ++k) sum += shared.parts[k][threadIdx.x / 16][threadIdx.x % 16];
    out[token * hidden + row] = float_to_bf16(beside + sum);
}
