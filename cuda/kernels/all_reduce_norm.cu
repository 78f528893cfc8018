// The sum over ranks, added to the residual stream, and its norm in one launch: to the bit what `all_reduce` and `rms_norm` compute.
//
// One shot: every rank pushes its rows of x to the others, and each sums, adds and norms all of them. Two shots: every row has a keeper, to
// which the others push it, and which pushes what it has normed to them: only the keeper's residual has the sum then. A shape always has
// the same keepers.
//
// Several ranks can be rows of one launch (blockIdx.y), whose blocks must all be resident at once.
//
// Constants: those of exchange.cuh but THREADS; those of rms_norm.cuh with RESIDUAL and without X_FLOAT; TWO_SHOTS.
#include "rms_norm.cuh"

constexpr int THREADS = rms::THREADS;
#include "exchange.cuh"

static_assert(RESIDUAL && !X_FLOAT, "activations are added to the residual stream");
static_assert(sizeof(rms::Shared) == TILE_SHARED_BYTES, "the launcher's sum");
static_assert(rms::VECTORS * Vector<2, VECTOR>::CELL_WORDS <= SLOT_WORDS, "a slot has a row at least");

using Elements = Vector<2, VECTOR>;

// A thread's vector of a row of a slot.
DEVICE int cell(int row, int chunk) { return row * rms::VECTORS + chunk * THREADS + static_cast<int>(threadIdx.x); }

// Its vector of a row in memory.
DEVICE int64_t place(int64_t row, int chunk) { return row * rms::VECTORS + chunk * THREADS + threadIdx.x; }

DEVICE bool has(int chunk) { return rms::column(chunk) < WIDTH; }

// What a rank's rows are, and what becomes of them.
struct Rows {
    const void* x;
    float* residual;
    uint16_t* out;
    float w[rms::CHUNKS][VECTOR];
    float eps;
    int turn;

    // Sums row `row` of this rank, which is in `current`, with the others' in row `of_slot` of its slots, and norms it to `words`.
    DEVICE void norm(rms::Shared& shared, const Channel& channel, rms::Row& current, int64_t row, int of_slot,
                     uint32_t (&words)[rms::CHUNKS][rms::WORDS]) {
#pragma unroll
        for (int chunk = 0; chunk < rms::CHUNKS; ++chunk) {
            if (!has(chunk)) continue;
            Elements own;
#pragma unroll
            for (int i = 0; i < rms::WORDS; ++i) own.words[i] = current.x[chunk][i];
            const Elements sum = Sum<false, VECTOR>::over_ranks(channel, own, cell(of_slot, chunk));
#pragma unroll
            for (int i = 0; i < rms::WORDS; ++i) current.x[chunk][i] = sum.words[i];
        }
        rms::norm_row(current, row * WIDTH, residual, w, eps, shared.squares[turn], words);
        turn ^= 1;
#pragma unroll
        for (int chunk = 0; chunk < rms::CHUNKS; ++chunk) {
            if (has(chunk)) store_bf16<VECTOR>(out + row * WIDTH + rms::column(chunk), words[chunk]);
        }
    }
};

KERNEL void __launch_bounds__(rms::THREADS, 1)
all_reduce_norm(BY_RANK(const void*, x), BY_RANK(float*, residual), BY_RANK(const void*, weight), BY_RANK(uint16_t*, out),
                BY_RANK(uint32_t*, workspace),
                int rows,    // of each rank
                int segment, // rows that a slot receives, at most
                int first_rank, float eps, int64_t patience) {
    const void* const all_x[MAX_RANKS] = OF_RANKS(x);
    float* const all_residual[MAX_RANKS] = OF_RANKS(residual);
    const void* const all_weight[MAX_RANKS] = OF_RANKS(weight);
    uint16_t* const all_out[MAX_RANKS] = OF_RANKS(out);
    uint32_t* const workspaces[MAX_RANKS] = OF_RANKS(workspace);
    const int rank = first_rank + static_cast<int>(blockIdx.y);
    rms::Shared& shared = shared_memory<rms::Shared>();
    Channel channel;
    if (!channel.open(workspaces, rank, patience)) return;

    Rows own = {of_rank(all_x, rank), of_rank(all_residual, rank), of_rank(all_out, rank), {}, eps, 0};
    rms::load_weight(of_rank(all_weight, rank), own.w);
    const int64_t chunk_rows = static_cast<int64_t>(segment) * (TWO_SHOTS ? RANKS : 1);
    for (int64_t start = blockIdx.x * chunk_rows; start < rows; start += gridDim.x * chunk_rows) {
        channel.next();
        // The rows that this rank norms, of which the first is under way while the ranks meet.
        const int64_t first = start + (TWO_SHOTS ? static_cast<int64_t>(rank) * segment : 0);
        const int count = at_most(rows - first, segment);
        rms::Row current = {};
        if (count > 0) rms::load_row(current, own.x, own.residual, first * WIDTH);

#pragma unroll
        for (int step = 1; step < (TWO_SHOTS ? RANKS : 2); ++step) {
            const int keeper = (rank + step) % RANKS;
            const int64_t from = start + (TWO_SHOTS ? static_cast<int64_t>(keeper) * segment : 0);
            const int pushed = at_most(rows - from, segment);
#pragma unroll 4
            for (int row = 0; row < pushed; ++row) {
#pragma unroll
                for (int chunk = 0; chunk < rms::CHUNKS; ++chunk) {
                    if (!has(chunk)) continue;
                    Elements x;
                    x.load(own.x, place(from + row, chunk));
                    if constexpr (TWO_SHOTS)
                        x.push(channel.slot(of_rank(workspaces, keeper), rank), cell(row, chunk));
                    else
                        x.push_to_others(channel, workspaces, cell(row, chunk));
                }
            }
        }
        if (!channel.meet(workspaces)) return;

        Channel normed = channel;
        normed.next();
        for (int row = 0; row < count; ++row) {
            rms::Row next = {};
            if (row + 1 < count) rms::load_row(next, own.x, own.residual, (first + row + 1) * WIDTH);
            uint32_t words[rms::CHUNKS][rms::WORDS];
            own.norm(shared, channel, current, first + row, row, words);
            if constexpr (TWO_SHOTS) {
#pragma unroll
                for (int chunk = 0; chunk < rms::CHUNKS; ++chunk) {
                    if (!has(chunk)) continue;
                    Elements x;
#pragma unroll
                    for (int i = 0; i < rms::WORDS; ++i) x.words[i] = words[chunk][i];
                    x.push_to_others(normed, workspaces, cell(row, chunk));
                }
            }
            current = next;
        }
        if constexpr (TWO_SHOTS) {
            channel.next();
            if (!channel.meet(workspaces)) return;
            for (int step = 1; step < RANKS; ++step) {
                const int keeper = (rank + step) % RANKS;
                const int64_t from = start + static_cast<int64_t>(keeper) * segment;
                const int of_keeper = at_most(rows - from, segment);
                const uint32_t* slot = channel.slot(channel.own, keeper);
#pragma unroll 4
                for (int row = 0; row < of_keeper; ++row) {
#pragma unroll
                    for (int chunk = 0; chunk < rms::CHUNKS; ++chunk) {
                        if (!has(chunk)) continue;
                        Elements x;
                        x.take(slot, cell(row, chunk));
                        x.store(own.out, place(from + row, chunk));
                    }
                }
            }
        }
    }
    channel.close();
}
