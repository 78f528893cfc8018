// `sample`, first kernel: log-probabilities of raw logits, the best tokens, and the choice of rows that drop no tokens before the draw.
//
// A block takes a part of a row, the last block of the row puts the parts together.
//
// ln(sum exp): powers are f32 and measured from the part's best logit; one that is d below it has the relative error (4 + 3 d) u,
// u = 2^-24. Over the distribution d is ln(vocab) on average at most (its entropy is no larger), and a thread's additions have u each;
// parts are added in f64. A log-probability thus has the error (4 + 3 ln(vocab) + additions) u, and u of itself by its type.
#include "sample.cuh"

constexpr uint32_t TOP_LIST = 512;

struct Shared {
    Block block;
    // The best tokens that are reported: candidates, and each thread's own best.
    uint64_t list[TOP_LIST];
    uint64_t bests[THREADS];
    uint64_t pivot;
    uint32_t listed, unused;
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher's sum");

// The best `count` of many places: the thread with the count-th best of what threads have as their own best gives a pivot that at least so
// many reach, and few more.
struct Top {
    Shared& shared;
    uint32_t count;

    DEVICE Top(Shared& shared, uint32_t count, uint64_t own) : shared(shared), count(count) {
        if (count == 0) return;
        __syncthreads();
        shared.bests[threadIdx.x] = own;
        if (threadIdx.x == 0) shared.pivot = 0, shared.listed = 0;
        __syncthreads();
        uint32_t better = 0;
        #pragma unroll 4
        for (uint32_t i = 0; i < THREADS; ++i) better += shared.bests[i] > own;
        if (better == count - 1 && own != 0) shared.pivot = own;
        __syncthreads();
    }

    DEVICE void see(uint64_t place) {
        if (place == 0 || place < shared.pivot) return;
        const uint32_t slot = atomicAdd(&shared.listed, 1u);
        if (slot < TOP_LIST) shared.list[slot] = place;
    }

    DEVICE void see_vector(uint32_t vector, const float (&values)[4], uint32_t tokens) {
        if (highest(values) < value_of(shared.pivot)) return;
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) {
            if (tokens >> j & 1) see(place_of(values[j], 4 * vector + j));
        }
    }

    // Calls emit(rank, place) for every rank once, with 0 where there is none; `each(f)` calls f(place) for all of them again.
    template <typename Each, typename Emit>
    DEVICE void finish(Each each, Emit emit) {
        if (count == 0) return;
        __syncthreads();
        const uint32_t listed = shared.listed;
        if (listed <= TOP_LIST) {
#pragma unroll 1
            for (uint32_t i = threadIdx.x; i < listed; i += THREADS) {
                const uint64_t place = shared.list[i];
                uint32_t rank = 0;
#pragma unroll 4
                for (uint32_t j = 0; j < listed; ++j) rank += shared.list[j] > place;
                if (rank < count) emit(rank, place);
            }
#pragma unroll 1
            for (uint32_t rank = listed + threadIdx.x; rank < count; rank += THREADS) emit(rank, 0);
            return;
        }
        // Too many for the list: one after the other.
        uint64_t last = ~0ull;
#pragma unroll 1
        for (uint32_t rank = 0; rank < count; ++rank) {
            uint64_t own = 0;
            each([&](uint64_t place) {
                if (place < last && place > own) own = place;
            });
            last = block_best(shared.block, {own, 0}).key;
            if (threadIdx.x == 0) emit(rank, last);
        }
    }
};

// The best edited logit of a row whose logits nothing edits.
DEVICE Ranked alone(uint64_t place) {
    return place == 0 ? Ranked{0, NOBODY} : Ranked{to_key(static_cast<double>(value_of(place))), id_of(place)};
}

DEVICE uint64_t load_published_place(const uint64_t* place) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(place);
    return static_cast<uint64_t>(load_published(words + 1)) << 32 | load_published(words);
}

