// `absorb_output` of what the splits of `sparse_mla` have left, whose sums are merged on the way: the weights arrive meanwhile, and no
// launch comes between. Merged rows are rounded to bf16, as they are where they are written down.
//
// A block takes FEATURES of a head, and up to TOKENS tokens. Their merged rows are computed in every block that needs them, 128 columns
// by a warp; where there are more warps than that, several share the splits, each a stretch, and their sums are added in order. Then
// warps share the columns of the product, and their sums are added in order.
//
// Features are the 16 rows of an MMA, tokens its 8 columns.
//
// Constants: KV_LORA_RANK; TILE_WARPS, TILE_FEATURES, TILE_SHARED_BYTES.
#include "rows.cuh"
#include "sparse_mla.cuh"

constexpr int RANK = KV_LORA_RANK, FEATURES = TILE_FEATURES, TOKENS = 8, THREADS = 32 * TILE_WARPS;
constexpr int CHUNKS = (RANK + 127) / 128, LOADS = 8;
// Rows of four banks more: the lanes of a fragment read 32 different ones.
constexpr int STRIDE = RANK + 8, SUMS_STRIDE = FEATURES + 4;
constexpr int ROW_TILES = FEATURES / 16, COLUMN_PARTS = TILE_WARPS / ROW_TILES, STEPS = RANK / 16;
static_assert(RANK % 16 == 0 && FEATURES % 16 == 0 && TILE_WARPS % ROW_TILES == 0, "whole matrices");

struct Shared {
    alignas(16) uint16_t weight[FEATURES][STRIDE];
    alignas(16) uint16_t x[TOKENS][STRIDE];
    union {
        float4 shares[TILE_WARPS][32];
        float sums[COLUMN_PARTS][TOKENS][SUMS_STRIDE];
    };
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher's sum");

// What the partial sums of a head of a token count, divided by the sum of all weights: lane l has those of splits l and l + 32,
// which is as many as there are.
struct Factors {
    float low, high;

    DEVICE void find(const float* maxima, const float* sums, int splits, int lane) {
        const bool has_low = lane < splits, has_high = lane + 32 < splits;
        const float low_maximum = has_low ? maxima[lane] : negative_infinity();
        const float high_maximum = has_high ? maxima[lane + 32] : negative_infinity();
        const float low_sum = has_low ? sums[lane] : 0.0f, high_sum = has_high ? sums[lane + 32] : 0.0f;
        float most = fmaxf(low_maximum, high_maximum);
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) most = fmaxf(most, __shfl_xor_sync(ALL, most, distance));
        low = exp2_approx(low_maximum - finite_base(most));
        high = exp2_approx(high_maximum - finite_base(most));
        const float inverse = reciprocal_or_zero(warp_sum(fmaf(low_sum, low, high_sum * high)));
        low *= inverse;
        high *= inverse;
    }

    DEVICE float of(int split) const { return __shfl_sync(ALL, split < 32 ? low : high, split % 32); }
};

