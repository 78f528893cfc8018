// A checkpoint's INT4 weight, as uploaded, into the layout of int4.cuh. A warp a tile of 16 features x 64 inputs; beside it, a thread a
// pair of scales and zero points.
//
// Rows 0 to 7 of tile r are features `stride` r on of the first weight, rows 8 to 15 features `stride` r + `second_start` on of the second.
//
// Constants: SCALE_BYTES. Tile: TILE_WARPS tiles a block.
#include "int4.cuh"

// What the checkpoint has of one weight.
struct Canonical {
    const uint32_t* weight; // [out, words]: nibble i of word c is input 8 c + i
    const void* scales;     // [out, groups]
    const uint32_t* zeros;  // [ceil(out / 8), groups]: nibble i of row r is feature 8 r + i; or null: 8
};

// Inputs 8 `word` to 8 `word` + 7 of a feature; 0 where there is none.
DEVICE uint32_t eight(const Canonical& from, int feature, int word, int out_features, int in_features) {
    const int words = (in_features + 7) / 8;
    if (feature >= out_features || word >= words) return 0;
    const int used = min(in_features - 8 * word, 8);
    return from.weight[static_cast<int64_t>(feature) * words + word] & (0xffffffffu >> (32 - 4 * used));
}

// The nibbles i0 to i0 + 3 of two features' words as one word of a lane.
template <int I>
DEVICE uint32_t fragment_word(uint32_t low, uint32_t high) {
    uint32_t word = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const int place = 2 * (k / 2) + 4 * (k % 2);
        word |= (low >> (4 * (4 * I + k)) & 0xfu) << (4 * place);
        word |= (high >> (4 * (4 * I + k)) & 0xfu) << (4 * (place + 1));
    }
    return word;
}

DEVICE uint32_t zero_point(const Canonical& from, int feature, int group, int out_features, int groups) {
    if (feature >= out_features) return 0;
    if (from.zeros == nullptr) return 8;
    return from.zeros[static_cast<int64_t>(feature / 8) * groups + group] >> (4 * (feature % 8)) & 0xfu;
}

DEVICE uint32_t scale_bits(const Canonical& from, int feature, int group, int out_features, int groups) {
    if (feature >= out_features) return 0;
    const int64_t index = static_cast<int64_t>(feature) * groups + group;
    if constexpr (SCALE_BYTES == 2) return static_cast<const uint16_t*>(from.scales)[index];
    return static_cast<const uint32_t*>(from.scales)[index];
}

KERNEL void __launch_bounds__(TILE_WARPS * 32, 1)
repack_int4(const uint32_t* __restrict__ first_weight, const void* __restrict__ first_scales, const uint32_t* __restrict__ first_zeros,
            const uint32_t* __restrict__ second_weight, const void* __restrict__ second_scales, const uint32_t* __restrict__ second_zeros,
            uint4* __restrict__ weight,  // [count, row tiles, k tiles, 32]
            void* __restrict__ scales,   // [count, row tiles, groups, 8] pairs
            uint8_t* __restrict__ zeros, // [count, row tiles, groups, 8], or null
            int out_features, int in_features, int groups, int stride, int second_start, int index) {
    const Canonical first{first_weight, first_scales, first_zeros}, second{second_weight, second_scales, second_zeros};
    const int row_tiles = (out_features + stride - 1) / stride, k_tiles = (in_features + 63) / 64;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int64_t tiles = static_cast<int64_t>(row_tiles) * k_tiles;
    const int64_t tile = static_cast<int64_t>(blockIdx.x) * TILE_WARPS + threadIdx.x / 32;
    if (tile < tiles) {
        const int row = static_cast<int>(tile / k_tiles) * stride + g, word = static_cast<int>(tile % k_tiles) * 8 + t;
        uint32_t low[2], high[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            low[h] = eight(first, row, word + 4 * h, out_features, in_features);
            high[h] = eight(second, row + second_start, word + 4 * h, out_features, in_features);
        }
        weight[(index * tiles + tile) * 32 + lane] = make_uint4(fragment_word<0>(low[0], high[0]), fragment_word<1>(low[0], high[0]),
                                                                fragment_word<0>(low[1], high[1]), fragment_word<1>(low[1], high[1]));
    }

    // A group has 32 inputs at least (or is the row's only one), so there are threads enough for one pair each.
    const int64_t pairs = static_cast<int64_t>(row_tiles) * groups * 8;
    const int64_t pair = static_cast<int64_t>(blockIdx.x) * (TILE_WARPS * 32) + threadIdx.x;
    if (pair >= pairs) return;
    const int row = static_cast<int>(pair / 8 / groups) * stride + static_cast<int>(pair % 8);
    const int group = static_cast<int>(pair / 8 % groups);
    const uint32_t x = scale_bits(first, row, group, out_features, groups);
    const uint32_t y = scale_bits(second, row + second_start, group, out_features, groups);
    const int64_t place = index * pairs + pair;
    if constexpr (SCALE_BYTES == 2) {
        static_cast<uint32_t*>(scales)[place] = x | y << 16;
    } else {
        static_cast<uint2*>(scales)[place] = make_uint2(x, y);
    }
    if (zeros != nullptr) {
        const uint32_t low = zero_point(first, row, group, out_features, groups);
        const uint32_t high = zero_point(second, row + second_start, group, out_features, groups);
        zeros[place] = static_cast<uint8_t>(low | high << 4);
    }
}
