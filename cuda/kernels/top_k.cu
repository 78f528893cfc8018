// The k best of every row of logits: exact, ties to the lower position, positions ascending.
//
// A row that its block can hold is selected from there. A longer one is read once: a sample gives a pivot that some 2 k elements should
// reach, those are kept, and the selection runs over them; several blocks may share the row, each with a pivot of its own, and the last
// one selects. Whatever fools a sample or a histogram (equal scores, outliers, too little or too much passed) only costs time: the row is
// then selected from device memory.
#include "ptx.cuh"

constexpr uint32_t THREADS = TILE_THREADS, WARPS = THREADS / 32, VECTORS = TILE_VECTORS;
constexpr uint32_t BINS = TILE_BINS, BINS_PER_THREAD = BINS / THREADS;
// Candidates for the k-th place that are few enough to be compared each with each.
constexpr uint32_t RANKED = TILE_RANKED;
constexpr int bits_of(uint32_t power_of_two) { return power_of_two == 1 ? 0 : 1 + bits_of(power_of_two / 2); }
constexpr int BIN_BITS = bits_of(BINS);
constexpr uint32_t ALL_LANES = 0xffffffffu;

static_assert(THREADS % 32 == 0 && THREADS <= 1024, "whole warps, and a warp holds one number of each of them");
static_assert(BINS % THREADS == 0 && (BINS & (BINS - 1)) == 0, "bins are dealt out evenly, and cut off bits");

constexpr float LARGEST = 0x1.fffffep127f;
DEVICE float negative_infinity() { return __uint_as_float(0xff800000u); }
DEVICE float not_a_number() { return __uint_as_float(0x7fc00000u); }

// A score as an integer that ranks as the contract wants: numbers in their order with -0.0 as +0.0, NaN below them.
DEVICE uint32_t to_key(float value) {
    const uint32_t bits = __float_as_uint(value + 0.0f);
    return value == value ? bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u) : 0;
}

DEVICE float to_value(uint32_t key) {
    return __uint_as_float(key ^ (static_cast<uint32_t>(static_cast<int32_t>(~key) >> 31) | 0x80000000u));
}

struct alignas(8) Item {
    float value;
    uint32_t position;
};

// An interval, both ends included.
struct Range {
    uint32_t low, high;
    DEVICE bool contains(uint32_t value) const { return value - low <= high - low; }
};

// Everything down to one item of the row.
struct Threshold {
    Item last;
    DEVICE bool selects(float value, uint32_t position) const {
        const bool number = last.value == last.value;
        const bool above = number ? value > last.value : value == value, equal = number ? value == last.value : value != value;
        return above | (equal & (position <= last.position));
    }
};

// What the selection keeps in shared memory.
struct Selection {
    Item ranked[RANKED];
    Item last;
    uint32_t num_ranked;
    uint32_t lows[WARPS], highs[WARPS], sums[WARPS];
    uint32_t bin, above, count;
    // One more for every thread, for what goes nowhere.
    uint32_t histogram[BINS + THREADS];
};

DEVICE uint32_t lane() { return threadIdx.x % 32; }
DEVICE uint32_t warp() { return threadIdx.x / 32; }

// One row of logits in device memory, read as aligned vectors; `head` elements of the first vector lie before it.
struct Row {
    const float* vectors;
    uint32_t head, length;

    DEVICE Row(const float* logits, int64_t start)
        : vectors(logits + (start & ~int64_t{3})), head(static_cast<uint32_t>(start & 3)), length(0) {}

    DEVICE uint32_t num_vectors() const { return (head + length + 3) / 4; }

    // Position of a vector's first element; wraps around before the row.
    DEVICE uint32_t position(uint32_t vector) const { return 4 * vector - head; }

    // Whether all of a vector lies in the first `limit` elements.
    DEVICE bool covers(uint32_t vector, uint32_t limit) const { return position(vector) < limit && position(vector) + 3 < limit; }

