// The sum over ranks, in place: f32 sums in rank order, rounded once, the same to the bit on every rank.
//
// One shot: every rank pushes all it has to the others, and each sums everything. Two shots: every rank sums its share of what a channel
// has, and pushes the sums: 2 (RANKS - 1) / RANKS times the data instead of RANKS - 1 times. A share is summed in pieces, and one exchange
// carries a piece and the sums of the one before it, each in a half of the slots.
//
// Several ranks can be rows of one launch (blockIdx.y), whose blocks must all be resident at once.
//
// Constants: those of exchange.cuh; FLOATS (f32, not bf16); VECTOR elements of a load, 16 bytes or one; TWO_SHOTS.
#include "exchange.cuh"

using Elements = Vector<FLOATS ? 4 : 2, VECTOR>;
using SumOfElements = Sum<FLOATS, VECTOR>;

constexpr int HALF = SLOT_WORDS / Elements::CELL_WORDS / 2;
static_assert(HALF > 0, "a slot has a vector and a sum at least");

// Vectors of a thread that are summed together.
constexpr int SUMMED = RANKS == 2 ? BATCH : RANKS <= 4 ? 2 : 1;

// Sums `count` vectors that lie from `place` on in this rank's data, and from the first on in its slots.
template <typename Store>
DEVICE void sum_over_ranks(const Channel& channel, void* data, int64_t place, int count, Store store) {
    for (int first = threadIdx.x; first < count; first += SUMMED * THREADS) {
        Elements parts[SUMMED][RANKS];
#pragma unroll
        for (int i = 0; i < SUMMED; ++i) {
            const int index = first + i * THREADS;
            if (index >= count) continue;
            Elements own;
            own.load(data, place + index);
            SumOfElements::take_all(channel, own, index, parts[i]);
        }
#pragma unroll
        for (int i = 0; i < SUMMED; ++i) {
            const int index = first + i * THREADS;
            if (index >= count) continue;
            const Elements sum = SumOfElements::of(parts[i]);
            sum.store(data, place + index);
            store(sum, index);
        }
    }
}

// The pieces of the shares of a channel.
struct Pieces {
    int64_t vectors, start, share;
    int first, others;

    // Where the piece begins in a share.
    DEVICE int64_t begin(int piece) const { return piece == 0 ? 0 : first + static_cast<int64_t>(piece - 1) * others; }
    DEVICE int count() const { return share <= first ? 1 : 1 + static_cast<int>((share - first + others - 1) / others); }
    DEVICE int64_t place(int rank, int piece) const { return start + rank * share + begin(piece); }
    DEVICE int size(int rank, int piece) const {
        const int64_t of_rank = start + (rank + 1) * share, end = of_rank < vectors ? of_rank : vectors;
        return at_most(end - place(rank, piece), piece == 0 ? first : others);
    }
};

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
    if (!channel.open(workspaces, rank, patience)) return;

    if constexpr (!TWO_SHOTS) {
        const int64_t stride = static_cast<int64_t>(gridDim.x) * segment;
        for (int64_t start = static_cast<int64_t>(blockIdx.x) * segment; start < vectors; start += stride) {
            channel.next();
            const int count = at_most(vectors - start, segment);
            for (int i = threadIdx.x; i < count; i += THREADS) {
                Elements x;
                x.load(data, start + i);
                x.push_to_others(channel, workspaces, i);
            }
            if (!channel.meet(workspaces)) return;
            for (int i = threadIdx.x; i < count; i += THREADS) {
                Elements own;
                own.load(data, start + i);
                SumOfElements::over_ranks(channel, own, i).store(data, start + i);
            }
        }
    } else {
        const int64_t shares = static_cast<int64_t>(gridDim.x) * RANKS, share = (vectors + shares - 1) / shares;
        const int most = segment < HALF ? segment : HALF;
        // Channels are out of step, so that links are busy while one waits.
        const int first = share > most ? (most * (1 + static_cast<int>(blockIdx.x) % 4) + 3) / 4 : most;
        const Pieces pieces = {vectors, blockIdx.x * share * RANKS, share, first, most};
        const int count = pieces.count();
        for (int piece = 0; piece <= count; ++piece) {
            const Channel before = channel;
            const int last = piece - 1;
            channel.next();
            if (piece < count) {
#pragma unroll
                for (int step = 1; step < RANKS; ++step) {
                    const int other = (rank + step) % RANKS;
                    const int64_t place = pieces.place(other, piece);
                    uint32_t* slot = channel.slot(of_rank(workspaces, other), rank);
                    in_batches<Elements>(
                        pieces.size(other, piece), [&](Elements& x, int i) { x.load(data, place + i); },
                        [&](const Elements& x, int i) { x.push(slot, i); });
                }
            }
            if (last >= 0) {
                sum_over_ranks(before, data, pieces.place(rank, last), pieces.size(rank, last),
                               [&](const Elements& sum, int i) { sum.push_to_others(channel, workspaces, HALF + i); });
            }
            if (!channel.meet(workspaces)) return;
            if (last < 0) continue;
            for (int step = 1; step < RANKS; ++step) {
                const int source = (rank + step) % RANKS;
                const int64_t place = pieces.place(source, last);
                const uint32_t* slot = channel.slot(channel.own, source);
                in_batches<Elements>(
                    pieces.size(source, last), [&](Elements& x, int i) { x.take(slot, HALF + i); },
                    [&](const Elements& x, int i) { x.store(data, place + i); });
            }
        }
    }
    channel.close();
}
