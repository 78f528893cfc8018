// What the `sparse_mla` kernels share: from a place in the top-k list to a cache row, and how partial results are written down.
//
// A split's partial result of a token's head is `partial_out` [T, H, splits, KV_LORA_RANK], the unnormalised sums, relative to 2 to the
// `partial_max` [T, H, splits], and `partial_sum` [T, H, splits], the sum of the weights relative to the same. A split that saw no row
// has the maximum negative infinity and zeros.
#pragma once

#include "fp8.cuh"

constexpr uint32_t ALL = 0xffffffff;

// A float that another block has published.
DEVICE float load_published(const float* global) { return __uint_as_float(load_published(reinterpret_cast<const uint32_t*>(global))); }

DEVICE float negative_infinity() { return __uint_as_float(0xff800000u); }

// What weights are relative to where no score has been seen: any finite number will do.
DEVICE float finite_base(float maximum) { return maximum == negative_infinity() ? 0.0f : maximum; }

// A page and the row in it, under way; a hole has the row -1.
struct Lookup {
    int page, row;
};

// The rows that one token has selected.
struct SelectedRows {
    const int32_t* positions;
    const int32_t* pages;
    const uint8_t* cache;
    int count, page_size;

    DEVICE void start(const int32_t* topk_indices, const uint8_t* cache_rows, const int32_t* seq_ids, const int32_t* block_table, int token,
                      int k, int rows_of_page, int max_blocks) {
        positions = topk_indices + static_cast<int64_t>(token) * k;
        pages = block_table + static_cast<int64_t>(__ldg(seq_ids + token)) * max_blocks;
        cache = cache_rows;
        count = k;
        page_size = rows_of_page;
    }

    DEVICE int position(int i) const { return i < count ? __ldg(positions + i) : -1; }

    DEVICE Lookup lookup(int position) const {
        if (position < 0) return {0, -1};
        const int block = static_cast<int>(static_cast<uint32_t>(position) / static_cast<uint32_t>(page_size));
        return {__ldg(pages + block), position - block * page_size};
    }

    // The cache row, -1 for a hole.
    DEVICE int slot(Lookup at) const { return at.row < 0 ? -1 : at.page * page_size + at.row; }

    // Of a hole, the address of row 0: mapped, and not to be read.
    DEVICE const uint8_t* address(int slot, int row_bytes) const { return cache + static_cast<int64_t>(max(slot, 0)) * row_bytes; }
};

DEVICE float reciprocal_or_zero(float total) { return total == 0.0f ? 0.0f : 1.0f / total; }

DEVICE void store_bf16(uint16_t* out, float4 v) {
    *reinterpret_cast<uint2*>(out) = make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
}

// Four columns of a head, unnormalised, relative to 2 to the `most`.
struct Sums {
    float most = negative_infinity(), total = 0.0f;
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);

    // `to` is at least `most`.
    DEVICE void rescale(float to) {
        const float factor = exp2_approx(most - finite_base(to));
        most = to;
        total *= factor;
        v.x *= factor, v.y *= factor, v.z *= factor, v.w *= factor;
    }

    // `maximum` is at most `most`.
    DEVICE void add(float maximum, float sum, float4 part) {
        const float factor = exp2_approx(maximum - finite_base(most));
        total = fmaf(sum, factor, total);
        v.x = fmaf(part.x, factor, v.x), v.y = fmaf(part.y, factor, v.y);
        v.z = fmaf(part.z, factor, v.z), v.w = fmaf(part.w, factor, v.w);
    }

    // Nothing selected gives zeros; NaN stays.
    DEVICE float4 normalised() const {
        const float inverse = reciprocal_or_zero(total);
        return make_float4(v.x * inverse, v.y * inverse, v.z * inverse, v.w * inverse);
    }
};

// Adds up splits of ITEMS fours of columns at a time, with the loads of LOADS splits of each under way.
template <int ITEMS, int LOADS = 4>
struct Merge {
    Sums sums[ITEMS];
    const float* columns[ITEMS];
    const float* maxima[ITEMS];
    const float* totals[ITEMS];

    DEVICE void start(int item, const float* partial_out, const float* partial_max, const float* partial_sum, int64_t head, int column,
                      int splits) {
        columns[item] = partial_out + head * splits * KV_LORA_RANK + column;
        maxima[item] = partial_max + head * splits;
        totals[item] = partial_sum + head * splits;
    }

    // Every `step`-th split from `first` on.
    DEVICE void add(int first, int step, int splits) {
        for (; first < splits; first += step * LOADS) {
            float maximum[ITEMS][LOADS], total[ITEMS][LOADS];
            float4 part[ITEMS][LOADS];
#pragma unroll
            for (int j = 0; j < LOADS; ++j)
#pragma unroll
                for (int i = 0; i < ITEMS; ++i) {
                    const int split = first + j * step, at = min(split, splits - 1);
                    part[i][j] = load_published_16(reinterpret_cast<const float4*>(columns[i] + static_cast<int64_t>(at) * KV_LORA_RANK));
                    maximum[i][j] = split < splits ? load_published(maxima[i] + at) : negative_infinity();
                    total[i][j] = load_published(totals[i] + at);
                }
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                float most = sums[i].most;
#pragma unroll
                for (int j = 0; j < LOADS; ++j) most = fmaxf(most, maximum[i][j]);
                sums[i].rescale(most);
#pragma unroll
                for (int j = 0; j < LOADS; ++j)
                    if (first + j * step < splits) sums[i].add(maximum[i][j], total[i][j], part[i][j]);
            }
        }
    }
};
