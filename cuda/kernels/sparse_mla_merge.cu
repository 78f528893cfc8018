// The partial results of `sparse_mla`'s splits -> its output, in a fixed order. A block takes a head of a token and 128 latent columns; warp w
// adds up every TILE_WARPS-th split from the w-th on, then the warps' sums are added in order.
#include "sparse_mla.cuh"

constexpr int WARPS = TILE_WARPS, COLUMNS = 128;

struct Shared {
    float4 parts[WARPS][32];
    float totals[WARPS];
};
static_assert(sizeof(Shared) <= TILE_SHARED_BYTES, "the launcher's sum");

KERNEL void __launch_bounds__(32 * WARPS, 1)
sparse_mla_merge(const float* partial_out, const float* partial_max, const float* partial_sum, uint16_t* out, int splits) {
    Shared& shared = shared_memory<Shared>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = blockIdx.y * COLUMNS + lane * 4;
    const int64_t head = blockIdx.x;
    const float* maxima = partial_max + head * splits;
    const float* sums = partial_sum + head * splits;

    float most = negative_infinity();
    for (int s = lane; s < splits; s += 32) most = fmaxf(most, maxima[s]);
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) most = fmaxf(most, __shfl_xor_sync(ALL, most, distance));
    const float base = finite_base(most);
    float total = 0.0f;
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
    for (int s = warp; s < splits; s += WARPS) {
        const float factor = exp2_approx(maxima[s] - base);
        total = fmaf(sums[s], factor, total);
        if (column < KV_LORA_RANK) {
            const float4 part = *reinterpret_cast<const float4*>(partial_out + (head * splits + s) * KV_LORA_RANK + column);
            v.x = fmaf(part.x, factor, v.x), v.y = fmaf(part.y, factor, v.y);
            v.z = fmaf(part.z, factor, v.z), v.w = fmaf(part.w, factor, v.w);
        }
    }
    shared.parts[warp][lane] = v;
    if (lane == 0) shared.totals[warp] = total;
    __syncthreads();
    if (warp != 0 || column >= KV_LORA_RANK) return;
#pragma unroll
    for (int w = 1; w < WARPS; ++w) {
        const float4 part = shared.parts[w][lane];
        v.x += part.x, v.y += part.y, v.z += part.z, v.w += part.w;
        total += shared.totals[w];
    }
    store_normalised(out + head * KV_LORA_RANK + column, v, total);
}
