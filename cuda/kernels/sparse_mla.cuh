// What the `sparse_mla` kernels share: from a place in the top-k list to a cache row, and how partial results are written down.
//
// A split's partial result of a token's head is `partial_out` [T, H, splits, KV_LORA_RANK], the unnormalised sums, relative to 2 to the
// `partial_max` [T, H, splits], and `partial_sum` [T, H, splits], the sum of the weights relative to the same. A split that saw no row
// has the maximum negative infinity and zeros.
#pragma once

#include "fp8.cuh"

constexpr uint32_t ALL = 0xffffffff;

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

// What sums are divided by: where nothing was selected they are zeros and stay so.
DEVICE float reciprocal_or_zero(float total) { return total == 0.0f ? 0.0f : 1.0f / total; }

DEVICE void store_bf16(uint16_t* out, float4 v) {
    *reinterpret_cast<uint2*>(out) = make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
}
