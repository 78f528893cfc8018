// The sum over ranks, in place: f32 sums in rank order, rounded once, the same to the bit on every rank.
//
// One shot: every rank pushes all it has to the others, and each sums everything. Two shots: every rank sums its share of what a channel
// has, and pushes the sums: 2 (RANKS - 1) / RANKS times the data instead of RANKS - 1 times.
//
// Several ranks can be rows of one launch (blockIdx.y), whose blocks must all be resident at once.
//
// Constants: those of exchange.cuh; FLOATS (f32, not bf16); VECTOR elements of a load, 16 bytes or one; TWO_SHOTS.
#include "exchange.cuh"

using Elements = Vector<FLOATS ? 4 : 2, VECTOR>;
using SumOfElements = Sum<FLOATS, VECTOR>;

// Vectors of a thread that are summed together.
constexpr int SUMMED = RANKS == 2 ? BATCH : RANKS <= 4 ? 2 : 1;

KERNEL void __launch_bounds__(THREADS, 1)
all_reduce(void* data0, void* data1, void* data2, void* data3, void* data4, void* data5, void* data6, void* data7, // those of this launch
           uint32_t* workspace0, uint32_t* workspace1, uint32_t* workspace2, uint32_t* workspace3, uint32_t* workspace4,
           uint32_t* workspace5, uint32_t* workspace6, uint32_t* workspace7,
           int64_t vectors, // of each rank
           int segment,     // vectors that an exchange moves to a rank to be summed, at most
           int first_rank, int64_t patience) {
    void* const all_data[MAX_RANKS] = {data0, data1, data2, data3, data4, data5, data6, data7};
    uint32_t* const workspaces[MAX_RANKS] = {workspace0, workspace1, workspace2, workspace3,
                                             workspace4, workspace5, workspace6, workspace7};
    const int rank = first_rank + static_cast<int>(blockIdx.y);
    void* data = of_rank(all_data, rank);
    Channel channel;
    channel.open(workspaces, rank, patience);
    if constexpr (!TWO_SHOTS) {
        const int64_t stride = static_cast<int64_t>(gridDim.x) * segment;
        for (int64_t start = static_cast<int64_t>(blockIdx.x) * segment; start < vectors; start += stride) {
            channel.next();
            const int count = at_most(vectors - start, segment);
            for (int i = threadIdx.x; i < count && !channel.failed; i += THREADS) {
                Elements x;
                x.load(data, start + i);
                x.push_to_others(channel, workspaces, i);
            }
            for (int i = threadIdx.x; i < count; i += THREADS) {
                Elements own;
                own.load(data, start + i);
                SumOfElements::over_ranks(channel, own, i).store(data, start + i);
            }
            if (start + stride < vectors) channel.end_exchange();
        }
    } else {
        const int64_t shares = static_cast<int64_t>(gridDim.x) * RANKS, of_all = (vectors + shares - 1) / shares;
        const int64_t start = blockIdx.x * of_all * RANKS;
        // Where the first rank's is shorter the others have none. Who has nothing to exchange counts no exchange.
        const int64_t share = of_all < vectors - start ? of_all : vectors - start;
        // A part of the share of a rank, in this exchange.
        const auto place = [&](int of, int64_t done) { return start + of * share + done; };
        const auto size = [&](int of, int64_t done) {
            const int64_t end = place(of + 1, 0) < vectors ? place(of + 1, 0) : vectors;
            return at_most(end - place(of, done), segment);
        };
        for (int64_t done = 0; done < share; done += segment) {
            channel.next();
#pragma unroll
            for (int step = 1; step < RANKS; ++step) {
                const int other = (rank + step) % RANKS;
                const int64_t from = place(other, done);
                uint32_t* slot = channel.slot(of_rank(workspaces, other), rank, other);
                in_batches<Elements>(
                    channel.failed ? 0 : size(other, done), [&](Elements& x, int i) { x.load(data, from + i); },
                    [&](const Elements& x, int i) { x.push(slot, i); });
            }
            Channel sums = channel;
            sums.next();
            const int64_t own_place = place(rank, done);
            const int count = size(rank, done);
            for (int first = threadIdx.x; first < count; first += SUMMED * THREADS) {
                Elements parts[SUMMED][RANKS];
#pragma unroll
                for (int i = 0; i < SUMMED; ++i) {
                    const int index = first + i * THREADS;
                    if (index >= count) continue;
                    Elements own;
                    own.load(data, own_place + index);
                    SumOfElements::peek_all(channel, own, index, parts[i]);
                }
#pragma unroll
                for (int i = 0; i < SUMMED; ++i) {
                    const int index = first + i * THREADS;
                    if (index >= count) continue;
                    SumOfElements::await_all(channel, index, parts[i]);
                    const Elements sum = SumOfElements::of(parts[i]);
                    sum.store(data, own_place + index);
                    if (!channel.failed) sum.push_to_others(sums, workspaces, index);
                }
            }
            channel.next();
            for (int step = 1; step < RANKS; ++step) {
                const int source = (rank + step) % RANKS;
                const int64_t to = place(source, done);
                await_in_batches<Elements>(channel, source, size(source, done),
                                           [&](const Elements& x, int i) { x.store(data, to + i); });
            }
            if (done + segment < share) channel.end_exchange();
        }
    }
    channel.close();
}
