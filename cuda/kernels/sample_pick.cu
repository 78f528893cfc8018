// `sample`, third kernel: the cut of filtered rows, and the draw among what it leaves.
//
// Tokens that surely stay are drawn by the blocks of the row, those of the bin in which the cut lies are listed; the last block puts the
// list into order. Where too many tokens are alike to be listed, the blocks of the row narrow the cut's place down together: they count
// what lies in each of DIGITS parts of a range of depths, then of ids, which ends after (64 + 32) / DIGIT_BITS rounds whatever there is.
#include "sample_bins.cuh"

constexpr uint32_t DIGIT_BITS = TILE_FRACTION_BITS + 3, DIGITS = 1u << DIGIT_BITS;
// Sums of a round, those of the round before, which others may still read, and zeros for the next.
static_assert(3 * DIGITS <= BINS, "rounds count in what `sample_filter` leaves zeros in");

struct Digits {
    uint32_t counts[DIGITS], low[DIGITS], high[DIGITS];
};

struct Shared {
    Block block;
    union {
        struct {
            uint64_t keys[TILE_LISTED];
            uint32_t ids[TILE_LISTED];
        };
        Digits digits;
    };
    uint64_t above;
    uint32_t cut, digit;
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher's sum");

struct alignas(16) Listed {
    uint64_t depth;
    uint32_t id, unused;
};

// A token's place in the row's order: its depth's bits, and its id.
struct Place {
    uint64_t depth;
    uint32_t id;
    DEVICE bool operator<=(const Place& other) const { return depth < other.depth || (depth == other.depth && id <= other.id); }
};

DEVICE uint32_t next_power_of_two(uint32_t n) { return n <= 1 ? 1 : 1u << (32 - __clz(n - 1)); }

// Sorts the first `length` of the list, padded to a power of two, best first.
DEVICE void sort(Shared& shared, uint32_t length) {
    const uint32_t padded = next_power_of_two(length);
#pragma unroll 1
    for (uint32_t i = length + threadIdx.x; i < padded; i += THREADS) shared.keys[i] = ~0ull, shared.ids[i] = NOBODY;
#pragma unroll 1
    for (uint32_t size = 2; size <= padded; size *= 2) {
#pragma unroll 1
        for (uint32_t stride = size / 2; stride > 0; stride /= 2) {
            __syncthreads();
#pragma unroll 1
            for (uint32_t pair = threadIdx.x; pair < padded / 2; pair += THREADS) {
                const uint32_t a = 2 * stride * (pair / stride) + pair % stride, b = a + stride;
                const Place first{shared.keys[a], shared.ids[a]}, second{shared.keys[b], shared.ids[b]};
                if ((a & size) == 0 ? !(first <= second) : first <= second) {
                    shared.keys[a] = second.depth, shared.ids[a] = second.id;
                    shared.keys[b] = first.depth, shared.ids[b] = first.id;
                }
            }
        }
    }
    __syncthreads();
}

// How many of a sorted list stay.
DEVICE uint32_t kept_of(Shared& shared, const Request& request, const State& state, uint32_t length) {
    const uint32_t keep = min(state.keep, length);
    if (!(request.top_p < 1.0f) || keep == 0) return keep;
    const uint32_t share = (keep + THREADS - 1) / THREADS;
    const uint32_t first = min(threadIdx.x * share, keep), last = min(first + share, keep);
    double own = 0.0;
#pragma unroll 1
    for (uint32_t i = first; i < last; ++i) own += exp(-from_bits(shared.keys[i]));
    const Sums sums = block_sums(shared.block, own);
    const double enough = state.enough >= 0.0 ? state.enough : static_cast<double>(request.top_p) * sums.all;
    if (threadIdx.x == 0) shared.cut = keep;
    __syncthreads();
    double through = state.mass_above + sums.before;
#pragma unroll 1
    for (uint32_t i = first; i < last; ++i) {
        through += exp(-from_bits(shared.keys[i]));
        if (through >= enough) {
            atomicMin(&shared.cut, i + 1);
            break;
        }
    }
    __syncthreads();
    return shared.cut;
}

// The blocks that search a row, in step. All of them are resident: the launcher has no more than there are multiprocessors.
struct Team {
    uint32_t* arrivals;
    uint32_t parts, part, arrived;

