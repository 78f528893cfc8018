// Routed experts in any mix of formats, for checkpoints that are not quantised, or not throughout: a warp an output feature, everything in
// f32. Two entries: gate-up of every pair of token and k, and down with the weighted sum of a token's experts in the order of k.
//
// Tile: TILE_WARPS. Arithmetic: a lane adds up its columns, then lanes are added pairwise; silu(gate) * up is rounded to bf16, and the end.
#include "silu.cuh"

constexpr int INT4 = 3, VECTOR = 8;

// How one projection lies in the experts' memory: offsets in bytes; `zeros` is -1 where all zero points are 8.
struct Projection {
    int64_t kind, scale_type, group_size, groups, weight, scales, zeros, unused;
};

DEVICE float widened(const uint8_t* values, int64_t type, int64_t index) {
    if (type == F32) return reinterpret_cast<const float*>(values)[index];
    const uint16_t bits = reinterpret_cast<const uint16_t*>(values)[index];
    return type == BF16 ? bf16_to_float(bits) : f16_to_float(bits);
}

// Of a row of INT4: words of eight columns, scaled by group. Words are the checkpoint's.
DEVICE float dot_int4(const uint8_t* data, const Projection& p, int row, const uint16_t* x, int columns, int lane) {
    const int words = (columns + 7) / 8;
    const uint32_t* packed = reinterpret_cast<const uint32_t*>(data + p.weight) + static_cast<int64_t>(row) * words;
    const uint32_t* zeros = p.zeros < 0 ? nullptr : reinterpret_cast<const uint32_t*>(data + p.zeros) + row / 8 * p.groups;
    const int group_size = static_cast<int>(p.group_size);
    float sum = 0.0f;
    for (int word = lane; word < words; word += 32) {
        const uint32_t bits = packed[word];
        const int count = min(columns - word * 8, 8);
        for (int i = 0; i < count; ++i) {
            const int column = word * 8 + i, group = column / group_size;
            const int zero = zeros == nullptr ? 8 : static_cast<int>(zeros[group] >> (row % 8 * 4) & 0xfu);
            const int centred = static_cast<int>(bits >> (4 * i) & 0xfu) - zero;
            const float weight = static_cast<float>(centred) * widened(data + p.scales, p.scale_type, row * p.groups + group);
            sum = fmaf(weight, bf16_to_float(x[column]), sum);
        }
    }
    return sum;
}

template <int TYPE>
DEVICE float dot_dense(const uint8_t* weight, int row, const uint16_t* x, int columns, int lane) {
    const int64_t first = static_cast<int64_t>(row) * columns;
    float sum = 0.0f;
    if (columns % VECTOR == 0) {
        const uint8_t* weights = weight + first * (TYPE == F32 ? 4 : 2);
        for (int column = lane * VECTOR; column < columns; column += 32 * VECTOR) {
            float w[VECTOR], values[VECTOR];
            load_weights<TYPE>(weights, column, w);
            load_weights<BF16>(x, column, values);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) sum = fmaf(w[i], values[i], sum);
        }
    } else {
        for (int column = lane; column < columns; column += 32)
            sum = fmaf(widened(weight, TYPE, first + column), bf16_to_float(x[column]), sum);
    }
    return sum;
}

// A row of a projection times `x`, in every lane.
DEVICE float dot(const uint8_t* data, const Projection& p, int row, const uint16_t* x, int columns, int lane) {
    const uint8_t* weight = data + p.weight;
    float sum = 0.0f;
    if (p.kind == INT4) sum = dot_int4(data, p, row, x, columns, lane);
    if (p.kind == BF16) sum = dot_dense<BF16>(weight, row, x, columns, lane);
    if (p.kind == F16) sum = dot_dense<F16>(weight, row, x, columns, lane);
    if (p.kind == F32) sum = dot_dense<F32>(weight, row, x, columns, lane);
    return warp_sum(sum);
}

// `table` [experts][gate, up, down]; `x` [tokens, hidden] bf16; `activated` [pairs, intermediate] bf16, of tokens from `first_token` on.
// Grid: features / TILE_WARPS, pairs.
KERNEL void __launch_bounds__(TILE_WARPS * 32, 1)
moe_gate_up(const uint8_t* data, const Projection* table, const uint16_t* x, const int32_t* topk_ids, uint16_t* activated, int experts,
            int hidden, int intermediate, int top_k, int first_token) {
    const int lane = threadIdx.x % 32, row = blockIdx.x * TILE_WARPS + threadIdx.x / 32;
    const int64_t pair = blockIdx.y, token = first_token + blockIdx.y / top_k;
    const int expert = topk_ids[static_cast<int64_t>(first_token) * top_k + pair];
    if (row >= intermediate || expert < 0 || expert >= experts) return;
    const uint16_t* input = x + token * hidden;
    const float gate = dot(data, table[expert * 3], row, input, hidden, lane);
    const float up = dot(data, table[expert * 3 + 1], row, input, hidden, lane);
    if (lane == 0) activated[pair * intermediate + row] = float_to_bf16(swiglu(gate, up));
}

// `shared_rows`, `out` [tokens, hidden] bf16, the former or null. Grid: features / TILE_WARPS, tokens.
KERNEL void __launch_bounds__(TILE_WARPS * 32, 1)
moe_down(const uint8_t* data, const Projection* table, const uint16_t* activated, const int32_t* topk_ids, const float* topk_weights,
         const uint16_t* shared_rows, uint16_t* out, int experts, int hidden, int intermediate, int top_k, int first_token) {
    const int lane = threadIdx.x % 32, row = blockIdx.x * TILE_WARPS + threadIdx.x / 32;
    if (row >= hidden) return;
    const int64_t token = first_token + static_cast<int>(blockIdx.y);
    float sum = 0.0f;
    for (int k = 0; k < top_k; ++k) {
        const int expert = topk_ids[token * top_k + k];
        if (expert < 0 || expert >= experts) continue;
        const uint16_t* input = activated + (static_cast<int64_t>(blockIdx.y) * top_k + k) * intermediate;
        sum = fmaf(topk_weights[token * top_k + k], dot(data, table[expert * 3 + 2], row, input, intermediate, lane), sum);
    }
    if (lane != 0) return;
    const float beside = shared_rows != nullptr ? bf16_to_float(shared_rows[token * hidden + row]) : 0.0f;
    out[token * hidden + row] = float_to_bf16(beside + sum);
}
