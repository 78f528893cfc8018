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

using Elements = Vector<2, VECTOR>;

constexpr int ROWS_OF_SLOT = SLOT_WORDS / (rms::VECTORS * Elements::CELL_WORDS);
static_assert(ROWS_OF_SLOT > 0, "a slot has a row at least");

DEVICE bool has(int chunk) { return rms::column(chunk) < WIDTH; }

// A thread's vector of a row of a slot.
DEVICE int cell(int row, int chunk) { return row * rms::VECTORS + chunk * THREADS + static_cast<int>(threadIdx.x); }

// One other rank's part of the next row fits the registers beside that of this one; those of more do not.
constexpr bool AHEAD = TWO_SHOTS && RANKS == 2;

struct Other {
    Elements x[rms::CHUNKS];

    DEVICE void peek(const Channel& channel, int row) {
#pragma unroll
        for (int chunk = 0; chunk < rms::CHUNKS; ++chunk) {
            if (has(chunk)) x[chunk].peek(channel, 1 - channel.rank, cell(row, chunk));
        }
    }
};

// What a rank's rows are, and what becomes of them.
struct Rows {
    const void* x;
    float* residual;
    uint16_t* out;
    float w[rms::CHUNKS][VECTOR];
    float eps;
    int turn;

    // Sums this rank's row `current` with the others' in row `of_slot` of its slots, of which `other` has what was there where it is AHEAD.
    DEVICE void sum(Channel& channel, rms::Row& current, Other& other, int of_slot) const {
#pragma unroll
        for (int chunk = 0; chunk < rms::CHUNKS; ++chunk) {
            if (!has(chunk)) continue;
            Elements sum, own;
#pragma unroll
            for (int i = 0; i < rms::WORDS; ++i) own.words[i] = current.x[chunk][i];
            if constexpr (AHEAD) {
                other.x[chunk].await(channel, 1 - channel.rank, cell(of_slot, chunk));
                sum = Sum<false, VECTOR>::of({channel.rank == 0 ? own : other.x[chunk], channel.rank == 0 ? other.x[chunk] : own});
            } else {
                sum = Sum<false, VECTOR>::over_ranks(channel, own, cell(of_slot, chunk));
            }
#pragma unroll
            for (int i = 0; i < rms::WORDS; ++i) current.x[chunk][i] = sum.words[i];
        }
    }

    // Norms `current`, which is row `row`, to `words`.
    DEVICE void norm(rms::Shared& shared, const rms::Row& current, int64_t row, uint32_t (&words)[rms::CHUNKS][rms::WORDS]) {
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
    channel.open(workspaces, rank, patience);

    Rows own = {of_rank(all_x, rank), of_rank(all_residual, rank), of_rank(all_out, rank), {}, eps, 0};
    rms::load_weight(of_rank(all_weight, rank), own.w);
    if constexpr (!TWO_SHOTS) {
        const int stride = static_cast<int>(gridDim.x) * segment;
        for (int first = static_cast<int>(blockIdx.x) * segment; first < rows; first += stride) {
            channel.next();
            const int count = at_most(rows - first, segment);
            // The first row is under way while what is pushed is.
            rms::Row current = {};
            rms::load_row(current, own.x, own.residual, static_cast<int64_t>(first) * WIDTH);
#pragma unroll 4
            for (int row = 0; row < count && !channel.failed; ++row) {
#pragma unroll
                for (int chunk = 0; chunk < rms::CHUNKS; ++chunk) {
                    if (!has(chunk)) continue;
                    Elements x;
                    x.load(own.x, static_cast<int64_t>(first) * rms::VECTORS + cell(row, chunk));
                    x.push_to_others(channel, workspaces, cell(row, chunk));
                }
            }
            for (int row = 0; row < count; ++row) {
                rms::Row next = {};
                if (ROWS_OF_SLOT > 1 && row + 1 < count)
                    rms::load_row(next, own.x, own.residual, static_cast<int64_t>(first + row + 1) * WIDTH);
                Other none;
                own.sum(channel, current, none, row);
                uint32_t words[rms::CHUNKS][rms::WORDS];
                own.norm(shared, current, first + row, words);
                current = next;
            }
            if (first + stride < rows) channel.end_exchange();
        }
    } else {
        const int shares = static_cast<int>(gridDim.x) * RANKS, of_all = (rows + shares - 1) / shares;
        const int start = static_cast<int>(blockIdx.x) * of_all * RANKS;
        // Where the first rank's is shorter the others have none. Who has nothing to exchange counts no exchange.
        const int share = of_all < rows - start ? of_all : rows - start;
        // A part of the rows of a rank's share, in this exchange.
        const auto from = [&](int of, int done) { return start + of * share + done; };
        const auto size = [&](int of, int done) {
            return at_most(rows - from(of, done), share - done < segment ? share - done : segment);
        };
        for (int done = 0; done < share; done += segment) {
            channel.next();
            // The rows that this rank norms, of which the first is under way while others are pushed.
            const int first = from(rank, done);
            const int count = size(rank, done);
            rms::Row current = {};
            if (count > 0) rms::load_row(current, own.x, own.residual, static_cast<int64_t>(first) * WIDTH);

            for (int step = 1; step < RANKS; ++step) {
                const int keeper = (rank + step) % RANKS;
                const int64_t pushed = static_cast<int64_t>(from(keeper, done)) * rms::VECTORS;
                uint32_t* slot = channel.slot(of_rank(workspaces, keeper), rank, keeper);
                in_batches<Elements>(
                    channel.failed ? 0 : size(keeper, done) * rms::VECTORS, [&](Elements& x, int i) { x.load(own.x, pushed + i); },
                    [&](const Elements& x, int i) { x.push(slot, i); });
            }

            Channel normed = channel;
            normed.next();
            Other other = {};
            if (AHEAD && count > 0) other.peek(channel, 0);
            for (int row = 0; row < count; ++row) {
                own.sum(channel, current, other, row);
                // Under way while this one is normed.
                rms::Row next = {};
                Other next_other = {};
                if (ROWS_OF_SLOT > 1 && row + 1 < count) {
                    rms::load_row(next, own.x, own.residual, static_cast<int64_t>(first + row + 1) * WIDTH);
                    if constexpr (AHEAD) next_other.peek(channel, row + 1);
                }
                uint32_t words[rms::CHUNKS][rms::WORDS];
                own.norm(shared, current, first + row, words);
#pragma unroll
                for (int chunk = 0; chunk < rms::CHUNKS; ++chunk) {
                    if (!has(chunk) || channel.failed) continue;
                    Elements x;
#pragma unroll
                    for (int i = 0; i < rms::WORDS; ++i) x.words[i] = words[chunk][i];
                    x.push_to_others(normed, workspaces, cell(row, chunk));
                }
                current = next, other = next_other;
            }
            channel.next();
            for (int step = 1; step < RANKS; ++step) {
                const int keeper = (rank + step) % RANKS;
                const int64_t kept = static_cast<int64_t>(from(keeper, done)) * rms::VECTORS;
                await_in_batches<Elements>(channel, keeper, size(keeper, done) * rms::VECTORS,
                                           [&](const Elements& x, int i) { x.store(own.out, kept + i); });
            }
            if (done + segment < share) channel.end_exchange();
        }
    }
    channel.close();
}