    // What all wrote before is then there for published loads.
    DEVICE void meet() {
        __syncthreads();
        arrived += parts;
        if (threadIdx.x == 0) {
            __threadfence();
            atomicAdd(arrivals, 1u);
            while (load_acquire_system(arrivals) < arrived) {}
            __threadfence();
        }
        __syncthreads();
    }
};

// The place of the cut among the tokens of some bins, all blocks of the team together and with the same result.
struct Search {
    Shared& shared;
    const Row& row;
    const Depths& depths;
    Team& team;
    Part* parts;
    uint32_t* counts;
    uint64_t* masses;
    // The bins, whether mass is wanted or tokens, and how much of it.
    uint32_t from, to;
    bool by_mass;
    uint64_t wanted;
    uint32_t round;
    // Of the last token, since others are often like it; its mass in units of 2^-45.
    double logit, depth;
    uint64_t units;

    DEVICE void look_at(double other) {
        if (other == logit) return;
        logit = other;
        depth = depths.exact(other);
        units = by_mass ? static_cast<uint64_t>(static_cast<int64_t>(exp(-depth) * 0x1p45)) : 0;
    }

    // Calls f(id) for every token of the bins, having looked at its logit.
    template <typename F>
    DEVICE void each(F f) {
        logit = not_a_number();
        row.each<2>(
            shared.block,
            [&](uint32_t vector, const float(&values)[4], uint32_t, uint32_t tokens) {
                float rough[4];
                tokens = depths.kept(values, tokens, rough);
#pragma unroll
                for (uint32_t j = 0; j < 4; ++j) {
                    const uint32_t bin = bin_of(rough[j]);
                    if (bin < from || bin > to) tokens &= ~(1u << j);
                }
#pragma unroll 1
                for (; tokens != 0; tokens &= tokens - 1) {
                    const uint32_t j = static_cast<uint32_t>(__ffs(static_cast<int>(tokens)) - 1);
                    look_at(at(values, j));
                    f(4 * vector + j);
                }
            },
            [&](uint32_t id, double changed) {
                const float rough = depths.rough(changed);
                const uint32_t bin = bin_of(rough);
                if (!depths.keeps(rough, changed) || bin < from || bin > to) return;
                look_at(changed);
                f(id);
            });
    }

    // What each part says, put together by `join(part)`.
    template <typename F>
    DEVICE void hear(Part own, F join) {
        if (threadIdx.x == 0) parts[team.part] = own;
        team.meet();
#pragma unroll 1
        for (uint32_t p = threadIdx.x; p < team.parts; p += THREADS) join(load_published_part(parts + p));
    }

