// The ranks' shards side by side in every row, or one rank's tensor on all (BROADCAST).
//
// Every rank pushes what it has to the others; see exchange.cuh. Several ranks can be rows of one launch (blockIdx.y), whose blocks must
// all be resident at once.
//
// Constants: those of exchange.cuh; ELEMENT_BYTES, 2 or 4; VECTOR elements of a load, 16 bytes or one; BROADCAST.
#include "exchange.cuh"

using Elements = Vector<ELEMENT_BYTES, VECTOR>;

KERNEL void __launch_bounds__(THREADS, 1)
all_gather(const void* shard0, const void* shard1, const void* shard2, const void* shard3, const void* shard4, const void* shard5,
           const void* shard6, const void* shard7, // [rows, columns] each, those of this launch; none where BROADCAST
           void* out0, void* out1, void* out2, void* out3, void* out4, void* out5, void* out6, void* out7, // [rows, RANKS * columns]
           uint32_t* workspace0, uint32_t* workspace1, uint32_t* workspace2, uint32_t* workspace3, uint32_t* workspace4,
           uint32_t* workspace5, uint32_t* workspace6, uint32_t* workspace7,
           int64_t vectors, // of a shard
           int segment,     // vectors that a slot receives, at most
           int columns,     // of a shard, in vectors
           int root,        // where BROADCAST
           int first_rank, int64_t patience) {
    const void* const shards[MAX_RANKS] = {shard0, shard1, shard2, shard3, shard4, shard5, shard6, shard7};
    void* const outs[MAX_RANKS] = {out0, out1, out2, out3, out4, out5, out6, out7};
    uint32_t* const workspaces[MAX_RANKS] = {workspace0, workspace1, workspace2, workspace3,
                                             workspace4, workspace5, workspace6, workspace7};
    const int rank = first_rank + static_cast<int>(blockIdx.y);
    void* out = of_rank(outs, rank);
    const void* own = BROADCAST ? out : of_rank(shards, rank);
    Channel channel;
    if (!channel.open(workspaces, rank, patience)) return;

    for (int64_t start = static_cast<int64_t>(blockIdx.x) * segment; start < vectors; start += static_cast<int64_t>(gridDim.x) * segment) {
        channel.next();
        const int64_t left = vectors - start;
        const int count = left < segment ? static_cast<int>(left) : segment;
        if (!BROADCAST || rank == root) {
            for (int i = threadIdx.x; i < count; i += THREADS) {
                Elements x;
                x.load(own, start + i);
                x.push_to_others(channel, workspaces, i);
            }
        }
        if (!channel.meet(workspaces)) return;
        for (int source = 0; source < RANKS; ++source) {
            if (BROADCAST && (source != root || source == rank)) continue;
            const uint32_t* slot = channel.slot(channel.own, source);
            for (int i = threadIdx.x; i < count; i += THREADS) {
                Elements x;
                if (source == rank)
                    x.load(own, start + i);
                else
                    x.take(slot, i);
                const int64_t row = (start + i) / columns, column = (start + i) % columns;
                x.store(out, BROADCAST ? start + i : (row * RANKS + source) * columns + column);
            }
        }
    }
    channel.close();
}