    // Loads what lies in the first `limit` elements of the row; the rest is no number.
    DEVICE void load(uint32_t vector, uint32_t limit, float (&values)[4]) const {
        if (covers(vector, limit)) return load_whole(vector, values);
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) {
            values[j] = position(vector) + j < limit ? vectors[int64_t{4} * vector + j] : not_a_number();
        }
    }

    DEVICE void load_whole(uint32_t vector, float (&values)[4]) const {
        const uint4 bits = load_once_16(vectors + int64_t{4} * vector);
        values[0] = __uint_as_float(bits.x);
        values[1] = __uint_as_float(bits.y);
        values[2] = __uint_as_float(bits.z);
        values[3] = __uint_as_float(bits.w);
    }

    // Calls `f(value, position)` for every element, and for what stands between them: no number, at a position behind the row, so that it
    // comes after all elements.
    template <typename F>
    DEVICE void each(F f) const {
        constexpr uint32_t UNDER_WAY = TILE_BLOCKS * THREADS > 1024 ? 1 : 2;
        for (uint32_t first = threadIdx.x; first < num_vectors(); first += UNDER_WAY * THREADS) {
            float values[UNDER_WAY][4];
#pragma unroll
            for (uint32_t v = 0; v < UNDER_WAY; ++v) load(first + v * THREADS, length, values[v]);
#pragma unroll
            for (uint32_t i = 0; i < 4 * UNDER_WAY; ++i) f(values[i / 4][i % 4], position(first + i / 4 * THREADS) + i % 4);
        }
    }
};

// Items in shared memory.
struct List {
    const Item* items;
    uint32_t length;

    template <typename F>
    DEVICE void each(F f) const {
#pragma unroll 4
        for (uint32_t slot = threadIdx.x; slot < length; slot += THREADS) f(items[slot].value, items[slot].position);
    }
};

// COUNT items a thread in registers.
template <uint32_t COUNT>
struct Items {
    float values[COUNT];
    uint32_t positions[COUNT];

    template <typename F>
    DEVICE void each(F f) const {
#pragma unroll
        for (uint32_t i = 0; i < COUNT; ++i) f(values[i], positions[i]);
    }
};

// Numbers spread evenly over the bins. Monotone whatever the range: what is not a number of it, and every score when it has no width,
// goes to one of the two ends.
struct Spread {
    float low, scale, offset;

    // The spacing of floats at 2^23 is one: there the addition rounds to whole bins.
    static constexpr float ZERO = 0x1p23f;

    DEVICE Spread(float low, float high) : low(low), scale((BINS - 1.0f) / (high - low)), offset(ZERO - low * scale) {}

    DEVICE float place(float value) const { return fmaf(value, scale, offset); }

    DEVICE uint32_t bin(float value) const {
        return __float_as_uint(fminf(fmaxf(place(value), ZERO), ZERO + (BINS - 1.0f))) - __float_as_uint(ZERO);
    }

    // Whether `bin(value)` is this one, which is not the lowest: for many values and one bin.
    DEVICE bool holds(uint32_t bin, float value) const {
        const float target = ZERO + bin, high_end = bin == BINS - 1 ? -negative_infinity() : target;
        return (place(value) >= target) & (place(value) <= high_end);
    }

    // About the lowest number of a bin.
    DEVICE float edge(uint32_t bin) const { return low + (bin - 0.5f) / scale; }
};

DEVICE uint32_t warp_inclusive_sum(uint32_t value) {
#pragma unroll
    for (uint32_t step = 1; step < 32; step *= 2) {
        const uint32_t below = __shfl_up_sync(ALL_LANES, value, step);
        value += lane() >= step ? below : 0;
    }
    return value;
}

// The sum over the block's threads below this one. A barrier; `sums` are free again after the next.
DEVICE uint32_t block_exclusive_sum(uint32_t value, uint32_t (&sums)[WARPS]) {
    const uint32_t inclusive = warp_inclusive_sum(value);
    if (lane() == 31) sums[warp()] = inclusive;
    __syncthreads();
    return __reduce_add_sync(ALL_LANES, lane() < warp() ? sums[lane()] : 0) + inclusive - value;
}