    // One round: into which part of a range the place falls. What is wanted is then wanted of that part.
    template <typename Key>
    DEVICE void narrow(uint64_t& lowest, uint64_t& highest, Key key) {
        Digits& digits = shared.digits;
        const uint32_t bits = 64 - static_cast<uint32_t>(__clzll(static_cast<int64_t>(highest - lowest)));
        const uint32_t shift = bits > DIGIT_BITS ? bits - DIGIT_BITS : 0;
        uint32_t* sums = counts + round % 3 * DIGITS;
        uint32_t* mass_words = reinterpret_cast<uint32_t*>(masses + round % 3 * DIGITS);
        const uint32_t next = ++round % 3 * DIGITS;
        __syncthreads();
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < DIGITS; i += THREADS) {
            digits.counts[i] = digits.low[i] = digits.high[i] = 0;
            if (team.part == 0) counts[next + i] = 0, masses[next + i] = 0;
        }
        if (threadIdx.x == 0) shared.digit = DIGITS;
        __syncthreads();
        Run run;
        const auto tell = [&](uint32_t digit, uint32_t count, uint64_t mass) {
            atomicAdd(&digits.counts[digit], count);
            const uint32_t high = by_mass ? add_low(&digits.low[digit], mass) : 0;
            if (high != 0) atomicAdd(&digits.high[digit], high);
        };
        each([&](uint32_t id) {
            const uint64_t place = key(id);
            if (place >= lowest && place <= highest) run.add(static_cast<uint32_t>((place - lowest) >> shift), units, tell);
        });
        run.end(tell);
        __syncthreads();
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < DIGITS; i += THREADS) {
            if (digits.counts[i] == 0) continue;
            atomicAdd(&sums[i], digits.counts[i]);
            if (by_mass) atomicAdd(masses + (sums - counts) + i, static_cast<uint64_t>(digits.high[i]) << 32 | digits.low[i]);
        }
        team.meet();
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < DIGITS; i += THREADS) {
            digits.counts[i] = load_published(sums + i);
            digits.low[i] = load_published(mass_words + 2 * i), digits.high[i] = load_published(mass_words + 2 * i + 1);
        }
        __syncthreads();
        constexpr uint32_t SHARE = (DIGITS + THREADS - 1) / THREADS;
        const uint32_t first = min(threadIdx.x * SHARE, DIGITS), last = min(first + SHARE, DIGITS);
        const auto mass_of = [&](uint32_t i) { return static_cast<uint64_t>(digits.high[i]) << 32 | digits.low[i]; };
        uint32_t own_count = 0;
        uint64_t own_mass = 0;
#pragma unroll 1
        for (uint32_t i = first; i < last; ++i) own_count += digits.counts[i], own_mass += mass_of(i);
        const Counts count = block_counts(shared.block, own_count);
        const Scan<uint64_t> mass = block_scan(shared.block.keys, own_mass);
        uint32_t own_digit = DIGITS, through = count.before;
        uint64_t above = 0, through_mass = mass.before;
#pragma unroll 1
        for (uint32_t i = first; i < last && own_digit == DIGITS; ++i) {
            if (digits.counts[i] == 0) continue;
            above = by_mass ? through_mass : through;
            through += digits.counts[i], through_mass += mass_of(i);
            if ((by_mass ? through_mass : through) >= wanted || through == count.all) own_digit = i;
        }
        if (own_digit < DIGITS) atomicMin(&shared.digit, own_digit);
        __syncthreads();
        if (own_digit < DIGITS && own_digit == shared.digit) shared.above = above;
        __syncthreads();
        wanted -= min(wanted, shared.above);
        lowest += static_cast<uint64_t>(shared.digit) << shift;
        highest = min(highest, lowest + ((static_cast<uint64_t>(1) << shift) - 1));
    }

    // The place through which there are as many tokens as wanted, or as much mass.
    DEVICE Place find() {
        uint64_t lowest = ~static_cast<uint64_t>(0), highest = 0;
        each([&](uint32_t) { lowest = min(lowest, to_bits(depth)), highest = max(highest, to_bits(depth)); });
        // Both as something that is largest.
        Part part{};
        part.raw = block_best(shared.block, {~lowest, 0}).key, part.best = block_best(shared.block, {highest, 0}).key;
        uint64_t first = 0, last = 0;
        hear(part, [&](const Part& other) { first = max(first, other.raw), last = max(last, other.best); });
        lowest = ~block_best(shared.block, {first, 0}).key, highest = block_best(shared.block, {last, 0}).key;
#pragma unroll 1
        while (lowest < highest) narrow(lowest, highest, [&](uint32_t) { return to_bits(depth); });
        const uint64_t found = lowest;
        lowest = 0, highest = row.vocab - 1;
        // Others are in no range.
        constexpr uint64_t NOWHERE = ~static_cast<uint64_t>(0);
        const auto id_of_equal = [&](uint32_t id) { return to_bits(depth) == found ? id : NOWHERE; };
#pragma unroll 1
        while (lowest < highest) narrow(lowest, highest, id_of_equal);
        return {found, static_cast<uint32_t>(lowest)};
    }

    // The mass of the tokens through a place.
    DEVICE uint64_t mass_through(const Place& last) {
        uint64_t own = 0;
        each([&](uint32_t id) { own += Place{to_bits(depth), id} <= last ? units : 0; });
        Part part{};
        part.raw = block_scan(shared.block.keys, own).all;
        uint64_t all = 0;
        hear(part, [&](const Part& other) { all += other.raw; });
        all = block_scan(shared.block.keys, all).all;
        // Before anybody says something else.
        team.meet();
        return all;
    }
};

