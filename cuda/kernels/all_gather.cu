// The ranks' shards side by side in every row, of one tensor or of two (PAIR), or one rank's tensor on all (BROADCAST).
//
// Every rank pushes what it has to the others; see exchange.cuh. Several ranks can be rows of one launch (blockIdx.y), whose blocks must
// all be resident at once. Of two tensors the vectors of the second follow those of the first.
//
// Constants: those of exchange.cuh; ELEMENT_BYTES, 2 or 4; VECTOR elements of a load, 16 bytes or one; PAIR; BROADCAST.
#include "exchange.cuh"

static_assert(!(PAIR && BROADCAST), "one tensor is broadcast");

using Elements = Vector<ELEMENT_BYTES, VECTOR>;

// What a rank has, and where what all have goes. Sizes in vectors.
struct Tensors {
    const void *shard, *next_shard;
    void *out, *next_out;
    int vectors; // of the first shard
    int columns, next_columns;

    DEVICE bool in_next(int index) const { return PAIR && index >= vectors; }

    DEVICE void load(Elements& x, int index) const {
        const bool next = in_next(index);
        x.load(next ? next_shard : shard, next ? index - vectors : index);
    }

    DEVICE void store(const Elements& x, int index, int source) const {
        if (BROADCAST) return x.store(out, index);
        const bool next = in_next(index);
        const int at = next ? index - vectors : index, width = next ? next_columns : columns;
        const int row = at / width, column = at - row * width;
        x.store(next ? next_out : out, (static_cast<int64_t>(row) * RANKS + source) * width + column);
    }
};

KERNEL void __launch_bounds__(THREADS, 1)
all_gather(BY_RANK(const void*, shard),      // [rows, columns] each, those of this launch; none where BROADCAST
           BY_RANK(void*, out),              // [rows, RANKS * columns]
           BY_RANK(const void*, next_shard), // [rows, next_columns], where PAIR
           BY_RANK(void*, next_out),         // [rows, RANKS * next_columns]
           BY_RANK(uint32_t*, workspace),
           int vectors,     // of a shard
           int all_vectors, // of both
           int segment,     // vectors that a slot receives, at most
           int columns,     // of a shard, in vectors
           int next_columns,
           int root, // where BROADCAST
           int first_rank, int64_t patience) {
    const void* const shards[MAX_RANKS] = OF_RANKS(shard);
    void* const outs[MAX_RANKS] = OF_RANKS(out);
    const void* const next_shards[MAX_RANKS] = OF_RANKS(next_shard);
    void* const next_outs[MAX_RANKS] = OF_RANKS(next_out);
    uint32_t* const workspaces[MAX_RANKS] = OF_RANKS(workspace);
    const int rank = first_rank + static_cast<int>(blockIdx.y);
    void* out = of_rank(outs, rank);
    const Tensors tensors{BROADCAST ? out : of_rank(shards, rank), PAIR ? of_rank(next_shards, rank) : nullptr,
                          out, PAIR ? of_rank(next_outs, rank) : nullptr, vectors, columns, next_columns};
    Channel channel;
    channel.open(workspaces, rank, patience);

    const int64_t stride = static_cast<int64_t>(gridDim.x) * segment;
    for (int64_t start = static_cast<int64_t>(blockIdx.x) * segment; start < all_vectors; start += stride) {
        channel.next();
        const int first = static_cast<int>(start), count = at_most(all_vectors - start, segment);
        const auto pushed_by = [&](int source) { return !BROADCAST || source == root ? count : 1; };
        for (int i = threadIdx.x; i < pushed_by(rank) && !channel.failed; i += THREADS) {
            Elements x = {};
            if (!BROADCAST || rank == root) tensors.load(x, first + i);
            x.push_to_others(channel, workspaces, i);
        }
        if constexpr (BROADCAST) {
            for (int source = 0; source < RANKS; ++source) {
                if (source == rank) continue;
                await_in_batches<Elements>(channel, source, pushed_by(source), [&](const Elements& x, int i) {
                    if (source == root) tensors.store(x, first + i, source);
                });
            }
        }
        // All sources at once: of a short segment each thread has a vector of one of them.
        for (int item = threadIdx.x; !BROADCAST && item < RANKS * count; item += THREADS) {
            const int source = item / count, i = item - source * count;
            Elements x;
            if (source != rank) {
                x.peek(channel, source, i);
                x.await(channel, source, i);
            } else {
                tensors.load(x, first + i);
            }
            tensors.store(x, first + i, source);
        }
        if (start + stride < all_vectors) channel.end_exchange();
    }
    channel.close();
}
