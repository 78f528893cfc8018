// The partial results of `sparse_mla`'s splits -> its output, in a fixed order. A block takes a head of a token and 128 latent columns; its
// warps share the splits, each has LOADS of them under way, and the warps' sums are added in order.
#include "sparse_mla.cuh"

constexpr int WARPS = TILE_WARPS, COLUMNS = 128, LOADS = 8;

struct Shared {
    float4 parts[WARPS][32];
    float maxima[WARPS];
    float sums[WARPS];
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher's sum");

// Four columns, unnormalised, relative to 2 to the `most`.
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
};

// Grid: heads of tokens, blocks of columns.
KERNEL void __launch_bounds__(32 * WARPS, 1)
sparse_mla_merge(const float* partial_out, const float* partial_max, const float* partial_sum, uint16_t* out, int splits) {
    Shared& shared = shared_memory<Shared>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = blockIdx.y * COLUMNS + lane * 4;
    const int64_t head = blockIdx.x;
    const bool inside = column < KV_LORA_RANK;
    const float* maxima = partial_max + head * splits;
    const float* sums = partial_sum + head * splits;
    const float* columns = partial_out + head * splits * KV_LORA_RANK + (inside ? column : 0);

    Sums mine;
    for (int first = warp; first < splits; first += WARPS * LOADS) {
        float maximum[LOADS], sum[LOADS];
        float4 part[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const int split = first + i * WARPS;
            if (split < splits) {
                maximum[i] = maxima[split];
                sum[i] = sums[split];
                part[i] = *reinterpret_cast<const float4*>(columns + static_cast<int64_t>(split) * KV_LORA_RANK);
            } else {
                maximum[i] = negative_infinity();
                sum[i] = 0.0f;
                part[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            }
        }
        float most = mine.most;
#pragma unroll
        for (int i = 0; i < LOADS; ++i) most = fmaxf(most, maximum[i]);
        mine.rescale(most);
#pragma unroll
        for (int i = 0; i < LOADS; ++i) mine.add(maximum[i], sum[i], part[i]);
    }
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
    const float inverse = reciprocal_or_zero(mine.total);
    store_bf16(out + head * KV_LORA_RANK + column,
               make_float4(mine.v.x * inverse, mine.v.y * inverse, mine.v.z * inverse, mine.v.w * inverse));
}