// The range that holds every thread's. A barrier.
DEVICE Range block_range(Range own, Selection& shared) {
    const uint32_t low = __reduce_min_sync(ALL_LANES, own.low), high = __reduce_max_sync(ALL_LANES, own.high);
    if (lane() == 0) {
        shared.lows[warp()] = low;
        shared.highs[warp()] = high;
    }
    __syncthreads();
    const bool holds = lane() < WARPS;
    return {__reduce_min_sync(ALL_LANES, holds ? shared.lows[lane()] : ~0u),
            __reduce_max_sync(ALL_LANES, holds ? shared.highs[lane()] : 0u)};
}

DEVICE void clear_histogram(Selection& shared) {
    if (threadIdx.x == 0) shared.num_ranked = 0;
#pragma unroll
    for (uint32_t bin = threadIdx.x; bin < BINS; bin += THREADS) shared.histogram[bin] = 0;
}

DEVICE void count(Selection& shared, uint32_t bin) { atomicAdd(&shared.histogram[bin], 1u); }

// Leaves in `bin` that of the `need`-th item from the top, in `above` the number of items in higher bins, in `count` that in it.
// Two barriers.
DEVICE void find_bin(Selection& shared, uint32_t need) {
    // Thread 0 has the highest bins.
    const uint32_t first = BINS - (threadIdx.x + 1) * BINS_PER_THREAD;
    uint32_t counts[BINS_PER_THREAD], sum = 0;
#pragma unroll
    for (uint32_t i = 0; i < BINS_PER_THREAD; ++i) {
        counts[i] = shared.histogram[first + i];
        sum += counts[i];
    }
    uint32_t above = block_exclusive_sum(sum, shared.sums);
    if (above < need && need <= above + sum) {
#pragma unroll
        for (uint32_t i = BINS_PER_THREAD; i-- > 0;) {
            if (above < need && need <= above + counts[i]) {
                shared.bin = first + i;
                shared.above = above;
                shared.count = counts[i];
            }
            above += counts[i];
        }
    }
    __syncthreads();
}

// Narrows `range` to the bin that holds the `need`-th value inside it from the top, and `need` to the place in there, until few values
// share the bin or it is one number.
template <typename Source, typename Value>
DEVICE void narrow(Selection& shared, const Source& source, Value value, Range& range, uint32_t& need, uint32_t& candidates) {
    while (candidates > RANKED && range.low < range.high) {
        const int shift = max(32 - __clz(static_cast<int>(range.high - range.low)) - BIN_BITS, 0);
        clear_histogram(shared);
        __syncthreads();
        source.each([&](float score, uint32_t position) {
            const uint32_t v = value(score, position);
            if (range.contains(v)) count(shared, v - range.low >> shift);
        });
        __syncthreads();
        find_bin(shared, need);
        need -= shared.above;
        candidates = shared.count;
        range.low += shared.bin << shift;
        range.high = range.low + min(range.high - range.low, (1u << shift) - 1);
    }
}

// The `need`-th of the items that are `candidates`: at most RANKED, compared each with each. Two barriers.
template <typename Source, typename Candidates>
DEVICE Item nth_of(Selection& shared, const Source& source, uint32_t need, Candidates candidates) {
    source.each([&](float value, uint32_t position) {
        if (candidates(value, position)) shared.ranked[atomicAdd(&shared.num_ranked, 1u)] = {value, position};
    });
    __syncthreads();
    const uint32_t num_ranked = shared.num_ranked;
    for (uint32_t i = threadIdx.x; i < num_ranked; i += THREADS) {
        const Threshold own{shared.ranked[i]};
        uint32_t place = 0;
        for (uint32_t other = 0; other < num_ranked; ++other) {
            place += own.selects(shared.ranked[other].value, shared.ranked[other].position);
        }
        if (place == need) shared.last = own.last;
    }
    __syncthreads();
    return shared.last;
}

// Where a place among items was found: the `need`-th of the `candidates` that `spread` sends to `bin`.
struct Place {
    Spread spread;
    uint32_t bin, need, candidates;
};

