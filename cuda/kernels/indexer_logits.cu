// The indexer's scores of any ragged batch: a block keeps TILE_WARPS * TILE_GROUPS * 32 keys of one sequence in registers, and the
// queries of one query block stream past them through shared memory.
#include "indexer_logits.cuh"

constexpr int THREADS = 32 * TILE_WARPS;
constexpr int WARP_KEYS = TILE_GROUPS * GROUP_KEYS;
constexpr int BLOCK_KEYS = TILE_WARPS * WARP_KEYS;

struct Shared {
    Query stages[TILE_STAGES][TILE_QUERIES];
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher and the kernel disagree");

DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Every key block against every query block, those that causality leaves empty included.
DEVICE int items_of(const Rows& rows) { return ceil_div(rows.count, TILE_QUERY_BLOCK) * ceil_div(rows.keys(), BLOCK_KEYS); }

KERNEL void __launch_bounds__(THREADS, TILE_BLOCKS)
    indexer_logits(const uint16_t* q, const float* weights, const uint8_t* cache, const int32_t* cu_seqlens, const int32_t* context_lens,
                   const int32_t* block_table, float* logits, int seqs, int max_blocks, int page_size, int first_row, int end_row,
                   int64_t columns, float scale) {
    Shared& shared = shared_memory<Shared>();
    const Arguments args = {q,    weights,    cache,     cu_seqlens, context_lens, block_table, logits,
                            seqs, max_blocks, page_size, first_row,  end_row,      columns,     scale};
    const int warp = threadIdx.x / 32;
    clear_padding(&shared.stages[0][0], TILE_STAGES * TILE_QUERIES);

    Walk walk;
    walk.start(args, items_of);
    for (int item = blockIdx.x;; item += gridDim.x) {
        const int source = walk.find(args, item, items_of);
        if (source < 0) break;
        const Rows rows = walk.rows_at(source);
        const int place = item - __shfl_sync(ALL, walk.end - walk.items, source);
        const int key_blocks = ceil_div(rows.keys(), BLOCK_KEYS);
        const int first_key = place % key_blocks * BLOCK_KEYS, warp_key = first_key + warp * WARP_KEYS;
        const int end_query = min((place / key_blocks + 1) * TILE_QUERY_BLOCK, rows.count);
        // The first query that sees a key of the block.
        const int first_query = max(place / key_blocks * TILE_QUERY_BLOCK, first_key - rows.position);
        const int steps = first_query < end_query ? ceil_div(end_query - first_query, TILE_QUERIES) : 0;
        if (steps == 0) continue;

        __syncthreads();
        const auto start_copies = [&](int step) {
            if (step < steps) {
                const int query = first_query + step * TILE_QUERIES;
                copy_queries(shared.stages[step % TILE_STAGES], q, weights, rows.first + query, min(end_query - query, TILE_QUERIES));
            }
            cp_async_commit();
        };
#pragma unroll
        for (int step = 0; step < TILE_STAGES - 1; ++step) start_copies(step);

        Keys keys;
        keys.start(args, walk.first_seq + source, rows.keys());
        KeyGroup groups[TILE_GROUPS];
        float scales[TILE_GROUPS];
#pragma unroll
        for (int i = 0; i < TILE_GROUPS; ++i) {
            const Lookup at = keys.lookup(warp_key + i * GROUP_KEYS + Keys::key_of_lane());
            RawKeys raw;
            raw.load(keys, at);
            groups[i].expand<true>(raw, static_cast<uint32_t>(first_row) >> 31);
            scales[i] = FP8 ? scale * __ldg(keys.scale(at)) : scale;
        }

        for (int step = 0; step < steps; ++step) {
            cp_async_wait<TILE_STAGES - 2>();
            __syncthreads();
            start_copies(step + TILE_STAGES - 1);
#pragma unroll 1
            for (int i = 0; i < TILE_QUERIES; ++i) {
                const int query = first_query + step * TILE_QUERIES + i, position = rows.position + query;
                if (query >= end_query || position < warp_key) continue;
                float scores[TILE_GROUPS];
                score(groups, shared.stages[step % TILE_STAGES][i], scores);
                float* row = logits + static_cast<int64_t>(rows.first + query - first_row) * columns;
#pragma unroll
                for (int j = 0; j < TILE_GROUPS; ++j) {
                    const int key = warp_key + j * GROUP_KEYS + Keys::key_of_lane();
                    if (key <= position) row[key] = scores[j] * scales[j];
                }
            }
        }
        cp_async_wait<0>();
    }
}
