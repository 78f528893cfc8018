// What a token's experts gave, weighted and added up in the order of k, and the shared expert's row.
//
// Constants: PACKED (parts as `moe_parts.cuh` packs them, or f32). Tile: TILE_THREADS, eight columns each.
#include "moe_parts.cuh"

constexpr int COLUMNS = 8;

// This thread's columns, in pairs that lie apart: where they begin, and how far one is from the next.
#if PACKED
constexpr int PAIR_STEP = 8;
DEVICE int first_column(int vector) { return vector / 4 * 32 + vector % 4 * 2; }
#else
constexpr int PAIR_STEP = 2;
DEVICE int first_column(int vector) { return vector * COLUMNS; }
#endif

DEVICE void add(float (&sum)[COLUMNS], float weight, const uint4 (&raw)[PACKED ? 1 : 2]) {
#if PACKED
    float low[4], high[4];
    const float low_weight = weight * unpack_part(make_uint2(raw[0].x, raw[0].y), low);
    const float high_weight = weight * unpack_part(make_uint2(raw[0].z, raw[0].w), high);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sum[2 * i] = fmaf(low_weight, low[i], sum[2 * i]);
        sum[2 * i + 1] = fmaf(high_weight, high[i], sum[2 * i + 1]);
    }
#else
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        sum[4 * i] = fmaf(weight, __uint_as_float(raw[i].x), sum[4 * i]);
        sum[4 * i + 1] = fmaf(weight, __uint_as_float(raw[i].y), sum[4 * i + 1]);
        sum[4 * i + 2] = fmaf(weight, __uint_as_float(raw[i].z), sum[4 * i + 2]);
        sum[4 * i + 3] = fmaf(weight, __uint_as_float(raw[i].w), sum[4 * i + 3]);
    }
#endif
}

// `parts` [pairs, hidden] f32, or packed; `shared_rows` [tokens, hidden] bf16 or null; `out` [tokens, hidden] bf16; tokens count from
// `first_token`, pairs from its first. A pair whose expert does not exist gave nothing. Grid: tokens, column ranges, of which the last come
// first: their parts were written last.
KERNEL void __launch_bounds__(TILE_THREADS, 1)
moe_sum(const uint4* parts, const int32_t* topk_ids, const float* topk_weights, const uint16_t* shared_rows, uint16_t* out, int experts,
        int hidden, int top_k, int first_token) {
    const int vector = (gridDim.y - 1 - blockIdx.y) * TILE_THREADS + threadIdx.x, column = first_column(vector);
    const int vectors = PACKED ? (hidden + 31) / 32 * 4 : hidden / COLUMNS;
    if (vector >= vectors) return;
    const int64_t token = first_token + static_cast<int>(blockIdx.x);
    uint32_t beside[COLUMNS / 2] = {};
    if (shared_rows != nullptr) {
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; ++i) {
            const int at = column + i * PAIR_STEP;
            if (!PACKED || at < hidden) beside[i] = *reinterpret_cast<const uint32_t*>(shared_rows + token * hidden + at);
        }
    }
    constexpr int LOADS = PACKED ? 1 : 2, BATCH = 8;
    float sum[COLUMNS] = {};
    // Nothing is waited for before all of a batch is under way.
    for (int first = 0; first < top_k; first += BATCH) {
        uint4 raw[BATCH][LOADS];
        int expert[BATCH];
        float weight[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int k = min(first + i, top_k - 1);
            const int64_t row = static_cast<int64_t>(blockIdx.x) * top_k + k;
#pragma unroll
            for (int j = 0; j < LOADS; ++j) raw[i][j] = parts[(row * vectors + vector) * LOADS + j];
            expert[i] = topk_ids[token * top_k + k];
            weight[i] = topk_weights[token * top_k + k];
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
            if (first + i < top_k && expert[i] >= 0 && expert[i] < experts) add(sum, weight[i], raw[i]);
    }
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; ++i) {
        const int at = column + i * PAIR_STEP;
        if (PACKED && at >= hidden) break;
        const uint32_t both = pack_bf16(bf16_low(beside[i]) + sum[2 * i], bf16_high(beside[i]) + sum[2 * i + 1]);
        *reinterpret_cast<uint32_t*>(out + token * hidden + at) = both;
    }
}
