// What the kernels of `sample` share: rows and how they are read, orders, reductions over a block, the draw.
//
// Tile: TILE_THREADS of a block; TILE_FRACTION_BITS and TILE_LISTED are `sample_filter`'s and `sample_pick`'s.
#pragma once

#include "philox.cuh"

constexpr uint32_t THREADS = TILE_THREADS, WARPS = THREADS / 32;
constexpr uint32_t ALL_LANES = 0xffffffffu, NOBODY = 0xffffffffu;
constexpr uint32_t MAX_PARTS = 128;
// Blocks of a multiprocessor: registers for 24 warps, where it has them.
constexpr uint32_t MIN_BLOCKS = THREADS < 768 / 2 ? 768 / THREADS : 1;
static_assert(THREADS % 32 == 0 && (WARPS & (WARPS - 1)) == 0 && WARPS <= 32, "a warp holds one number of each of them");

// What the host asks of a row. Its edits are pairs in the order of their tokens: 4 * token + what happens, and a bias or a count.
struct alignas(16) Request {
    uint32_t seed_low, seed_high, position, forced;
    float temperature, top_p, min_p, min_p_depth;
    uint32_t top_k;
    float repetition, frequency, presence;
    uint32_t edits_begin, edits_end, filtered, unused;
};
static_assert(sizeof(Request) == 64, "the launcher writes it");
constexpr uint32_t BAN = 0, BIAS = 1;

// What a filtered row's kernels tell the next: the best logits and the cut. Tokens are drawn from bins below `draw_below`, listed or
// searched from the bins `list_from` to `list_to`, of which the best `keep` may stay, and of these as many as reach `enough` with the mass
// above; where that is below 0, as many as reach a share of what `keep` leaves.
enum Plan : uint32_t { DONE, FILTER, CUT, SEARCH };
struct alignas(16) State {
    double raw_max, ln_total, max;
    double enough, mass_above;
    uint32_t plan, draw_below, list_from, list_to, keep, best_id;
};
static_assert(sizeof(State) == 64, "the launcher allocates it");

// What a part of a row found: its best raw logit (see `place_of`), the sum of powers from it, its best logit, and what it drew.
struct alignas(16) Part {
    uint64_t raw;
    double sum;
    uint64_t best;
    uint32_t best_id, drawn_id;
    double drawn;
    uint64_t unused;
};
static_assert(sizeof(Part) == 48, "the launcher allocates it");

DEVICE double from_bits(uint64_t bits) { return __longlong_as_double(static_cast<int64_t>(bits)); }
DEVICE uint64_t to_bits(double x) { return static_cast<uint64_t>(__double_as_longlong(x)); }
DEVICE uint64_t joined(float low, float high) { return static_cast<uint64_t>(__float_as_uint(high)) << 32 | __float_as_uint(low); }

DEVICE Part load_published_part(const Part* part) {
    const float4* words = reinterpret_cast<const float4*>(part);
    const float4 a = load_published_16(words), b = load_published_16(words + 1), c = load_published_16(words + 2);
    return {joined(a.x, a.y), from_bits(joined(a.z, a.w)), joined(b.x, b.y), __float_as_uint(b.z), __float_as_uint(b.w),
            from_bits(joined(c.x, c.y)), 0};
}

DEVICE double negative_infinity() { return from_bits(0xfff0000000000000ull); }
DEVICE double not_a_number() { return from_bits(0x7ff8000000000000ull); }

// Numbers as integers of their order: -0.0 as +0.0, NaN below all of them.
DEVICE uint32_t to_key(float x) {
    const uint32_t bits = __float_as_uint(x + 0.0f);
    return x == x ? bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u) : 0;
}
DEVICE float to_float(uint32_t key) {
    return __uint_as_float(key == 0 ? 0x7fc00000u : key ^ (static_cast<uint32_t>(static_cast<int32_t>(~key) >> 31) | 0x80000000u));
}
DEVICE uint64_t to_key(double x) {
    const uint64_t bits = to_bits(x + 0.0);
    return x == x ? (bits >> 63 != 0 ? ~bits : bits | 1ull << 63) : 0;
}
DEVICE double to_double(uint64_t key) {
    return key == 0 ? not_a_number() : from_bits(key >> 63 != 0 ? key & ~(1ull << 63) : ~key);
}

