// The sum over ranks, in place: f32 sums in rank order, rounded once, the same to the bit on every rank.
//
// One shot: every rank pushes all it has to the others, and each sums everything. Two shots: every rank sums one segment of what a channel
// has, and pushes the sums. The first waits once, the second moves 2 (RANKS - 1) / RANKS times the data instead of RANKS - 1 times.
//
// Several ranks can be rows of one launch (blockIdx.y), whose blocks must all be resident at once.
//
// Constants: those of exchange.cuh; FLOATS (f32, not bf16); VECTOR elements of a load, 16 bytes or one; TWO_SHOTS.
#include "exchange.cuh"

using Elements = Vector<FLOATS ? 4 : 2, VECTOR>;

// The sum of the vector that lies at `place` of this rank's data, and at `index` of its slots.
DEVICE Elements sum_over_ranks(const Channel& channel, const void* data, int64_t place, int index) {
    Elements own;
    own.load(data, place);
    return Sum<FLOATS, VECTOR>::over_ranks(channel, own, index);
}

KERNEL void __launch_bounds__(THREADS, 1)
all_reduce(void* data0, void* data1, void* data2, void* data3, void* data4, void* data5, void* data6, void* data7, // those of this launch
           uint32_t* workspace0, uint32_t* workspace1, uint32_t* workspace2, uint32_t* workspace3, uint32_t* workspace4,
           uint32_t* workspace5, uint32_t* workspace6, uint32_t* workspace7,
           int64_t vectors, // of each rank
           int segment,     // vectors that a slot receives, at most
           int first_rank, int64_t patience) {
    void* const all_data[MAX_RANKS] = {data0, data1, data2, data3, data4, data5, data6, data7};
    uint32_t* const workspaces[MAX_RANKS] = {workspace0, workspace1, workspace2, workspace3,
                                             workspace4, workspace5, workspace6, workspace7};
    const int rank = first_rank + static_cast<int>(blockIdx.y);
    void* data = of_rank(all_data, rank);
    Channel channel;
    if (!channel.open(workspaces, rank, patience)) return;

    const int64_t chunk = static_cast<int64_t>(segment) * (TWO_SHOTS ? RANKS : 1);
    for (int64_t start = blockIdx.x * chunk; start < vectors; start += gridDim.x * chunk) {
        channel.next();
        if constexpr (!TWO_SHOTS) {
            const int count = at_most(vectors - start, segment);
            for (int i = threadIdx.x; i < count; i += THREADS) {
                Elements x;
                x.load(data, start + i);
                x.push_to_others(channel, workspaces, i);
            }
            if (!channel.meet(workspaces)) return;
            for (int i = threadIdx.x; i < count; i += THREADS) sum_over_ranks(channel, data, start + i, i).store(data, start + i);
        } else {
#pragma unroll
            for (int step = 1; step < RANKS; ++step) {
                const int other = (rank + step) % RANKS;
                const int64_t place = start + static_cast<int64_t>(other) * segment;
                const int count = at_most(vectors - place, segment);
                uint32_t* slot = channel.slot(of_rank(workspaces, other), rank);
#pragma unroll 4
                for (int i = threadIdx.x; i < count; i += THREADS) {
                    Elements x;
                    x.load(data, place + i);
                    x.push(slot, i);
                }
            }
            if (!channel.meet(workspaces)) return;
            const int64_t place = start + static_cast<int64_t>(rank) * segment;
            const int count = at_most(vectors - place, segment);
            Channel sums = channel;
            sums.next();
            for (int i = threadIdx.x; i < count; i += THREADS) {
                const Elements sum = sum_over_ranks(channel, data, place + i, i);
                sum.store(data, place + i);
                sum.push_to_others(sums, workspaces, i);
            }
            channel.next();
            if (!channel.meet(workspaces)) return;
            for (int step = 1; step < RANKS; ++step) {
                const int source = (rank + step) % RANKS;
                const int64_t from = start + static_cast<int64_t>(source) * segment;
                const int of_source = at_most(vectors - from, segment);
                const uint32_t* slot = channel.slot(channel.own, source);
#pragma unroll 4
                for (int i = threadIdx.x; i < of_source; i += THREADS) {
                    Elements x;
                    x.take(slot, i);
                    x.store(data, from + i);
                }
            }
        }
    }
    channel.close();
}
