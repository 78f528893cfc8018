// The partial results of `sparse_mla`'s splits -> its output, in a fixed order. A block takes a head of a token and 128 latent columns; its
// warps share the splits, and the warps' sums are added in order.
#include "sparse_mla.cuh"

constexpr int WARPS = TILE_WARPS, COLUMNS = 128;

struct Shared {
    float4 parts[WARPS][32];
    float maxima[WARPS];
    float sums[WARPS];
};
static_assert(sizeof(Shared) <= TILE_SHARED_BYTES, "the launcher's sum");

KERNEL void __launch_bounds__(32 * WARPS, 1)
sparse_mla_merge(const float* partial_out, const float* partial_max, const float* partial_sum, uint16_t* out, int splits) {
    Shared& shared = shared_memory<Shared>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = blockIdx.y * COLUMNS + lane * 4;
    const int64_t head = blockIdx.x;
    const bool inside = column < KV_LORA_RANK;
    Merge<1, 8> merge;
    merge.start(0, partial_out, partial_max, partial_sum, head, inside ? column : 0, splits);
    merge.add(warp, WARPS, splits);
    Sums& mine = merge.sums[0];
    shared.parts[warp][lane] = mine.v;
    if (lane == 0) {
        shared.maxima[warp] = mine.most;
        shared.sums[warp] = mine.total;
    }
    __syncthreads();
    if (warp != 0 || !inside) return;
    float most = mine.most;
#pragma unroll
    for (int w = 1; w < WARPS; ++w) most = fmaxf(most, shared.maxima[w]);
    mine.rescale(most);
#pragma unroll
    for (int w = 1; w < WARPS; ++w) mine.add(shared.maxima[w], shared.sums[w], shared.parts[w][lane]);
    store_bf16(out + head * KV_LORA_RANK + column, mine.normalised());
}