// The finite numbers of the source, spread over the bins. A barrier, which also makes the bins clear.
template <typename Source>
DEVICE Spread spread_of(Selection& shared, const Source& source) {
    clear_histogram(shared);
    float low = LARGEST, high = -LARGEST;
    source.each([&](float value, uint32_t) {
        low = fminf(low, value);
        high = fmaxf(high, value);
    });
    Range keys = block_range({to_key(low), to_key(high)}, shared);
    if (keys.low < to_key(-LARGEST) || keys.high > to_key(LARGEST)) {
        low = LARGEST;
        high = -LARGEST;
        source.each([&](float value, uint32_t) {
            const float finite = fabsf(value) <= LARGEST ? value : not_a_number();
            low = fminf(low, finite);
            high = fmaxf(high, finite);
        });
        __syncthreads();
        keys = block_range({to_key(low), to_key(high)}, shared);
    }
    return Spread(to_value(keys.low), to_value(keys.high));
}

// Looks for the `need`-th of the source's items by spreading them over the bins, which are clear, and again those of one bin while they
// are more than `few`; a far outlier costs one more round, equal scores stay together.
template <typename Source>
DEVICE Place find_place(Selection& shared, const Source& source, Spread spread, uint32_t need, uint32_t few) {
    constexpr int ROUNDS = 3;
    for (int round = 1;; ++round) {
        source.each([&](float value, uint32_t) { count(shared, spread.bin(value)); });
        __syncthreads();
        find_bin(shared, need);
        const uint32_t bin = shared.bin;
        if (shared.count <= few || round == ROUNDS) return {spread, bin, need - shared.above, shared.count};
        spread = Spread(spread.edge(bin), spread.edge(bin + 1));
        clear_histogram(shared);
        __syncthreads();
    }
}

// The `need`-th of the items, if the first look at them leaves few candidates.
template <typename Source>
DEVICE bool select(Selection& shared, const Source& source, Spread spread, uint32_t need, Item& last) {
    const Place place = find_place(shared, source, spread, need, RANKED);
    // What is no number is in the lowest bin, and what is no element too.
    if (place.candidates > RANKED || place.bin == 0) return false;
    last = nth_of(shared, source, place.need, [&](float value, uint32_t) { return place.spread.holds(place.bin, value); });
    return true;
}

// The `need`-th element of any row.
DEVICE Item select_from_memory(Selection& shared, const Row& row, uint32_t need) {
    Place place = find_place(shared, row, spread_of(shared, row), need, RANKED);
    Range keys{~0u, 0};
    row.each([&](float value, uint32_t position) {
        const bool inside = place.spread.bin(value) == place.bin && position < row.length;
        keys = {min(keys.low, inside ? to_key(value) : ~0u), max(keys.high, inside ? to_key(value) : 0u)};
    });
    keys = block_range(keys, shared);
    const auto key_of = [&](float value, uint32_t position) { return position < row.length ? to_key(value) : ~0u; };
    narrow(shared, row, key_of, keys, place.need, place.candidates);
    // Still many: their keys are equal, and the lowest positions win.
    Range places{~(row.length - 1), ~0u};
    const auto place_of = [&](float value, uint32_t position) { return keys.contains(key_of(value, position)) ? ~position : 0; };
    narrow(shared, row, place_of, places, place.need, place.candidates);
    return nth_of(shared, row, place.need, [&](float value, uint32_t position) { return places.contains(place_of(value, position)); });
}

// A row with no more than k elements selects them all.
DEVICE void write_all(int32_t* out, uint32_t length, uint32_t k) {
    for (uint32_t i = threadIdx.x; i < k; i += THREADS) out[i] = i < length ? static_cast<int32_t>(i) : -1;
}

#ifdef TILE_ITEMS

// A row that takes more than registers. Survivors of the pivot: at most SLOTS a row, dealt out evenly to the blocks that share it.
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
    top_k(const int32_t* positions, const float* logits, int32_t* topk_indices, uint32_t* arrivals, Part* parts, Item* lists,
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

#else

// Rows that fit their block: its registers (TILE_REGISTERS) or its shared memory.
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

#endif