// A raw logit and its token as one integer: larger is better, the lower token of equal ones; 0 is nobody.
DEVICE uint64_t place_of(float x, uint32_t id) { return static_cast<uint64_t>(to_key(x)) << 32 | ~id; }
DEVICE uint32_t id_of(uint64_t place) { return ~static_cast<uint32_t>(place); }
DEVICE float value_of(uint64_t place) { return to_float(static_cast<uint32_t>(place >> 32)); }

// An element by a number that the compiler does not know, without memory.
template <typename T>
DEVICE T at(const T (&four)[4], uint32_t i) {
    return i < 2 ? (i == 0 ? four[0] : four[1]) : (i == 2 ? four[2] : four[3]);
}

// x - max, also for infinities; NaN is negative infinity.
DEVICE double below(double x, double max) { return x == max ? 0.0 : x == x ? x - max : negative_infinity(); }

// What a block reduces through.
struct Block {
    uint64_t keys[WARPS];
    double sums[WARPS];
    uint32_t ids[WARPS], counts[WARPS];
    uint32_t last, unused[3];
    // Edited tokens of a stretch of a row.
    uint32_t marks[THREADS];
};

DEVICE uint32_t lane() { return threadIdx.x % 32; }
DEVICE uint32_t warp() { return threadIdx.x / 32; }

// A number with whom it belongs to; the lower id of equal ones is better.
struct Ranked {
    uint64_t key;
    uint32_t id;
    DEVICE bool operator<(const Ranked& other) const { return key < other.key || (key == other.key && id > other.id); }
};

DEVICE Ranked warp_best(Ranked own) {
    const uint32_t own_high = static_cast<uint32_t>(own.key >> 32), own_low = static_cast<uint32_t>(own.key);
    const uint32_t high = __reduce_max_sync(ALL_LANES, own_high);
    const uint32_t low = __reduce_max_sync(ALL_LANES, own_high == high ? own_low : 0);
    const bool best = own_high == high && own_low == low;
    return {static_cast<uint64_t>(high) << 32 | low, __reduce_min_sync(ALL_LANES, best ? own.id : NOBODY)};
}

DEVICE Ranked block_best(Block& block, Ranked own) {
    own = warp_best(own);
    __syncthreads();
    if (lane() == 0) block.keys[warp()] = own.key, block.ids[warp()] = own.id;
    __syncthreads();
    return warp_best(lane() < WARPS ? Ranked{block.keys[lane()], block.ids[lane()]} : Ranked{0, NOBODY});
}

// Sums over a block, always in the same order: of what the threads before have, and of all.
template <typename T>
struct Scan {
    T before, all;
};
template <typename T>
DEVICE Scan<T> block_scan(T (&of_warps)[WARPS], T own) {
    T inclusive = own;
#pragma unroll
    for (uint32_t distance = 1; distance < 32; distance *= 2) {
        const T other = __shfl_up_sync(ALL_LANES, inclusive, distance);
        if (lane() >= distance) inclusive += other;
    }
    const T in_warp = __shfl_up_sync(ALL_LANES, inclusive, 1);
    __syncthreads();
    if (lane() == 31) of_warps[warp()] = inclusive;
    __syncthreads();
    Scan<T> sums{0, 0};
#pragma unroll 4
    for (uint32_t w = 0; w < WARPS; ++w) {
        if (w == warp()) sums.before = sums.all;
        sums.all += of_warps[w];
    }
    if (lane() > 0) sums.before += in_warp;
    return sums;
}
using Sums = Scan<double>;
DEVICE Sums block_sums(Block& block, double own) { return block_scan(block.sums, own); }

struct Counts {
    uint32_t before, all;
};
DEVICE Counts block_counts(Block& block, uint32_t own) {
    uint32_t inclusive = own;
#pragma unroll
    for (uint32_t distance = 1; distance < 32; distance *= 2) {
        const uint32_t other = __shfl_up_sync(ALL_LANES, inclusive, distance);
        if (lane() >= distance) inclusive += other;
    }
    __syncthreads();
    if (lane() == 31) block.counts[warp()] = inclusive;
    __syncthreads();
    const uint32_t count = lane() < WARPS ? block.counts[lane()] : 0;
    return {__reduce_add_sync(ALL_LANES, lane() < warp() ? count : 0) + inclusive - own, __reduce_add_sync(ALL_LANES, count)};
}

