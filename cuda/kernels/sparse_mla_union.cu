// The rows that groups of TILE_TOKENS neighbouring tokens select together, each once, with the tokens that selected it: what
// `sparse_mla_wide` reads when tokens share tiles. One block a group.
//
// Windows of WINDOW positions: a byte of shared memory a position collects its tokens, then the bytes that are not zero are written in
// order. A group that a sequence ends in is one run of windows after the other: tokens of different sequences share nothing.
#include "ptx.cuh"

constexpr int THREADS = TILE_THREADS, WARPS = THREADS / 32, WINDOW = TILE_WINDOW;
constexpr int WORDS_PER_WARP = WINDOW / 4 / WARPS;
constexpr uint32_t ALL = 0xffffffff;

static_assert(TILE_TOKENS <= 8, "a byte of tokens");
static_assert(WINDOW % (128 * WARPS) == 0, "warps share a window in whole steps");

struct Shared {
    uint32_t members[WINDOW / 4];
    int32_t counts[WARPS];
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher's sum");

// Which of a word's four bytes are not zero: bits 0, 8, 16, 24.
DEVICE uint32_t occupied(uint32_t word) {
    word |= word >> 4;
    word |= word >> 2;
    word |= word >> 1;
    return word & 0x01010101;
}

// `topk_indices` [T, k]; `entries` [groups, TILE_TOKENS * k]: cache row << 8 | tokens, ascending in position; `counts` [groups].
KERNEL void __launch_bounds__(THREADS, TILE_BLOCKS)
sparse_mla_union(const int32_t* topk_indices, const int32_t* positions, const int32_t* seq_ids, const int32_t* block_table,
                 int32_t* entries, int32_t* counts, int tokens, int k, int page_size, int max_blocks) {
    Shared& shared = shared_memory<Shared>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = blockIdx.x, first = group * TILE_TOKENS, end = min(first + TILE_TOKENS, tokens);
    int32_t* mine = entries + static_cast<int64_t>(group) * TILE_TOKENS * k;
    int total = 0;

    for (int run = first; run < end;) {
        const int sequence = seq_ids[run];
        int run_end = run + 1;
        while (run_end < end && seq_ids[run_end] == sequence) ++run_end;
        const int context = positions[run_end - 1] + 1;
        const int run_start = total;

        for (int base = 0; base < context; base += WINDOW) {
            for (int i = threadIdx.x; i < WINDOW / 4; i += THREADS) shared.members[i] = 0;
            __syncthreads();
            for (int i = threadIdx.x; i < k; i += THREADS) {
                int32_t indices[TILE_TOKENS];
#pragma unroll
                for (int t = 0; t < TILE_TOKENS; ++t) {
                    const int token = first + t;
                    indices[t] = token >= run && token < run_end ? __ldg(topk_indices + static_cast<int64_t>(token) * k + i) : -1;
                }
#pragma unroll
                for (int t = 0; t < TILE_TOKENS; ++t) {
                    const uint32_t place = static_cast<uint32_t>(indices[t] - base);
                    if (place < WINDOW) atomicOr(&shared.members[place / 4], 1u << (place % 4 * 8 + t));
                }
            }
            __syncthreads();

            const uint32_t* words = shared.members + warp * WORDS_PER_WARP;
            int count = 0;
            for (int i = lane; i < WORDS_PER_WARP; i += 32) count += __popc(occupied(words[i]));
            count = __reduce_add_sync(ALL, count);
            if (lane == 0) shared.counts[warp] = count;
            __syncthreads();
            int place = total;
            for (int w = 0; w < WARPS; ++w) {
                place += w < warp ? shared.counts[w] : 0;
                total += shared.counts[w];
            }
            for (int i = 0; i < WORDS_PER_WARP && count != 0; i += 32) {
                const uint32_t word = words[i + lane];
                const int here = __popc(occupied(word));
                int before = here;
#pragma unroll
                for (int distance = 1; distance < 32; distance *= 2) {
                    const int left = __shfl_up_sync(ALL, before, distance);
                    before += lane >= distance ? left : 0;
                }
                int at = place + before - here;
                place += __shfl_sync(ALL, before, 31);
#pragma unroll
                for (int b = 0; b < 4; ++b) {
                    const int members = word >> 8 * b & 0xff;
                    if (members == 0) continue;
                    const int position = base + (warp * WORDS_PER_WARP + i + lane) * 4 + b;
                    mine[at++] = position << 8 | members;
                }
            }
            __syncthreads();
        }
        // Positions become cache rows.
        const int32_t* blocks = block_table + static_cast<int64_t>(sequence) * max_blocks;
#pragma unroll 4
        for (int i = run_start + threadIdx.x; i < total; i += THREADS) {
            const uint32_t entry = static_cast<uint32_t>(mine[i]), position = entry >> 8;
            const uint32_t block = position / static_cast<uint32_t>(page_size);
            const uint32_t row = static_cast<uint32_t>(__ldg(blocks + block)) * page_size + (position - block * page_size);
            mine[i] = static_cast<int32_t>(row << 8 | (entry & 0xff));
        }
        run = run_end;
    }
    if (threadIdx.x == 0) counts[group] = total;
}