KERNEL void __launch_bounds__(THREADS, 2)
absorb_merged(const float* __restrict__ partial_out, // [tokens, heads, splits, RANK]
              const float* __restrict__ partial_max, // [tokens, heads, splits]
              const float* __restrict__ partial_sum, // [tokens, heads, splits]
              const uint16_t* __restrict__ weight,   // [heads, rows, RANK] bf16, of which the last `features` rows of a head count
              uint16_t* __restrict__ out,            // [tokens, heads, features] bf16
              int tokens, int heads, int splits, int rows, int features) {
    Shared& shared = shared_memory<Shared>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int head = blockIdx.z, first_token = blockIdx.x * TOKENS, first_feature = blockIdx.y * FEATURES;
    const int own_tokens = min(TOKENS, tokens - first_token);

    const uint16_t* first_row = weight + (static_cast<int64_t>(head) * rows + rows - features + first_feature) * RANK;
    for (int i = threadIdx.x; i < FEATURES * (RANK / 8); i += THREADS) {
        const int feature = i / (RANK / 8), column = i % (RANK / 8) * 8;
        const bool valid = first_feature + feature < features;
        cp_async_16_or_zero(&shared.weight[feature][column], first_row + (valid ? feature * RANK + column : 0), valid);
    }
    cp_async_commit();

    const int items = own_tokens * CHUNKS, shares = max(TILE_WARPS / items, 1);
    for (int i = warp; i < items * shares; i += TILE_WARPS) {
        const int share = i / items, token = i % items / CHUNKS, column = i % CHUNKS * 128 + lane * 4;
        const int64_t row = static_cast<int64_t>(first_token + token) * heads + head;
        const bool inside = column < RANK;
        const float* columns = partial_out + row * splits * RANK + (inside ? column : 0);
        const int begin = splits * share / shares, end = splits * (share + 1) / shares;
        float4 parts[LOADS];
        // All under way before the first is waited for.
        const auto load = [&](int first) {
#pragma unroll
            for (int j = 0; j < LOADS; ++j) {
                parts[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (first + j < end) parts[j] = *reinterpret_cast<const float4*>(columns + static_cast<int64_t>(first + j) * RANK);
            }
        };
        load(begin);
        Factors factors;
        factors.find(partial_max + row * splits, partial_sum + row * splits, splits, lane);
        float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int first = begin; first < end; first += LOADS) {
            if (first > begin) load(first);
#pragma unroll
            for (int j = 0; j < LOADS; ++j) {
                const float factor = factors.of(min(first + j, end - 1));
                v.x = fmaf(parts[j].x, factor, v.x), v.y = fmaf(parts[j].y, factor, v.y);
                v.z = fmaf(parts[j].z, factor, v.z), v.w = fmaf(parts[j].w, factor, v.w);
            }
        }
        if (shares > 1) {
            shared.shares[i][lane] = v;
        } else if (inside) {
            store_bf16(&shared.x[token][column], v);
        }
    }
    if (shares > 1) {
        __syncthreads();
        for (int i = threadIdx.x; i < items * 32; i += THREADS) {
            const int item = i / 32, column = item % CHUNKS * 128 + i % 32 * 4;
            float4 v = shared.shares[item][i % 32];
            for (int share = 1; share < shares; ++share) {
                const float4 part = shared.shares[share * items + item][i % 32];
                v.x += part.x, v.y += part.y, v.z += part.z, v.w += part.w;
            }
            if (column < RANK) store_bf16(&shared.x[item / CHUNKS][column], v);
        }
    }
    cp_async_wait<0>();
    __syncthreads();

    const int g = lane / 4, t = lane % 4, row_tile = warp % ROW_TILES, part = warp / ROW_TILES;
    const uint16_t* upper = shared.weight[16 * row_tile + g];
    const uint16_t* lower = shared.weight[16 * row_tile + g + 8];
    const auto pair = [](const uint16_t* row, int column) { return *reinterpret_cast<const uint32_t*>(row + column); };
    float c[4] = {};
    for (int step = part; step < STEPS; step += COLUMN_PARTS) {
        const int column = 16 * step + 2 * t;
        const uint32_t a[4] = {pair(upper, column), pair(lower, column), pair(upper, column + 8), pair(lower, column + 8)};
        uint32_t b[2] = {};
        if (g < own_tokens) b[0] = pair(shared.x[g], column), b[1] = pair(shared.x[g], column + 8);
        mma_bf16(c, a, b);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) shared.sums[part][2 * t + i % 2][16 * row_tile + g + i / 2 * 8] = c[i];
    __syncthreads();
    for (int i = threadIdx.x; i < own_tokens * (FEATURES / 2); i += THREADS) {
        const int token = i / (FEATURES / 2), feature = i % (FEATURES / 2) * 2;
        float low = 0.0f, high = 0.0f;
#pragma unroll
        for (int p = 0; p < COLUMN_PARTS; ++p) low += shared.sums[p][token][feature], high += shared.sums[p][token][feature + 1];
        if (first_feature + feature >= features) continue;
        uint16_t* to = out + (static_cast<int64_t>(first_token + token) * heads + head) * features + first_feature + feature;
        *reinterpret_cast<uint32_t*>(to) = pack_bf16(low, high);
    }
}