// Whether all other parts of the row are done; what they wrote is then there for published loads.
DEVICE bool is_last(Block& block, uint32_t* arrivals, uint32_t num_parts) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        block.last = atomicAdd(arrivals, 1u) == num_parts - 1;
        __threadfence();
        if (block.last) *arrivals = 0;
    }
    __syncthreads();
    return block.last;
}

// A row of logits, and the part of it that a block takes: vectors of four tokens, and the edits of them.
struct Row {
    const float* logits;
    const uint2* edits;
    const Request& request;
    uint32_t vocab;
    uint32_t begin, end;
    uint32_t edits_begin, edits_end;
    bool any_edits;

    // `any_edits` says whether any row of the launch has some: where none has, its logits do not wait for the request.
    DEVICE Row(const float* all_logits, const uint8_t* uploads, uint32_t row, uint32_t rows, uint32_t first_row, uint32_t vocab,
               bool any_edits)
        : logits(all_logits + static_cast<int64_t>(first_row + row) * vocab),
          edits(reinterpret_cast<const uint2*>(uploads + sizeof(Request) * rows + 8 * ((rows + 1) / 2))),
          request(reinterpret_cast<const Request*>(uploads)[row]),
          vocab(vocab),
          begin(0),
          end(0),
          edits_begin(0),
          edits_end(0),
          any_edits(any_edits) {}

    DEVICE uint32_t token(uint32_t edit) const { return edits[edit].x >> 2; }

    // The first of the row's edits whose token is not below `bound`.
    DEVICE uint32_t first_edit(uint32_t bound) const {
        uint32_t from = request.edits_begin, to = request.edits_end;
#pragma unroll 1
        while (from < to) {
            const uint32_t step = (to - from + 31) / 32, probe = from + lane() * step;
            const uint32_t smaller = __popc(__ballot_sync(ALL_LANES, probe < to && token(probe) < bound));
            if (smaller == 0) return from;
            to = min(to, from + smaller * step);
            from += (smaller - 1) * step + 1;
        }
        return from;
    }

    DEVICE void take(uint32_t part, uint32_t num_parts) {
        const uint32_t vectors = (vocab + 3) / 4, share = (vectors + num_parts - 1) / num_parts;
        begin = min(part * share, vectors);
        end = min(begin + share, vectors);
        if (!any_edits) return;
        edits_begin = first_edit(4 * begin);
        edits_end = first_edit(4 * end);
    }

