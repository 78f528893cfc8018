// What the two kernels of linear_int4 share: scales and zero points of a tile, results, and the sum over the blocks that split the inputs.
//
// Constants: SCALE_TYPE, ZERO_POINTS; GROUP_SIZE, or 0 where it is an argument; GROUPS_PER_TILE, 2 where a group may end within the 64
// inputs of a tile (after 32) and 1 where none does; OUT, what becomes of the products; ALIGNED, 1 where rows of x are multiples of 16
// bytes, 2 where they are whole tiles.
//
// Arithmetic: a product of an activation and q - z is exact in f32, a sum of them is not: with u = 2^-24, a group's sum of n products is
// off by 2 n u of the sum of their magnitudes at most (the tensor core truncates); the scale adds 2 u, each addition over groups, warps
// and splits u. Where sums change their unit instead, each change adds 4 u. In a SwiGLU the exponent is then off by 2 u |gate|, the
// exponential by that and 4 u, the reciprocal of the sum and two products by 5 u more. A bf16 result is rounded once, at the end.
#pragma once

#include "int4.cuh"
#include "silu.cuh"

// Results in bf16, in f32, or of a SwiGLU, in bf16: then a tile has eight rows of the gate and the same eight of the up projection.
constexpr int OUT_BF16 = 0, OUT_F32 = 1, OUT_SWIGLU = 2;
constexpr int FEATURES_PER_TILE = OUT == OUT_SWIGLU ? 8 : 16;

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

// The results of an accumulator fragment, of row tile `tile` and the tokens from `token` on, to out[tokens, features].
DEVICE void store_fragment(void* out, float4 c, int tile, int token, int features, int tokens) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, feature = tile * FEATURES_PER_TILE;
    constexpr int HALVES = FEATURES_PER_TILE / 8;
    float values[HALVES][2];
    if constexpr (OUT == OUT_SWIGLU) {
        values[0][0] = swiglu(c.x, c.z), values[0][1] = swiglu(c.y, c.w);
    } else {
        values[0][0] = c.x, values[0][1] = c.y, values[1][0] = c.z, values[1][1] = c.w;
    }
    if (OUT != OUT_F32 && features % 2 == 0) {
#pragma unroll
        for (int i = 0; i < HALVES; ++i) {
            // Transposed, a lane has two neighbouring features of a token.
            const uint32_t pair = movmatrix_trans(pack_bf16(values[i][0], values[i][1]));
            const int row = feature + 8 * i + 2 * t, column = token + g;
            const int64_t place = static_cast<int64_t>(column) * features + row;
            if (row < features && column < tokens) *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(out) + place) = pair;
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < HALVES; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int row = feature + g + 8 * i, column = token + 2 * t + j;
            const int64_t place = static_cast<int64_t>(column) * features + row;
            if (row >= features || column >= tokens) continue;
            if constexpr (OUT == OUT_F32) {
                static_cast<float*>(out)[place] = values[i][j];
            } else {
                static_cast<uint16_t*>(out)[place] = float_to_bf16(values[i][j]);
            }
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
