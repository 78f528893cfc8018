// `sample`, third kernel: the cut of filtered rows, and the draw among what it leaves.
//
// Tokens that surely stay are drawn by the blocks of the row, those of the bin in which the cut lies are listed; the last block puts the
// list into order. Where too many tokens are alike to be listed, one block searches the row for the cut, digit by digit.
#include "sample_bins.cuh"

constexpr uint32_t DIGITS = 256;

struct Shared {
    Block block;
    uint64_t keys[TILE_LISTED];
    uint32_t ids[TILE_LISTED];
    uint32_t cut, digit, counts[DIGITS];
    uint64_t masses[DIGITS], count_above, mass_above;
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

// One block alone with a row.
struct Search {
    Shared& shared;
    const Row& row;
    const Depths& depths;

    // Calls f(place, logit) for every token that `min_p` leaves.
    template <typename F>
    DEVICE void each(F f) const {
        row.each_edited(shared.block, [&](uint32_t id, double logit) {
            if (depths.keeps(depths.rough(logit), logit)) f(Place{to_bits(depths.exact(logit)), id}, logit);
        });
    }

    // The place with which a number of tokens, or a mass in units of 2^-45, is reached. `mass_above` of the shared memory is then the
    // mass through it.
    DEVICE Place find(bool by_mass, uint64_t wanted) const {
        Place place{0, 0};
        __syncthreads();
        if (threadIdx.x == 0) shared.count_above = shared.mass_above = 0;
#pragma unroll 1
        for (int32_t level = 11; level >= 0; --level) {
            __syncthreads();
#pragma unroll 1
            for (uint32_t digit = threadIdx.x; digit < DIGITS; digit += THREADS) shared.counts[digit] = 0, shared.masses[digit] = 0;
            __syncthreads();
            const uint32_t shift = 8 * (level % 4) + (level >= 8 ? 32 : 0);
            each([&](Place other, double) {
                // Digits above this one have been found.
                const bool same = level >= 4 ? (other.depth ^ place.depth) >> shift >> 8 == 0
                                             : other.depth == place.depth && (other.id ^ place.id) >> shift >> 8 == 0;
                if (!same) return;
                const uint32_t digit = static_cast<uint32_t>((level >= 4 ? other.depth : other.id) >> shift) & 255u;
                atomicAdd(&shared.counts[digit], 1u);
                atomicAdd(&shared.masses[digit], static_cast<uint64_t>(static_cast<int64_t>(exp(-from_bits(other.depth)) * 0x1p45)));
            });
            __syncthreads();
            if (threadIdx.x == 0) {
                uint64_t count = shared.count_above, mass = shared.mass_above;
                uint32_t last = 0;
#pragma unroll 1
                for (uint32_t digit = 0; digit < DIGITS; ++digit) {
                    if (shared.counts[digit] == 0) continue;
                    last = digit;
                    shared.count_above = count, shared.mass_above = mass;
                    count += shared.counts[digit], mass += shared.masses[digit];
                    if ((by_mass ? mass : count) >= wanted) break;
                }
                if (level == 0) shared.mass_above = mass;
                shared.digit = last;
            }
            __syncthreads();
            if (level >= 4) {
                place.depth |= static_cast<uint64_t>(shared.digit) << shift;
            } else {
                place.id |= shared.digit << shift;
            }
        }
        __syncthreads();
        return place;
    }
};

KERNEL void __launch_bounds__(THREADS, 1)
    sample_pick(const float* __restrict__ all_logits, const uint8_t* __restrict__ uploads,
                uint32_t* arrivals,                  // [rows] zeros
                const State* states,                 // [rows]
                Part* parts,                         // [rows, MAX_PARTS]
                uint32_t* lengths,                   // [rows] zeros
                Listed* lists,                       // [rows, TILE_LISTED]
                int32_t* token_ids, float* logprobs, // [rows]
                int32_t rows, int32_t first_row, int32_t vocab, int32_t num_parts, int32_t any_edits) {
    Shared& shared = shared_memory<Shared>();
    Block& block = shared.block;
    const uint32_t* filtered = reinterpret_cast<const uint32_t*>(uploads + sizeof(Request) * rows);
    const uint32_t index = filtered[blockIdx.x / num_parts], part = blockIdx.x % num_parts;
    const State& state = states[index];
    const bool searches = state.plan == SEARCH;
    if (state.plan == DONE || (searches && part > 0)) return;
    Row row(all_logits, uploads, index, rows, first_row, vocab, any_edits != 0);
    const Request& request = row.request;
    const Depths depths(request, state.max);
    const Search search{shared, row, depths};
    Draw draw(request, state.max, state.best_id);
    Ranked choice{0, NOBODY};

    if (searches) {
        row.take(0, 1);
        Place last = search.find(false, state.keep);
        if (request.top_p < 1.0f) {
            const double enough = static_cast<double>(request.top_p) * static_cast<double>(shared.mass_above);
            last = search.find(true, static_cast<uint64_t>(static_cast<int64_t>(ceil(enough))));
        }
        search.each([&](Place place, double logit) {
            if (place <= last) draw.look_closely(place.id, logit);
        });
        choice = block_best(block, draw.chosen);
    } else {
        row.take(part, num_parts);
        const uint32_t draw_below = state.draw_below, list_from = state.list_from, list_to = state.list_to;
        const auto list = [&](uint32_t id, double logit) {
            const uint32_t slot = atomicAdd(&lengths[index], 1u);
            lists[static_cast<int64_t>(index) * TILE_LISTED + slot] = {to_bits(depths.exact(logit)), id, 0};
        };
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
                    const int j = __ffs(static_cast<int>(listed)) - 1;
                    list(4 * vector + j, at(values, j));
                }
                if ((stays & kept) != 0) draw.see_vector(vector, values, stays & kept);
            },
            [&](uint32_t id, double logit) {
                const float depth = depths.rough(logit);
                if (!depths.keeps(depth, logit)) return;
                const uint32_t bin = bin_of(depth);
                if (bin >= list_from && bin <= list_to) list(id, logit);
                if (bin < draw_below) draw.see_token(id, logit);
            });
        Part* row_parts = parts + static_cast<int64_t>(index) * MAX_PARTS;
        if (state.draw_below > 0) {
            const Ranked drawn = draw.finish(block, [&](auto look) {
                search.each([&](Place place, double logit) {
                    if (bin_of(depths.rough(logit)) < state.draw_below) look(place.id, logit);
                });
            });
            if (drawn.id == NOBODY ? threadIdx.x == 0 : drawn.id == draw.chosen.id) {
                row_parts[part] = {0, 0.0, 0, 0, drawn.id, draw.chosen_logit, 0};
            }
        }
        if (!is_last(block, arrivals + index, num_parts)) return;

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
        if (state.draw_below > 0) {
#pragma unroll 1
            for (uint32_t p = threadIdx.x; p < num_parts; p += THREADS) {
                const Part other = load_published_part(row_parts + p);
                if (other.drawn_id != NOBODY) draw.look_closely(other.drawn_id, other.drawn);
            }
        }
        choice = block_best(block, draw.chosen);
    }
    if (threadIdx.x == 0) {
        token_ids[first_row + index] = static_cast<int32_t>(choice.id);
        logprobs[first_row + index] = static_cast<float>(below(row.logits[choice.id], state.raw_max) - state.ln_total);
    }
}