    // Loads a vector of the row; bits say which of its tokens there are.
    DEVICE uint32_t load(uint32_t vector, float (&values)[4]) const {
        if (vocab % 4 == 0) {
            const float4 four = *reinterpret_cast<const float4*>(logits + 4 * vector);
            values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
            return 15;
        }
        uint32_t valid = 0;
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) {
            const bool inside = 4 * vector + j < vocab;
            values[j] = inside ? logits[4 * vector + j] : 0.0f;
            valid |= static_cast<uint32_t>(inside) << j;
        }
        return valid;
    }

    // The logit of the token whose first edit this is, after all of its edits.
    DEVICE double edited(uint32_t edit) const {
        const uint32_t id = token(edit);
        double x = logits[id];
#pragma unroll 1
        for (; edit < request.edits_end && token(edit) == id; ++edit) {
            const uint2 change = edits[edit];
            if (change.x % 4 == BAN) {
                x = negative_infinity();
            } else if (change.x % 4 == BIAS) {
                x += static_cast<double>(__uint_as_float(change.y));
            } else {
                const double repetition = request.repetition;
                x = x > 0.0 ? x / repetition : x * repetition;
                if (change.y > 0) {
                    x -= static_cast<double>(request.frequency) * static_cast<double>(change.y) + static_cast<double>(request.presence);
                }
            }
        }
        return x;
    }

    // Goes through the part: `plain(vector, values, valid, kept)` for every vector, with bits for the tokens that there are and for those
    // that no edit changes, and `changed(id, logit)` for the others. All threads of the block come here together.
    template <uint32_t AT_ONCE, typename Plain, typename Changed>
    DEVICE void each(Block& block, Plain plain, Changed changed) const {
        constexpr uint32_t STRETCH = 8 * THREADS;
        if (edits_begin == edits_end) {
#pragma unroll 1
            for (uint32_t first = begin; first < end; first += AT_ONCE * THREADS) {
                float values[AT_ONCE][4];
                uint32_t valid[AT_ONCE];
#pragma unroll
                for (uint32_t i = 0; i < AT_ONCE; ++i) {
                    const uint32_t vector = first + i * THREADS + threadIdx.x;
                    valid[i] = vector < end ? load(vector, values[i]) : 0;
                }
#pragma unroll
                for (uint32_t i = 0; i < AT_ONCE; ++i) {
                    if (valid[i] != 0) plain(first + i * THREADS + threadIdx.x, values[i], valid[i], valid[i]);
                }
            }
            return;
        }
        for (uint32_t first = begin; first < end; first += STRETCH) {
            __syncthreads();
            block.marks[threadIdx.x] = 0;
            __syncthreads();
#pragma unroll 1
            for (uint32_t edit = edits_begin + threadIdx.x; edit < edits_end; edit += THREADS) {
                const uint32_t place = token(edit) - 4 * first;
                if (place < 4 * STRETCH) atomicOr(&block.marks[place / 32], 1u << place % 32);
            }
            __syncthreads();
#pragma unroll 1
            for (uint32_t vector = first + threadIdx.x; vector < min(first + STRETCH, end); vector += THREADS) {
                float values[4];
                const uint32_t valid = load(vector, values), place = 4 * (vector - first);
                plain(vector, values, valid, valid & ~(block.marks[place / 32] >> place % 32));
            }
        }
#pragma unroll 1
        for (uint32_t edit = edits_begin + threadIdx.x; edit < edits_end; edit += THREADS) {
            if (edit == edits_begin || token(edit - 1) != token(edit)) changed(token(edit), edited(edit));
        }
    }

    // Likewise, token by token: `f(id, logit)` for each with its edited logit.
    template <typename F>
    DEVICE void each_edited(Block& block, F f) const {
        each<1>(
            block,
            [&](uint32_t vector, const float(&values)[4], uint32_t, uint32_t kept) {
#pragma unroll 1
                for (uint32_t j = 0; j < 4; ++j) {
                    if (kept >> j & 1) f(4 * vector + j, static_cast<double>(at(values, j)));
                }
            },
            f);
    }
};

DEVICE float highest(const float (&values)[4]) { return fmaxf(fmaxf(values[0], values[1]), fmaxf(values[2], values[3])); }

// The best logit that a thread has seen.
struct Lead {
    float value = 0.0f;
    uint32_t id = NOBODY;

    DEVICE void see(uint32_t vector, const float (&values)[4], uint32_t tokens) {
        if (id != NOBODY && highest(values) <= value) return;
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) {
            const bool better = id == NOBODY || values[j] > value || (value != value && values[j] == values[j]);
            if ((tokens >> j & 1) && better) value = values[j], id = 4 * vector + j;
        }
    }

    DEVICE uint64_t place() const { return id == NOBODY ? 0 : place_of(value, id); }
};

// Gumbel-max over tokens: the highest log-probability plus noise, in f64. Every token's value is known to 1e-5 in f32 first, and only what
// comes near the highest is looked at closely.
//
// Most are not even looked at in f32. A token with the probability p relative to the reference's beats the value b only if
// 1 - u <= -ln u <= p e^-b, where u is its random number: what one power for the best of a vector says about all four words of it.
struct Draw {
    static constexpr float MARGIN = 4e-5f, LOG2_E = 1.44269504f;

    const Request& request;
    // The logit that the others are measured from, and the lowest that any noise can lift above it: noise lies between -2.82 and 16.64.
    double reference, inverse;
    float lowest;
    // A power of two for p e^-b; with what rounding may take from it.
    float rough_reference, scale, slack, offset;
    float best, second;
    Ranked chosen;
    double chosen_logit;

