// `router`: which experts see a token, by what router.cuh says.
#include "router.cuh"

static_assert(sizeof(routing::Shared) == TILE_SHARED_BYTES, "the launcher's sum");

KERNEL void __launch_bounds__(TILE_WARPS * 32, 1)
    router(const float* __restrict__ logits,    // [tokens, EXPERTS]
           const void* __restrict__ bias,       // [EXPERTS]
           int32_t* __restrict__ topk_ids,      // [tokens, k]
           float* __restrict__ topk_weights,    // [tokens, k]
           int32_t tokens, int32_t k, int32_t topk_group, int32_t normalise, float scaling) {
    routing::route(blockIdx.x, logits, bias, topk_ids, topk_weights, tokens, k, topk_group, normalise, scaling);
}