KERNEL void __launch_bounds__(THREADS, MIN_BLOCKS)
    sample(const float* __restrict__ all_logits, // [rows, vocab]
           const uint8_t* __restrict__ uploads,  // requests, filtered rows, edits
           uint32_t* arrivals,                   // [rows] zeros
           State* states,                        // [rows]
           Part* parts,                          // [rows, MAX_PARTS]
           uint64_t* tops,                       // [rows, MAX_PARTS, top]
           int32_t* token_ids, float* logprobs,  // [rows]
           int32_t* top_ids, float* top_logprobs, // [rows, top]
           int32_t rows, int32_t first_row, int32_t vocab, int32_t num_parts, int32_t any_edits,
           int32_t top) {
    Shared& shared = shared_memory<Shared>();
    Block& block = shared.block;
    const uint32_t index = blockIdx.x / num_parts, part = blockIdx.x % num_parts;
    Row row(all_logits, uploads, index, rows, first_row, vocab, any_edits != 0);
    row.take(part, num_parts);
    const Request& request = row.request;
    const bool edits = row.edits_begin != row.edits_end;

    // Which is the best logit, raw and edited.
    Lead lead, kept_lead;
    Ranked best{0, NOBODY};
    row.each<4>(
        block,
        [&](uint32_t vector, const float(&values)[4], uint32_t valid, uint32_t kept) {
            lead.see(vector, values, valid);
            if (edits) kept_lead.see(vector, values, kept);
        },
        [&](uint32_t id, double logit) {
            const Ranked other{to_key(logit), id};
            if (best < other) best = other;
        });
    const uint64_t own = lead.place(), raw = block_best(block, {own, 0}).key;
    if (edits) {
        const Ranked other = alone(kept_lead.place());
        if (best < other) best = other;
        best = block_best(block, best);
    } else {
        best = alone(raw);
    }

    // Powers of raw logits, the draw, and the best tokens, all from those.
    const float raw_max = value_of(raw);
    const bool finite = raw_max - raw_max == 0.0f;
    const double reference = to_double(best.key);
    const bool draws = request.forced == NOBODY && request.filtered == 0 && request.temperature > 0.0f && reference > negative_infinity();
    Draw draw(request, reference, draws ? best.id : NOBODY);
    Top best_tokens(shared, top, own);
    float powers = 0.0f;
    row.each<2>(
        block,
        [&](uint32_t vector, const float(&values)[4], uint32_t valid, uint32_t kept) {
#pragma unroll
            for (uint32_t j = 0; j < 4; ++j) {
                // The larger of NaN and a number is the number.
                const float power = exp2_approx(fmaxf((values[j] - raw_max) * 1.44269504f, -200.0f));
                powers += valid >> j & 1 ? (finite ? power : static_cast<float>(values[j] == raw_max)) : 0.0f;
            }
            if (top > 0) best_tokens.see_vector(vector, values, valid);
            if (draws) draw.see_vector(vector, values, kept);
        },
        [&](uint32_t id, double logit) {
            if (draws) draw.see_token(id, logit);
        });
    const double sum = block_sums(block, powers).all;
    Ranked drawn{0, NOBODY};
    if (draws) {
        drawn = draw.finish(block, [&](auto look) { row.each_edited(block, look); });
    }
    uint64_t* row_tops = tops + static_cast<int64_t>(index) * MAX_PARTS * top;
    best_tokens.finish(
        [&](auto f) {
#pragma unroll 1
            for (uint32_t id = 4 * row.begin + threadIdx.x; id < min(4 * row.end, row.vocab); id += THREADS) {
                f(place_of(row.logits[id], id));
            }
        },
        [&](uint32_t rank, uint64_t place) { row_tops[part * top + rank] = place; });

    Part* row_parts = parts + static_cast<int64_t>(index) * MAX_PARTS;
    if (drawn.id == NOBODY ? threadIdx.x == 0 : drawn.id == draw.chosen.id) {
        row_parts[part] = {raw, sum, best.key, best.id, drawn.id, draw.chosen_logit, 0};
    }
    if (!is_last(block, arrivals + index, num_parts)) return;

    // The parts together.
    Part mine{};
    uint64_t whole = 0;
    best = {0, NOBODY};
#pragma unroll 1
    for (uint32_t p = threadIdx.x; p < num_parts; p += THREADS) {
        mine = load_published_part(row_parts + p);
        whole = max(whole, mine.raw);
        const Ranked other{mine.best, mine.best_id};
        if (best < other) best = other;
    }
    const uint64_t raw_best = block_best(block, {whole, 0}).key;
    best = request.edits_begin != request.edits_end ? block_best(block, best) : alone(raw_best);
    const double max_logit = value_of(raw_best);
    double total = 0.0;
    Ranked choice{0, NOBODY};
    const Draw exactly(request, to_double(best.key), NOBODY);
#pragma unroll 1
    for (uint32_t p = threadIdx.x; p < num_parts; p += THREADS) {
        if (p >= THREADS || num_parts > THREADS) mine = load_published_part(row_parts + p);
        total += mine.sum * exp(below(value_of(mine.raw), max_logit));
        if (mine.drawn_id == NOBODY) continue;
        const Ranked other{to_key(exactly.exact(mine.drawn, exactly.word_of(mine.drawn_id))), mine.drawn_id};
        if (choice < other) choice = other;
    }
    const double ln_total = log(block_sums(block, total).all);
    choice = block_best(block, choice);
    const bool numbers = max_logit == max_logit;
    const auto logprob = [&](float logit) {
        return static_cast<float>(numbers ? below(logit, max_logit) - ln_total : not_a_number());
    };

    const bool none_left = !(exactly.reference > negative_infinity());
    if (threadIdx.x == 0) {
        const uint32_t greedy = none_left ? id_of(raw_best) : best.id;
        const uint32_t id = request.forced != NOBODY ? request.forced : none_left || request.temperature == 0.0f ? greedy : choice.id;
        const uint32_t plan = request.filtered != 0 && !none_left ? FILTER : DONE;
        states[index] = {max_logit, ln_total, exactly.reference, 0.0, 0.0, plan, 0, 0, 0, 0, best.id};
        if (plan == DONE) {
            token_ids[first_row + index] = static_cast<int32_t>(id);
            logprobs[first_row + index] = logprob(row.logits[id]);
        }
    }
    if (top == 0) return;
    const auto each_top = [&](auto f) {
        constexpr uint32_t AT_ONCE = 5;
        const uint32_t total = num_parts * top;
#pragma unroll 1
        for (uint32_t first = 0; first < total; first += AT_ONCE * THREADS) {
            uint64_t places[AT_ONCE];
#pragma unroll
            for (uint32_t i = 0; i < AT_ONCE; ++i) {
                const uint32_t place = first + i * THREADS + threadIdx.x;
                places[i] = place < total ? load_published_place(row_tops + place) : 0;
            }
#pragma unroll
            for (uint32_t i = 0; i < AT_ONCE; ++i) f(places[i]);
        }
    };
    uint64_t own_top = 0;
    each_top([&](uint64_t place) { own_top = max(own_top, place); });
    Top row_top(shared, top, own_top);
    each_top([&](uint64_t place) { row_top.see(place); });
    row_top.finish(each_top, [&](uint32_t rank, uint64_t place) {
        const int64_t out = static_cast<int64_t>(first_row + index) * top + rank;
        top_ids[out] = place == 0 ? -1 : static_cast<int32_t>(id_of(place));
        top_logprobs[out] = place == 0 ? static_cast<float>(negative_infinity()) : logprob(value_of(place));
    });
}
