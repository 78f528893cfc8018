// The indexer's scores where every sequence has few token rows: they stay in shared memory, and the keys stream past them, each warp's
// through stages of its own. The blocks share out all keys of the batch evenly, whatever the contexts' lengths.
#include "indexer_logits.cuh"

constexpr int THREADS = 32 * TILE_WARPS;

// 32 keys on their way to a warp. A lane reads what it has copied itself, which needs no barrier.
struct KeyStage {
    uint4 vectors[4][KEY_VECTORS][32];
    float scales[FP8 ? 32 : 4];

    DEVICE void start_copies(const Keys& keys, Lookup at) {
        const int lane = threadIdx.x % 32;
        keys.vectors(at, [&](int i, int j, const uint8_t* address) { cp_async_16(&vectors[i][j][lane], address); });
        if constexpr (FP8) cp_async_4(&scales[lane], keys.scale(at));
    }

    DEVICE void read(RawKeys& raw) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < KEY_VECTORS; ++j) {
                if (Keys::inside(j)) raw.rows[i][j] = vectors[i][j][threadIdx.x % 32];
            }
        }
    }
};

struct Shared {
    Query queries[TILE_QUERIES];
    KeyStage keys[TILE_WARPS][TILE_STAGES];
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher and the kernel disagree");

// Groups of keys.
DEVICE int items_of(const Rows& rows) { return (rows.keys() + GROUP_KEYS - 1) / GROUP_KEYS; }

KERNEL void __launch_bounds__(THREADS, TILE_BLOCKS)
    indexer_logits_decode(const uint16_t* q, const float* weights, const uint8_t* cache, const int32_t* cu_seqlens,
                          const int32_t* context_lens, const int32_t* block_table, float* logits, int seqs, int max_blocks,
                          int page_size, int first_row, int end_row, int64_t columns, float scale) {
    Shared& shared = shared_memory<Shared>();
    const Arguments args = {q,    weights,    cache,     cu_seqlens, context_lens, block_table, logits,
                            seqs, max_blocks, page_size, first_row,  end_row,      columns,     scale};
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    KeyStage(&stages)[TILE_STAGES] = shared.keys[warp];
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
        const int first_group = item - start + warp, end_group = end - start;
        Keys keys;
        keys.start(args, walk.first_seq + source, rows.keys());
        const auto lookup = [&](int group) { return keys.lookup(group * GROUP_KEYS + Keys::key_of_lane()); };

        for (int first_query = 0; first_query < rows.count; first_query += TILE_QUERIES) {
            const int end_query = min(first_query + TILE_QUERIES, rows.count);
            Lookup next[TILE_STAGES];
#pragma unroll
            for (int i = 0; i < TILE_STAGES; ++i) next[i] = lookup(first_group + i * TILE_WARPS);
            __syncthreads();
            copy_queries(shared.queries, q, weights, rows.first + first_query, end_query - first_query);
            cp_async_commit();
#pragma unroll
            for (int i = 0; i < TILE_STAGES - 1; ++i) {
                if (first_group + i * TILE_WARPS < end_group) stages[i].start_copies(keys, next[i]);
                cp_async_commit();
            }
            Lookup ahead = next[TILE_STAGES - 1];
            cp_async_wait<TILE_STAGES - 1>();
            permute_queries(shared.queries, end_query - first_query);
            __syncthreads();

            int stage = 0;
            for (int group = first_group; group < end_group; group += TILE_WARPS) {
                const int group_ahead = group + (TILE_STAGES - 1) * TILE_WARPS;
                if (group_ahead < end_group) stages[stage == 0 ? TILE_STAGES - 1 : stage - 1].start_copies(keys, ahead);
                cp_async_commit();
                ahead = lookup(group_ahead + TILE_WARPS);
                cp_async_wait<TILE_STAGES - 1>();
                RawKeys raw;
                stages[stage].read(raw);
                const float key_scale = FP8 ? scale * stages[stage].scales[lane] : scale;
                stage = stage == TILE_STAGES - 1 ? 0 : stage + 1;
                KeyGroup groups[1];
                groups[0].expand<false>(raw, static_cast<uint32_t>(first_row) >> 31);

                const int key = group * GROUP_KEYS + Keys::key_of_lane();
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