KERNEL void __launch_bounds__(THREADS, (MIN_BLOCKS + 1) / 2)
    sample_pick(const float* __restrict__ all_logits, const uint8_t* __restrict__ uploads,
                uint32_t* arrivals,                  // [rows] zeros
                const State* states,                 // [rows]
                Part* parts,                         // [rows, MAX_PARTS]
                uint32_t* lengths,                   // [rows] zeros
                Listed* lists,                       // [rows, TILE_LISTED]
                uint32_t* counts, uint64_t* masses,  // [rows, BINS] zeros
                int32_t* token_ids, float* logprobs, // [rows]
                int32_t rows, int32_t first_row, int32_t vocab, int32_t num_parts, int32_t any_edits, int32_t searching_parts) {
    Shared& shared = shared_memory<Shared>();
    Block& block = shared.block;
    const uint32_t* filtered = reinterpret_cast<const uint32_t*>(uploads + sizeof(Request) * rows);
    const uint32_t index = filtered[blockIdx.x / num_parts], part = blockIdx.x % num_parts;
    const State& state = states[index];
    const bool searches = state.plan == SEARCH;
    const uint32_t parts_of_row = searches ? searching_parts : num_parts;
    if (state.plan == DONE || part >= parts_of_row) return;
    Row row(all_logits, uploads, index, rows, first_row, vocab, any_edits != 0);
    row.take(part, parts_of_row);
    const Request& request = row.request;
    const Depths depths(request, state.max);
    Draw draw(request, state.max, state.best_id);
    Part* row_parts = parts + static_cast<int64_t>(index) * MAX_PARTS;
    uint32_t* row_counts = counts + static_cast<int64_t>(index) * BINS;
    uint64_t* row_masses = masses + static_cast<int64_t>(index) * BINS;
    Team team{arrivals + index, parts_of_row, part, 0};
    uint32_t draw_below = state.draw_below, list_from = state.list_from;
    const uint32_t list_to = state.list_to;
    // Where a search ends the row; the first bins stay anyhow.
    Place last{0, 0};

    if (searches) {
        Search search{shared, row, depths, team, row_parts, row_counts, row_masses, list_from, list_to, false, state.keep, 0, 0.0, 0.0, 0};
        const bool of_kept = request.top_p < 1.0f && state.enough < 0.0;
        const auto units = [](double mass) { return static_cast<uint64_t>(static_cast<int64_t>(ceil(mass > 0.0 ? mass : 0.0))); };
        if (request.top_p < 1.0f && !of_kept) search.by_mass = true, search.wanted = units((state.enough - state.mass_above) * 0x1p45);
        last = search.find();
        if (of_kept) {
            // All that `top_k` leaves, and its share from the best on.
            draw_below = list_from = search.from = 0, search.by_mass = true;
            search.wanted = units(static_cast<double>(request.top_p) * static_cast<double>(search.mass_through(last)));
            last = search.find();
        }
    }
    const auto list = [&](uint32_t id, double logit) {
        const uint32_t slot = atomicAdd(&lengths[index], 1u);
        lists[static_cast<int64_t>(index) * TILE_LISTED + slot] = {to_bits(depths.exact(logit)), id, 0};
    };
    const auto is_found = [&](uint32_t id, double logit) { return Place{to_bits(depths.exact(logit)), id} <= last; };
    row.each<2>(
        block,
        [&](uint32_t vector, const float(&values)[4], uint32_t, uint32_t kept) {
            float depth[4];
            kept = depths.kept(values, kept, depth);
            if (kept == 0) return;
            uint32_t stays = 0, listed = 0;
#pragma unroll
            for (uint32_t j = 0; j < 4; ++j) {
                const uint32_t bin = bin_of(depth[j]);
                stays |= static_cast<uint32_t>(bin < draw_below) << j;
                listed |= static_cast<uint32_t>(bin >= list_from && bin <= list_to) << j;
            }
#pragma unroll 1
            for (listed &= kept; listed != 0; listed &= listed - 1) {
                const uint32_t j = static_cast<uint32_t>(__ffs(static_cast<int>(listed)) - 1), id = 4 * vector + j;
                const double logit = at(values, j);
                if (!searches) {
                    list(id, logit);
                } else if (is_found(id, logit)) {
                    stays |= 1u << j;
                }
            }
            if ((stays & kept) != 0) draw.see_vector(vector, values, stays & kept);
        },
        [&](uint32_t id, double logit) {
            const float depth = depths.rough(logit);
            if (!depths.keeps(depth, logit)) return;
            const uint32_t bin = bin_of(depth);
            const bool listed = bin >= list_from && bin <= list_to;
            if (listed && !searches) list(id, logit);
            if (bin < draw_below || (listed && searches && is_found(id, logit))) draw.see_token(id, logit);
        });
    const bool draws = searches || draw_below > 0;
    if (draws) {
        const Ranked drawn = draw.finish(block, [&](auto look) {
            row.each_edited(block, [&](uint32_t id, double logit) {
                const float depth = depths.rough(logit);
                if (!depths.keeps(depth, logit)) return;
                const uint32_t bin = bin_of(depth);
                if (bin < draw_below || (searches && bin <= list_to && is_found(id, logit))) look(id, logit);
            });
        });
        if (drawn.id == NOBODY ? threadIdx.x == 0 : drawn.id == draw.chosen.id) {
            row_parts[part] = {0, 0.0, 0, 0, drawn.id, draw.chosen_logit, 0};
        }
    }
    if (!is_last(block, arrivals + index, team.arrived + parts_of_row)) return;

    if (searches) {
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < 3 * DIGITS; i += THREADS) row_counts[i] = 0, row_masses[i] = 0;
    }
    const uint32_t length = load_published(lengths + index);
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < length; i += THREADS) {
        const float4 words = load_published_16(reinterpret_cast<const float4*>(lists + static_cast<int64_t>(index) * TILE_LISTED + i));
        shared.keys[i] = joined(words.x, words.y), shared.ids[i] = __float_as_uint(words.z);
    }
    // All that is listed stays, or what stays is the start of its order.
    const bool all = state.keep >= length && !(request.top_p < 1.0f);
    if (!all) sort(shared, length);
    __syncthreads();
    if (threadIdx.x == 0) lengths[index] = 0;
    const uint32_t kept = all ? length : kept_of(shared, request, state, length);
    draw.chosen = {0, NOBODY};
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < kept; i += THREADS) {
        const uint32_t id = shared.ids[i];
        const Ranked other{to_key(-from_bits(shared.keys[i]) + noise(draw.word_of(id))), id};
        if (draw.chosen < other) draw.chosen = other;
    }
    if (draws) {
#pragma unroll 1
        for (uint32_t p = threadIdx.x; p < parts_of_row; p += THREADS) {
            const Part other = load_published_part(row_parts + p);
            if (other.drawn_id != NOBODY) draw.look_closely(other.drawn_id, other.drawn);
        }
    }
    const Ranked choice = block_best(block, draw.chosen);
    if (threadIdx.x == 0) {
        token_ids[first_row + index] = static_cast<int32_t>(choice.id);
        logprobs[first_row + index] = static_cast<float>(below(row.logits[choice.id], state.raw_max) - state.ln_total);
    }
}
