// What the two kernels of linear_int4 share: scales and zero points of a tile, results, and the sum over the blocks that split the inputs.
//
// Constants: SCALE_TYPE, ZERO_POINTS; GROUP_SIZE, or 0 where it is an argument; GROUPS_PER_TILE, 2 where a group may end within the 64
// inputs of a tile (after 32) and 1 where none does; OUT_FLOAT (f32 results) or bf16; ALIGNED, 1 where rows of x are multiples of 16
// bytes, 2 where they are whole tiles.
//
// Arithmetic: a product of an activation and q - z is exact in f32, and so is no sum of them: with u = 2^-24, each group's sum of n products
// is off by 2 n u of the sum of their magnitudes at most (the tensor core truncates), scale and sum over groups, warps and splits add 2 u
// and u an addition. A bf16 result is then rounded once.
#pragma once

#include "int4.cuh"

static_assert(GROUP_SIZE % 32 == 0 && (GROUPS_PER_TILE == 2 || GROUP_SIZE % 64 == 0), "groups end where words do");
constexpr int WORDS_PER_GROUP = 4 / GROUPS_PER_TILE;

struct Int4Weight {
    const uint4* words;   // [row tiles, k tiles, 32]
    const void* scales;   // [row tiles, groups, 8] pairs
    const uint8_t* zeros; // [row tiles, groups, 8], or null
    int row_tiles, k_tiles, groups, group_size;

    // The group of input 64 k_tile + 32 * part (where tiles have two).
    DEVICE int group(int k_tile, int part) const {
        const int input = 64 * k_tile + 32 * part;
        const int group = GROUP_SIZE != 0 ? input / (GROUP_SIZE + (GROUP_SIZE == 0)) : groups == 1 ? 0 : input / group_size;
        // A last tile may have its second half beyond the last group, where all activations are zero.
        return GROUPS_PER_TILE == 1 || ALIGNED == 2 ? group : min(group, groups - 1);
    }

    // It as an index of a row tile's scales and zeros.
    DEVICE int64_t group_index(int row_tile, int k_tile, int part) const {
        return (static_cast<int64_t>(row_tile) * groups + group(k_tile, part)) * 8;
    }
};

// Eight activations of a token from `input` on; zeros beyond the tokens and the inputs.
DEVICE uint4 activations(const uint16_t* x, int token, int input, int tokens, int in_features) {
    if (token >= tokens || input >= in_features) return make_uint4(0, 0, 0, 0);
    const uint16_t* from = x + static_cast<int64_t>(token) * in_features + input;
    if constexpr (ALIGNED != 0) return __ldg(reinterpret_cast<const uint4*>(from));
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t low = input + 2 * i < in_features ? from[2 * i] : 0;
        const uint32_t high = input + 2 * i + 1 < in_features ? from[2 * i + 1] : 0;
        words[i] = low | high << 16;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// An accumulator fragment to out[tokens, features]: rows are features from `feature` on, columns tokens from `token` on.
DEVICE void store_fragment(void* out, float4 c, int feature, int token, int features, int tokens) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if (!OUT_FLOAT && features % 2 == 0) {
        // Transposed, a lane has two neighbouring features of a token.
        const uint32_t pairs[2] = {movmatrix_trans(pack_bf16(c.x, c.y)), movmatrix_trans(pack_bf16(c.z, c.w))};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = feature + 8 * i + 2 * t, column = token + g;
            const int64_t place = static_cast<int64_t>(column) * features + row;
            if (row < features && column < tokens) *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(out) + place) = pairs[i];
        }
        return;
    }
    const float values[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = feature + g + 8 * (i / 2), column = token + 2 * t + i % 2;
        const int64_t place = static_cast<int64_t>(column) * features + row;
        if (row >= features || column >= tokens) continue;
        if constexpr (OUT_FLOAT) {
            static_cast<float*>(out)[place] = values[i];
        } else {
            static_cast<uint16_t*>(out)[place] = float_to_bf16(values[i]);
        }
    }
}

DEVICE void add(float4& sum, float4 value) { sum.x += value.x, sum.y += value.y, sum.z += value.z, sum.w += value.w; }

// Whether this block is the last of `blocks` to come here with its results written to global memory; it then sees all of theirs. The ticket
// is zero before and after.
DEVICE bool is_last_block(uint32_t* ticket, int blocks) {
    __threadfence();
    __syncthreads();
    bool last = false;
    if (threadIdx.x == 0) {
        last = atomicAdd(ticket, 1u) == static_cast<uint32_t>(blocks - 1);
        if (last) atomicExch(ticket, 0u);
    }
    last = __syncthreads_or(last);
    __threadfence();
    return last;
}
