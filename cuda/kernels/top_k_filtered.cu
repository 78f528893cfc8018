// The k best of every row of logits, for rows that take more than their block can hold: exact, ties to the lower position, positions
// ascending.
//
// The row is read once: a sample gives a pivot that some 2 k elements should reach, those are kept, and the selection runs over them;
// several blocks may share the row, each with a pivot of its own, and the last one selects. Whatever fools a sample (too little or too
// much passed) only costs time: the row is then selected from device memory.
#include "top_k_select.cuh"

// Survivors of the pivot: at most SLOTS a row, dealt out evenly to the blocks that share it.
constexpr uint32_t ITEMS = TILE_ITEMS, SLOTS = THREADS * ITEMS, SAMPLES = TILE_SAMPLES, WINDOW = TILE_WINDOW;
constexpr uint32_t MAX_PARTS = 32, LIST = TILE_SPLIT ? SLOTS / 2 : SLOTS, NOWHERE = ~0u;

struct Shared {
    Selection selection;
    // One more for every thread, for what goes nowhere.
    Item list[LIST + THREADS];
    uint32_t marks[WINDOW / 32];
    uint32_t length;
    uint32_t last;
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher's sum");

// What a part of a row hands over beside its list.
struct Part {
    uint32_t survivors, pivot;
};

// A score that about `wanted` of the items reach.
template <typename Source>
DEVICE float pivot_of(Selection& shared, const Source& source, Spread spread, uint32_t wanted) {
    const Place place = find_place(shared, source, spread, wanted, wanted / 8 + 1);
    // The edges of a range too wide for floats are no numbers.
    return fmaxf(place.spread.edge(place.bin), negative_infinity());
}

// A score that some `wanted` elements of the row should reach.
DEVICE float sample_pivot(Shared& shared, const Row& row, uint32_t wanted) {
    constexpr uint32_t SAMPLED = THREADS * SAMPLES;
    Items<4 * SAMPLES> sample;
#pragma unroll
    for (uint32_t s = 0; s < SAMPLES; ++s) {
        const uint32_t i = s * THREADS + threadIdx.x;
        // From the middle of its share of the row: the first positions are not like the others.
        const uint64_t vector = (uint64_t{2} * i + 1) * row.num_vectors() / (2 * SAMPLED);
        float values[4];
        row.load(static_cast<uint32_t>(vector), row.length, values);
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) {
            sample.values[4 * s + j] = values[j];
            sample.positions[4 * s + j] = 0;
        }
    }
    const uint32_t share = static_cast<uint32_t>(uint64_t{4 * SAMPLED} * wanted / row.length);
    return pivot_of(shared.selection, sample, spread_of(shared.selection, sample), min(max(share, 16u), 4 * SAMPLED));
}

DEVICE void clear_marks(Shared& shared, uint32_t words) {
    for (uint32_t word = threadIdx.x; word < words; word += THREADS) shared.marks[word] = 0;
}

// Writes the selected positions, ascending, by marking them in windows of the row.
template <typename Source>
DEVICE void write_ascending(Shared& shared, const Source& source, Threshold threshold, uint32_t length, int32_t* out) {
    uint32_t written = 0;
    for (uint32_t first = 0; first < length; first += WINDOW) {
        const uint32_t words = min((length - first + 31) / 32, WINDOW / 32);
        const uint32_t words_per_thread = (words + THREADS - 1) / THREADS;
        // The first window's are clear.
        if (first > 0) {
            clear_marks(shared, words);
            __syncthreads();
        }
        source.each([&](float value, uint32_t position) {
            const uint32_t place = position - first;
            if (threshold.selects(value, position) && place < WINDOW) atomicOr(&shared.marks[place / 32], 1u << place % 32);
        });
        __syncthreads();
        const uint32_t begin = min(threadIdx.x * words_per_thread, words), end = min(begin + words_per_thread, words);
        uint32_t sum = 0;
        for (uint32_t word = begin; word < end; ++word) sum += __popc(shared.marks[word]);
        uint32_t slot = written + block_exclusive_sum(sum, shared.selection.sums);
        for (uint32_t word = begin; word < end; ++word) {
            for (uint32_t marks = shared.marks[word]; marks != 0; marks &= marks - 1) {
                out[slot++] = static_cast<int32_t>(first + 32 * word + __ffs(static_cast<int>(marks)) - 1);
            }
        }
        written += __reduce_add_sync(ALL_LANES, lane() < WARPS ? shared.selection.sums[lane()] : 0);
        __syncthreads();
    }
}

