// The selection of `top_k`: the k-th best of any items, exactly. Whatever fools its histograms (equal scores, outliers) only costs time.
#pragma once

#include "top_k_row.cuh"

constexpr uint32_t BINS = TILE_BINS, BINS_PER_THREAD = BINS / THREADS;
// Candidates for the k-th place that are few enough to be compared each with each.
constexpr uint32_t RANKED = TILE_RANKED;
constexpr int bits_of(uint32_t power_of_two) { return power_of_two == 1 ? 0 : 1 + bits_of(power_of_two / 2); }
constexpr int BIN_BITS = bits_of(BINS);

static_assert(BINS % THREADS == 0 && (BINS & (BINS - 1)) == 0, "bins are dealt out evenly, and cut off bits");

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
