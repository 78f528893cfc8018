// The k best of every row of logits, for rows that their block can hold, in its registers (TILE_REGISTERS) or its shared memory: exact,
// ties to the lower position, positions ascending. `top_k_filtered` is for longer ones.
#include "top_k_select.cuh"

constexpr uint32_t SUMS = (VECTORS + 3) / 4;

struct Shared {
#if !TILE_REGISTERS
    float4 vectors[VECTORS][THREADS];
#endif
    Selection selection;
    uint32_t sums[SUMS][WARPS];
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher's sum");

// A row that its block holds; every thread has its own vectors.
struct Held {
    Shared& shared;
    const Row& row;
#if TILE_REGISTERS
    float4 vectors[VECTORS];
    DEVICE float4& vector(uint32_t v) { return vectors[v]; }
    DEVICE const float4& vector(uint32_t v) const { return vectors[v]; }
#else
    DEVICE float4& vector(uint32_t v) const { return shared.vectors[v][threadIdx.x]; }
#endif

    // Position of a vector's first element.
    DEVICE uint32_t position(uint32_t v) const { return row.position(v * THREADS + threadIdx.x); }

    // Whether all of the block's vectors lie in the first `limit` elements.
    DEVICE bool whole(uint32_t v, uint32_t limit) const { return row.head == 0 && (v + 1) * THREADS * 4 <= limit; }

    DEVICE void load(uint32_t columns) {
#pragma unroll
        for (uint32_t v = 0; v < VECTORS; ++v) {
            const uint32_t index = v * THREADS + threadIdx.x;
            if (!TILE_REGISTERS && (whole(v, columns) || row.covers(index, columns))) {
                cp_async_16(&vector(v), row.vectors + int64_t{4} * index);
            } else {
                float values[4];
                row.load(index, columns, values);
                vector(v) = make_float4(values[0], values[1], values[2], values[3]);
            }
        }
        cp_async_commit();
    }

    // What was loaded behind the row's end is no element.
    DEVICE void cut() {
        cp_async_wait<0>();
#pragma unroll
        for (uint32_t v = 0; v < VECTORS; ++v) {
            if (whole(v, row.length)) continue;
            float4& values = vector(v);
            if (position(v) >= row.length) values.x = not_a_number();
            if (position(v) + 1 >= row.length) values.y = not_a_number();
            if (position(v) + 2 >= row.length) values.z = not_a_number();
            if (position(v) + 3 >= row.length) values.w = not_a_number();
        }
    }

    template <typename F>
    DEVICE void each(F f) const {
#pragma unroll
        for (uint32_t v = 0; v < VECTORS; ++v) {
            if (v * THREADS >= row.num_vectors()) break;
            const float4 values = vector(v);
            f(values.x, position(v));
            f(values.y, position(v) + 1);
            f(values.z, position(v) + 2);
            f(values.w, position(v) + 3);
        }
    }
};

KERNEL void __launch_bounds__(THREADS, TILE_BLOCKS)
    top_k(const int32_t* positions, const float* logits, int32_t* topk_indices, int32_t first_row, int32_t columns, int32_t places) {
    Shared& shared = shared_memory<Shared>();
    const uint32_t k = places;
    Row row(logits, int64_t{columns} * blockIdx.x);
    Held held{shared, row};
    // The loads do not wait for the row's length.
    held.load(columns);
    row.length = positions[first_row + blockIdx.x] + 1;
    int32_t* out = topk_indices + int64_t{k} * (first_row + static_cast<int32_t>(blockIdx.x));
    if (row.length <= k) {
        cp_async_wait<0>();
        write_all(out, row.length, k);
        return;
    }
    held.cut();
    Threshold threshold;
    if (!select(shared.selection, held, spread_of(shared.selection, held), k, threshold.last)) {
        threshold.last = select_from_memory(shared.selection, row, k);
    }

    // Which elements of each vector are selected, four bits each, and how many: eight bits each, so that four sums over a warp are one.
    uint32_t selected[SUMS], sums[SUMS];
#pragma unroll
    for (uint32_t s = 0; s < SUMS; ++s) {
        selected[s] = sums[s] = 0;
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
            const uint32_t v = 4 * s + i;
            if (v >= VECTORS || v * THREADS >= row.num_vectors()) break;
            const float4 values = held.vector(v);
            const uint32_t position = held.position(v);
            const uint32_t bits = threshold.selects(values.x, position) | threshold.selects(values.y, position + 1) << 1 |
                                  threshold.selects(values.z, position + 2) << 2 | threshold.selects(values.w, position + 3) << 3;
            selected[s] |= bits << 4 * i;
            sums[s] |= static_cast<uint32_t>(__popc(bits)) << 8 * i;
        }
        const uint32_t inclusive = warp_inclusive_sum(sums[s]);
        if (lane() == 31) shared.sums[s][warp()] = inclusive;
        sums[s] = inclusive - sums[s];
    }
    __syncthreads();
    // Through shared memory if there is room: what is not selected is written too, behind the rest, so that nothing branches.
    const bool staged = k <= BINS;
    uint32_t written = 0;
#pragma unroll
    for (uint32_t v = 0; v < VECTORS; ++v) {
        if (v * THREADS >= row.num_vectors()) break;
        const uint32_t sum = lane() < WARPS ? shared.sums[v / 4][lane()] >> 8 * (v % 4) & 0xff : 0;
        uint32_t place = written + (sums[v / 4] >> 8 * (v % 4) & 0xff) + __reduce_add_sync(ALL_LANES, lane() < warp() ? sum : 0);
        written += __reduce_add_sync(ALL_LANES, sum);
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) {
            const uint32_t selects = selected[v / 4] >> (4 * (v % 4) + j) & 1;
            if (staged) {
                shared.selection.histogram[selects != 0 ? place : BINS + threadIdx.x] = held.position(v) + j;
            } else if (selects != 0) {
                out[place] = static_cast<int32_t>(held.position(v) + j);
            }
            place += selects;
        }
    }
    if (staged) {
        __syncthreads();
        for (uint32_t place = threadIdx.x; place < k; place += THREADS) {
            out[place] = static_cast<int32_t>(shared.selection.histogram[place]);
        }
    }
}
