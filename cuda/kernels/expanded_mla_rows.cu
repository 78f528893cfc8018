// What `expanded_mla` reads beside the keys and values: the latent rows of a sequence's context one below the other, apart from their
// rotary parts, and a bit for each position that a token has selected.
//
// Constants: RANK, ROPE columns of a cache row; WORDS of bits of a token at most.
#include "ptx.cuh"

constexpr int THREADS = 256;
static_assert(RANK % 8 == 0 && ROPE % 8 == 0, "rows of whole vectors");

struct Shared {
    uint32_t words[WORDS];
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher's sum");

// `cache` [rows, RANK + ROPE]; `pages` of one sequence; `latent` [context, RANK], `rotary` [context, ROPE]. A thread moves 16 bytes.
KERNEL void __launch_bounds__(THREADS)
latent_rows(const uint4* cache, const int32_t* pages, uint4* latent, uint4* rotary, int context, int page_size) {
    constexpr int CHUNKS = (RANK + ROPE) / 8, LATENT = RANK / 8;
    const int i = blockIdx.x * THREADS + threadIdx.x, position = i / CHUNKS, chunk = i % CHUNKS;
    if (position >= context) return;
    const int64_t row = static_cast<int64_t>(__ldg(pages + position / page_size)) * page_size + position % page_size;
    const uint4 vector = __ldg(cache + row * CHUNKS + chunk);
    if (chunk < LATENT)
        latent[static_cast<int64_t>(position) * LATENT + chunk] = vector;
    else
        rotary[static_cast<int64_t>(position) * (CHUNKS - LATENT) + chunk - LATENT] = vector;
}

// `topk_indices` [T, k], -1 for none; `bits` [T, words], bit i of word j for position 32 j + i. One block a token.
KERNEL void __launch_bounds__(THREADS)
selection_bits(const int32_t* topk_indices, uint32_t* bits, int k, int words) {
    Shared& shared = shared_memory<Shared>();
    const int64_t token = blockIdx.x;
    for (int i = threadIdx.x; i < words; i += THREADS) shared.words[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < k; i += THREADS) {
        const uint32_t position = __ldg(topk_indices + token * k + i);
        if (position < static_cast<uint32_t>(words) * 32) atomicOr(&shared.words[position / 32], 1u << position % 32);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < words; i += THREADS) bits[token * words + i] = shared.words[i];
}
