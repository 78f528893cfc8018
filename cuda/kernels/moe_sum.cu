// What a token's experts gave, weighted and added up in the order of k, and the shared expert's row. Four columns a thread.
//
// Tile: TILE_THREADS.
#include "rows.cuh"

// `parts` [pairs, hidden] f32; `shared_rows` [tokens, hidden] bf16 or null; `out` [tokens, hidden] bf16; tokens count from `first_token`,
// pairs from its first. A pair whose expert does not exist gave nothing. Grid: column ranges, tokens.
KERNEL void __launch_bounds__(TILE_THREADS, 1)
moe_sum(const float4* parts, const int32_t* topk_ids, const float* topk_weights, const uint2* shared_rows, uint2* out, int experts,
        int hidden, int top_k, int first_token) {
    const int column = blockIdx.x * TILE_THREADS + threadIdx.x, fours = hidden / 4;
    if (column >= fours) return;
    const int64_t token = first_token + static_cast<int>(blockIdx.y);
    uint2 row = make_uint2(0, 0);
    if (shared_rows != nullptr) row = shared_rows[token * fours + column];
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
    for (int k = 0; k < top_k; ++k) {
        const int expert = topk_ids[token * top_k + k];
        if (expert < 0 || expert >= experts) continue;
        const float weight = topk_weights[token * top_k + k];
        const float4 part = parts[(static_cast<int64_t>(blockIdx.y) * top_k + k) * fours + column];
        sum.x = fmaf(weight, part.x, sum.x), sum.y = fmaf(weight, part.y, sum.y);
        sum.z = fmaf(weight, part.z, sum.z), sum.w = fmaf(weight, part.w, sum.w);
    }
    sum.x += bf16_low(row.x), sum.y += bf16_high(row.x), sum.z += bf16_low(row.y), sum.w += bf16_high(row.y);
    out[token * fours + column] = make_uint2(pack_bf16(sum.x, sum.y), pack_bf16(sum.z, sum.w));
}
