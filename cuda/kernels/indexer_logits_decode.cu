// The indexer's scores where every sequence has few token rows: they stay in shared memory, and the keys stream past them, each warp
// fetching its next 32 while it scores the last. The blocks share out all keys of the batch evenly, whatever the contexts' lengths.
#include "indexer_logits.cuh"

constexpr int THREADS = 32 * TILE_WARPS;

struct Shared {
    Query queries[TILE_QUERIES];
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher and the kernel disagree");

// Groups of keys.
DEVICE int items_of(const Rows& rows) { return (rows.keys() + GROUP_KEYS - 1) / GROUP_KEYS; }

KERNEL void __launch_bounds__(THREADS, TILE_BLOCKS)
    indexer_logits_decode(const uint16_t* q, const float* weights, const uint8_t* cache, const int32_t* cu_seqlens, const int32_t* context_lens,
                          const int32_t* block_table, float* logits, int seqs, int max_blocks, int page_size, int first_row, int end_row,
                          int64_t columns, float scale) {
    Shared& shared = shared_memory<Shared>();
    const Arguments args = {q,    weights,    cache,     cu_seqlens, context_lens, block_table, logits,
                            seqs, max_blocks, page_size, first_row,  end_row,      columns,     scale};
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    clear_padding(shared.queries, TILE_QUERIES);

    Walk walk;
    walk.start(args, items_of);
    while (walk.first_seq + 32 < seqs) walk.advance(args, items_of);
    int item = static_cast<int>(static_cast<int64_t>(walk.total) * blockIdx.x / gridDim.x);
    const int end_item = static_cast<int>(static_cast<int64_t>(walk.total) * (blockIdx.x + 1) / gridDim.x);
    if (seqs > 32) walk.start(args, items_of);

    while (item < end_item) {
        const int source = walk.find(args, item, items_of);
        const Rows rows = walk.rows_at(source);
        const int start = __shfl_sync(ALL, walk.end - walk.items, source), end = min(__shfl_sync(ALL, walk.end, source), end_item);
        Keys keys;
        keys.start(args, walk.first_seq + source, rows.keys());
        const int first_group = item - start + warp, end_group = end - start;
        const auto lookup = [&](int group) { return keys.lookup(group * GROUP_KEYS + RawKeys::key_of_lane(lane)); };

        for (int first_query = 0; first_query < rows.count; first_query += TILE_QUERIES) {
            __syncthreads();
            const int end_query = min(first_query + TILE_QUERIES, rows.count);
            copy_queries(shared.queries, q, weights, rows.first + first_query, end_query - first_query);
            cp_async_commit();
            RawKeys raw;
            if (first_group < end_group) raw.load(keys, lookup(first_group), scale);
            Lookup next = lookup(first_group + TILE_WARPS);
            cp_async_wait<0>();
            __syncthreads();

            for (int group = first_group; group < end_group; group += TILE_WARPS) {
                KeyGroup groups[1];
                groups[0].expand(raw);
                const float key_scale = raw.scale;
                if (group + TILE_WARPS < end_group) raw.load(keys, next, scale);
                next = lookup(group + 2 * TILE_WARPS);
                const int key = group * GROUP_KEYS + RawKeys::key_of_lane(lane);
#pragma unroll 1
                for (int query = first_query; query < end_query; ++query) {
                    float scores[1];
                    score(groups, shared.queries[query - first_query], scores);
                    if (key <= rows.position + query) {
                        logits[static_cast<int64_t>(rows.first + query - first_row) * columns + key] = scores[0] * key_scale;
                    }
                }
            }
        }
        item = end;
    }
}