// Selects among what passed the pivots, unless some of the best may not have, or too many are alike.
template <typename Source>
DEVICE bool write_best(Shared& shared, const Source& source, const Row& row, uint32_t k, uint32_t highest_pivot, int32_t* out) {
    Item last;
    if (!select(shared.selection, source, spread_of(shared.selection, source), k, last)) return false;
    if (to_key(last.value) < highest_pivot) return false;
    write_ascending(shared, source, Threshold{last}, row.length, out);
    return true;
}

KERNEL void __launch_bounds__(THREADS, TILE_BLOCKS)
    top_k_filtered(const int32_t* positions, const float* logits, int32_t* topk_indices, uint32_t* arrivals, Part* parts, Item* lists,
                   int32_t first_row, int32_t columns, int32_t places, int32_t blocks_per_row) {
    Shared& shared = shared_memory<Shared>();
    const uint32_t k = places, num_parts = TILE_SPLIT ? blocks_per_row : 1;
    const uint32_t row_index = blockIdx.x / num_parts, part = blockIdx.x % num_parts;
    Row row(logits, int64_t{columns} * row_index);

    // The parts of a row take turns at stretches of 32 vectors, so that a cluster of good scores is shared too.
    float values[VECTORS][4];
    const auto vector_of = [&](uint32_t stretch, uint32_t v) {
        return ((stretch + v * WARPS + warp()) * num_parts + part) * 32 + lane();
    };
    const auto load = [&](uint32_t stretch, uint32_t limit) {
        if (row.head == 0 && (stretch + VECTORS * WARPS) * num_parts * 128 <= limit) {
#pragma unroll
            for (uint32_t v = 0; v < VECTORS; ++v) row.load_whole(vector_of(stretch, v), values[v]);
        } else {
#pragma unroll
            for (uint32_t v = 0; v < VECTORS; ++v) row.load(vector_of(stretch, v), limit, values[v]);
        }
    };
    // The first loads do not wait for the row's length.
    load(0, columns);
    row.length = positions[first_row + row_index] + 1;
    int32_t* out = topk_indices + int64_t{k} * (first_row + row_index);
    if (row.length <= k) {
        if (part == 0) write_all(out, row.length, k);
        return;
    }

    // What was loaded behind the row's end is no element.
    if ((VECTORS * WARPS) * num_parts * 128 > row.length) {
#pragma unroll
        for (uint32_t i = 0; i < 4 * VECTORS; ++i) {
            if (row.position(vector_of(0, i / 4)) + i % 4 >= row.length) values[i / 4][i % 4] = not_a_number();
        }
    }

    const uint32_t stretches = (row.num_vectors() + 31) / 32, stretches_per_part = (stretches + num_parts - 1) / num_parts;
    const uint32_t capacity = SLOTS / num_parts, wanted = min(2 * k, 5 * SLOTS / 8);
    float pivot = negative_infinity();
    if (threadIdx.x == 0) shared.length = 0;
    clear_marks(shared, min((row.length + 31) / 32, WINDOW / 32));
    if (stretches_per_part * 128 > capacity) {
        if (TILE_SPLIT && stretches_per_part <= VECTORS * WARPS) {
            // The part is in registers, and its own best are as good a sample.
            Items<4 * VECTORS> own;
#pragma unroll
            for (uint32_t i = 0; i < 4 * VECTORS; ++i) {
                own.values[i] = values[i / 4][i % 4];
                own.positions[i] = 0;
            }
            const Spread spread = spread_of(shared.selection, own);
            pivot = pivot_of(shared.selection, own, spread, min(wanted / num_parts + 1, 4 * VECTORS * THREADS));
        } else {
            pivot = sample_pivot(shared, row, wanted);
        }
    }
    __syncthreads();

    for (uint32_t stretch = 0; stretch < stretches_per_part; stretch += VECTORS * WARPS) {
        uint32_t passed = 0;
#pragma unroll
        for (uint32_t i = 0; i < 4 * VECTORS; ++i) passed |= static_cast<uint32_t>(values[i / 4][i % 4] >= pivot) << i;
        // A detour, so that the compiler does not keep each bit in a place of its own.
        passed = __shfl_sync(ALL_LANES, passed, lane());
        const uint32_t inclusive = warp_inclusive_sum(__popc(passed));
        uint32_t slot = 0;
        if (lane() == 31) slot = atomicAdd(&shared.length, inclusive);
        slot = __shfl_sync(ALL_LANES, slot, 31) + inclusive;
        const bool fits = __all_sync(ALL_LANES, slot <= capacity);
        slot -= __popc(passed);
        if (fits) {
#pragma unroll
            for (uint32_t i = 0; i < 4 * VECTORS; ++i) {
                const uint32_t passes = passed >> i & 1;
                const uint32_t position = row.position(vector_of(stretch, i / 4)) + i % 4;
                shared.list[passes != 0 ? slot : LIST + threadIdx.x] = {values[i / 4][i % 4], position};
                slot += passes;
            }
        }
        load(stretch + VECTORS * WARPS, row.length);
    }
    __syncthreads();

    uint32_t survivors = shared.length;
    if constexpr (TILE_SPLIT) {
        Item* row_list = lists + int64_t{SLOTS} * row_index;
        Part* row_parts = parts + int64_t{MAX_PARTS} * row_index;
        // A list that is too long has gaps, and is not looked at.
        if (survivors <= capacity) {
            for (uint32_t slot = threadIdx.x; slot < survivors; slot += THREADS) {
                row_list[part * capacity + slot] = shared.list[slot];
            }
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            row_parts[part] = {survivors, to_key(pivot)};
            __threadfence();
            shared.last = atomicAdd(&arrivals[row_index], 1u) == num_parts - 1;
            __threadfence();
        }
        __syncthreads();
        if (!shared.last) return;
        if (threadIdx.x == 0) arrivals[row_index] = 0;
        // Every slot is loaded, in use or not, so that the loads do not wait for the counts.
        Items<ITEMS> items;
#pragma unroll
        for (uint32_t i = 0; i < ITEMS; i += 2) {
            const float4 pair = load_published_16(reinterpret_cast<const float4*>(&row_list[i * THREADS + 2 * threadIdx.x]));
            items.values[i] = pair.x;
            items.positions[i] = __float_as_uint(pair.y);
            items.values[i + 1] = pair.z;
            items.positions[i + 1] = __float_as_uint(pair.w);
        }
        const bool holds = lane() < num_parts;
        survivors = holds ? load_published(&row_parts[lane()].survivors) : 0;
        const uint32_t highest_pivot = __reduce_max_sync(ALL_LANES, holds ? load_published(&row_parts[lane()].pivot) : 0);
#pragma unroll
        for (uint32_t i = 0; i < ITEMS; ++i) {
            const uint32_t slot = (i & ~1u) * THREADS + 2 * threadIdx.x + i % 2, owner = slot / capacity;
            const bool used = slot - owner * capacity < __shfl_sync(ALL_LANES, survivors, owner);
            items.values[i] = used ? items.values[i] : not_a_number();
            items.positions[i] = used ? items.positions[i] : NOWHERE;
        }
        const bool complete = __all_sync(ALL_LANES, survivors <= capacity) && __reduce_add_sync(ALL_LANES, survivors) >= k;
        if (complete && write_best(shared, items, row, k, highest_pivot, out)) return;
    } else {
        const List items{shared.list, survivors};
        if (survivors >= k && survivors <= capacity && write_best(shared, items, row, k, to_key(pivot), out)) return;
    }
    write_ascending(shared, row, Threshold{select_from_memory(shared.selection, row, k)}, row.length, out);
}