    // `best_id` is a token with the reference's logit: nothing with less than its noise is drawn.
    DEVICE Draw(const Request& request, double reference, uint32_t best_id)
        : request(request),
          reference(reference),
          inverse(1.0 / static_cast<double>(request.temperature)),
          rough_reference(static_cast<float>(reference)),
          scale(static_cast<float>(inverse) * LOG2_E),
          best(static_cast<float>(negative_infinity())),
          second(best),
          chosen{0, NOBODY},
          chosen_logit(0.0) {
        const double reach = 20.0 * static_cast<double>(request.temperature);
        const double infinity = -negative_infinity();
        lowest = static_cast<float>(reference == infinity ? infinity : reference - reach - (fabs(reference) + reach) * 0x1p-22);
        slack = fabsf(rough_reference) * scale * 0x1p-23f + 2e-4f;
        offset = slack - (best_id == NOBODY ? -2.82f : rough_noise(word_of(best_id))) * LOG2_E;
    }

    DEVICE Words words(uint32_t group) const { return philox(group, request.position, request.seed_low, request.seed_high); }

    DEVICE float rough(double logit, uint32_t word) const {
        return static_cast<float>(logit == reference ? 0.0 : (logit - reference) * inverse) + rough_noise(word);
    }

    DEVICE double exact(double logit, uint32_t word) const {
        return below(logit, reference) / static_cast<double>(request.temperature) + noise(word);
    }

    // Tokens of a vector that are too improbable for any noise.
    DEVICE uint32_t probable(const float (&values)[4], uint32_t tokens) const {
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) {
            if (!(values[j] >= lowest)) tokens &= ~(1u << j);
        }
        return tokens;
    }

    DEVICE void see(float value, uint32_t id, double logit) {
        if (value > best) {
            second = best, best = value;
            chosen.id = id, chosen_logit = logit;
            offset = fminf(offset, slack - best * LOG2_E);
        } else if (value > second) {
            second = value;
        }
    }

    DEVICE void see_vector(uint32_t vector, const float (&values)[4], uint32_t tokens) {
        const float share = exp2_approx(fmaf(highest(values) - rough_reference, scale, offset));
        // Where the numbers are out of range, everything is looked at.
        if (share < 0x1p-25f) return;
        const Words random = words(vector);
        const uint32_t largest = max(max(random.of[0], random.of[1]), max(random.of[2], random.of[3]));
        // In units of words, and a little less than it is.
        const uint32_t least = share < 1.0f ? static_cast<uint32_t>((1.0f - share) * 0x1.fffffp31f) : 0;
        if (largest < least) return;
        tokens = probable(values, tokens);
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) {
            if (random.of[j] < least) tokens &= ~(1u << j);
        }
#pragma unroll 1
        for (; tokens != 0; tokens &= tokens - 1) {
            const uint32_t j = static_cast<uint32_t>(__ffs(static_cast<int>(tokens)) - 1);
            const float logit = at(values, j);
            see(rough(logit, at(random.of, j)), 4 * vector + j, logit);
        }
    }

    DEVICE uint32_t word_of(uint32_t id) const {
        const Words random = words(id / 4);
        return at(random.of, id % 4);
    }

    DEVICE void see_token(uint32_t id, double logit) {
        if (logit > negative_infinity()) see(rough(logit, word_of(id)), id, logit);
    }

    DEVICE void look_closely(uint32_t id, double logit) {
        const Ranked other{to_key(exact(logit, word_of(id))), id};
        if (chosen < other) chosen = other, chosen_logit = logit;
    }

    // The block's choice among what its threads have seen, NOBODY if nothing; `chosen_logit` is its where `chosen` is. `each(f)` calls
    // f(id, logit) for all of it again.
    template <typename Each>
    DEVICE Ranked finish(Block& block, Each each) {
        const float highest = to_float(static_cast<uint32_t>(block_best(block, {to_key(best), 0}).key));
        const float near = highest - MARGIN;
        const bool have = highest > static_cast<float>(negative_infinity());
        if (__syncthreads_or(have && second >= near)) {
            chosen = {0, NOBODY};
            each([&](uint32_t id, double logit) {
                if (logit > negative_infinity() && rough(logit, word_of(id)) >= near) look_closely(id, logit);
            });
        } else if (have && best >= near) {
            const uint32_t id = chosen.id;
            chosen = {0, NOBODY};
            look_closely(id, chosen_logit);
        } else {
            chosen = {0, NOBODY};
        }
        return block_best(block, chosen);
    }
};
