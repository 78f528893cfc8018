// How `sample_filter` and `sample_pick` tell tokens apart: by their depth, which is minus the log-probability relative to the best token's.
#pragma once

#include "sample.cuh"

// Bins are as wide as a share 2^-TILE_FRACTION_BITS of their octave; the lowest takes all that is less deep than 2^-26.
constexpr uint32_t OCTAVES = 32, BINS = OCTAVES << TILE_FRACTION_BITS;
constexpr uint32_t LOWEST = (127 - 26) << TILE_FRACTION_BITS;

// Deeper tokens have 2e-21 of the probability together: no noise draws them, and no sum sees them.
constexpr float DEEPEST = 60.0f;

DEVICE uint32_t bin_of(float depth) {
    const uint32_t bits = __float_as_uint(depth) >> (23 - TILE_FRACTION_BITS);
    return bits < LOWEST ? 0 : bits - LOWEST;
}
// The depth that the tokens of a bin are weighed relative to: in the middle of a narrow one, at the best of a wide one.
constexpr bool NARROW = TILE_FRACTION_BITS >= 6;
DEVICE double origin_of(uint32_t bin) {
    const uint32_t middle = NARROW ? 1u << (22 - TILE_FRACTION_BITS) : 0;
    return bin == 0 ? 0.0 : static_cast<double>(__uint_as_float((bin + LOWEST) << (23 - TILE_FRACTION_BITS) | middle));
}

// What `min_p` leaves of a row, and where tokens stand in it.
struct Depths {
    double max, temperature, inverse, min_p;
    float surely, hardly;

    DEVICE Depths(const Request& request, double max)
        : max(max),
          temperature(request.temperature),
          inverse(1.0 / static_cast<double>(request.temperature)),
          min_p(request.min_p),
          surely(min(request.min_p_depth - 1e-3f, DEEPEST)),
          hardly(min(request.min_p_depth + 1e-3f, DEEPEST)) {}

    // Rounding keeps the order, so that bins have it too.
    DEVICE float rough(double logit) const { return static_cast<float>(logit == max ? 0.0 : (max - logit) * inverse); }
    DEVICE double exact(double logit) const { return logit == max ? 0.0 : (max - logit) / temperature; }

    // NaN is not kept.
    DEVICE bool keeps(float depth, double logit) const {
        if (depth <= surely) return true;
        return depth <= hardly && (min_p == 0.0 || exp(-exact(logit)) >= min_p);
    }

    // Which of a vector's tokens are kept, and how deep they are.
    DEVICE uint32_t kept(const float (&values)[4], uint32_t tokens, float (&depths)[4]) const {
        uint32_t unsure = 0;
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) {
            depths[j] = rough(values[j]);
            if (!(depths[j] <= hardly)) tokens &= ~(1u << j);
            if (!(depths[j] <= surely)) unsure |= 1u << j;
        }
        unsure &= tokens;
        if (unsure == 0 || min_p == 0.0) return tokens;
#pragma unroll 1
        for (; unsure != 0; unsure &= unsure - 1) {
            const int j = __ffs(static_cast<int>(unsure)) - 1;
            if (exp(-exact(at(values, j))) < min_p) tokens &= ~(1u << j);
        }
        return tokens;
    }
};

// What a thread counts of a bin, or a digit, before the block hears of it: tokens that are alike do not queue for one word one by one.
struct Run {
    uint32_t bin = NOBODY, count = 0;
    uint64_t units = 0;

    // tell(bin, count, units) when another bin comes.
    template <typename Tell>
    DEVICE void add(uint32_t other, uint64_t more, Tell tell) {
        if (other != bin) {
            if (bin != NOBODY) tell(bin, count, units);
            bin = other, count = 0, units = 0;
        }
        ++count, units += more;
    }

    template <typename Tell>
    DEVICE void end(Tell tell) const {
        if (bin != NOBODY) tell(bin, count, units);
    }
};

// Adds to a sum whose lower half lies in shared memory; what the upper half then grows by.
DEVICE uint32_t add_low(uint32_t* low, uint64_t units) {
    const uint32_t own = static_cast<uint32_t>(units), before = atomicAdd(low, own);
    return static_cast<uint32_t>(units >> 32) + static_cast<uint32_t>(before + own < before);
}
