// `sample`, second kernel: counts the tokens of filtered rows by depth, and decides from the counts what `sample_pick` looks at.
//
// Probability is counted as well where `top_p` needs it: of every token 2^31 times its ratio to its bin's origin, as an integer, so
// that no order of additions shows. A bin's mass is right to 2^-31 of the mass that its tokens would have at its origin.
#include "sample_bins.cuh"

constexpr uint32_t BINS_PER_THREAD = (BINS + THREADS - 1) / THREADS;

struct Shared {
    Block block;
    // Of the block: how many tokens and carries of the sum, and the sum's lower half. Then of the row.
    union {
        struct {
            uint32_t low[BINS], high[BINS];
        };
        double masses[BINS];
    };
    uint32_t counts[BINS];
    uint32_t kth_bin, enough_bin, kth_above, kth_through, enough_above, enough_through;
    double enough_mass_above;
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher's sum");

// e^x; for half the width of a narrow bin, which is 1/4 at most, the series to x^8, which is right to 1e-11.
DEVICE double ratio(double x) {
    if constexpr (!NARROW) return exp(x);
    double sum = 1.0 / 40320.0;
    sum = sum * x + 1.0 / 5040.0;
    sum = sum * x + 1.0 / 720.0;
    sum = sum * x + 1.0 / 120.0;
    sum = sum * x + 1.0 / 24.0;
    sum = sum * x + 1.0 / 6.0;
    sum = sum * x + 0.5;
    sum = sum * x + 1.0;
    return sum * x + 1.0;
}

KERNEL void __launch_bounds__(THREADS, MIN_BLOCKS)
    sample_filter(const float* __restrict__ all_logits, const uint8_t* __restrict__ uploads,
                  uint32_t* arrivals,  // [rows] zeros
                  State* states,       // [rows]
                  uint32_t* counts,    // [rows, BINS] zeros
                  uint64_t* masses,    // [rows, BINS] zeros
                  int32_t rows, int32_t first_row, int32_t vocab, int32_t num_parts, int32_t any_edits) {
    Shared& shared = shared_memory<Shared>();
    Block& block = shared.block;
    const uint32_t* filtered = reinterpret_cast<const uint32_t*>(uploads + sizeof(Request) * rows);
    const uint32_t index = filtered[blockIdx.x / num_parts], part = blockIdx.x % num_parts;
    State& state = states[index];
    if (state.plan == DONE) return;
    Row row(all_logits, uploads, index, rows, first_row, vocab, any_edits != 0);
    row.take(part, num_parts);
    const Request& request = row.request;
    const Depths depths(request, state.max);
    const bool weighs = request.top_p < 1.0f && !(request.top_k > 0 && request.top_k <= TILE_LISTED);

#pragma unroll 1
    for (uint32_t bin = threadIdx.x; bin < BINS; bin += THREADS) shared.low[bin] = shared.high[bin] = 0;
    __syncthreads();
    const auto tell = [&](uint32_t bin, uint32_t count, uint64_t units) {
        const uint32_t carry = weighs ? add_low(&shared.low[bin], units) : 0;
        atomicAdd(&shared.high[bin], (count << 16) + carry);
    };
    Run run;
    const auto count = [&](float depth, double logit) {
        const uint32_t bin = bin_of(depth);
        uint32_t units = 0;
        if (weighs) {
            const double exact = logit == depths.max ? 0.0 : (depths.max - logit) * depths.inverse;
            const double share = ratio(origin_of(bin) - exact);
            units = static_cast<uint32_t>(static_cast<int64_t>(share * 0x1p31));
        }
        run.add(bin, units, tell);
    };
    row.each<2>(
        block,
        [&](uint32_t, const float(&values)[4], uint32_t, uint32_t tokens) {
            float depth[4];
            tokens = depths.kept(values, tokens, depth);
#pragma unroll
            for (uint32_t j = 0; j < 4; ++j) {
                if (tokens >> j & 1) count(depth[j], values[j]);
            }
        },
        [&](uint32_t, double logit) {
            const float depth = depths.rough(logit);
            if (depths.keeps(depth, logit)) count(depth, logit);
        });
    run.end(tell);
    __syncthreads();
    uint32_t* row_counts = counts + static_cast<int64_t>(index) * BINS;
    uint64_t* row_masses = masses + static_cast<int64_t>(index) * BINS;
#pragma unroll 1
    for (uint32_t bin = threadIdx.x; bin < BINS; bin += THREADS) {
        const uint32_t high = shared.high[bin];
        if (high == 0) continue;
        atomicAdd(&row_counts[bin], high >> 16);
        if (weighs) atomicAdd(&row_masses[bin], static_cast<uint64_t>(high & 0xffffu) << 32 | shared.low[bin]);
    }
    if (!is_last(block, arrivals + index, num_parts)) return;

    // Where the k-th token stands, and the one with which `top_p` is reached.
    static_assert(BINS % 4 == 0, "counts are loaded by four");
#pragma unroll 2
    for (uint32_t bin = 4 * threadIdx.x; bin < BINS; bin += 4 * THREADS) {
        const float4 count = load_published_16(reinterpret_cast<const float4*>(row_counts + bin));
        const float words[4] = {count.x, count.y, count.z, count.w};
        double mass[4] = {};
        if (weighs) {
            const float4 a = load_published_16(reinterpret_cast<const float4*>(row_masses + bin));
            const float4 b = load_published_16(reinterpret_cast<const float4*>(row_masses + bin + 2));
            const uint64_t units[4] = {joined(a.x, a.y), joined(a.z, a.w), joined(b.x, b.y), joined(b.z, b.w)};
#pragma unroll
            for (uint32_t i = 0; i < 4; ++i) mass[i] = static_cast<double>(units[i]) * 0x1p-31;
        }
#pragma unroll 1
        for (uint32_t i = 0; i < 4; ++i) {
            const uint32_t in_bin = __float_as_uint(at(words, i));
            shared.counts[bin + i] = in_bin;
            if (weighs) shared.masses[bin + i] = in_bin == 0 ? 0.0 : at(mass, i) * exp(-origin_of(bin + i));
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) shared.kth_bin = shared.enough_bin = BINS;
    const uint32_t first = min(threadIdx.x * BINS_PER_THREAD, BINS), last = min(first + BINS_PER_THREAD, BINS);
    uint32_t own_count = 0;
    double own_mass = 0.0;
    for (uint32_t bin = first; bin < last; ++bin) {
        own_count += shared.counts[bin];
        if (weighs) own_mass += shared.masses[bin];
    }
    const Counts kept = block_counts(block, own_count);
    const Sums mass = weighs ? block_sums(block, own_mass) : Sums{0.0, 0.0};
    const uint32_t k = request.top_k > 0 ? min(request.top_k, kept.all) : kept.all;
    const double enough = static_cast<double>(request.top_p) * mass.all;
    // The first bin of all that reaches it; sums of two threads may round apart.
    uint32_t through = kept.before, kth = BINS, kth_above = 0, kth_through = 0, bin_of_enough = BINS, enough_above = 0, enough_through = 0;
    double mass_through = mass.before, enough_mass_above = 0.0;
    for (uint32_t bin = first; bin < last; ++bin) {
        const uint32_t above = through;
        const double mass_above = mass_through;
        through += shared.counts[bin];
        if (through == above) continue;
        if (weighs) mass_through += shared.masses[bin];
        if (kth == BINS && through >= k) kth = bin, kth_above = above, kth_through = through;
        if (weighs && bin_of_enough == BINS && (mass_through >= enough || through == kept.all)) {
            bin_of_enough = bin, enough_above = above, enough_through = through, enough_mass_above = mass_above;
        }
    }
    if (kth < BINS) atomicMin(&shared.kth_bin, kth);
    if (bin_of_enough < BINS) atomicMin(&shared.enough_bin, bin_of_enough);
    __syncthreads();
    if (kth < BINS && kth == shared.kth_bin) shared.kth_above = kth_above, shared.kth_through = kth_through;
    if (bin_of_enough < BINS && bin_of_enough == shared.enough_bin) {
        shared.enough_above = enough_above, shared.enough_through = enough_through, shared.enough_mass_above = enough_mass_above;
    }
    __syncthreads();
#pragma unroll 4
    for (uint32_t bin = threadIdx.x; bin < BINS; bin += THREADS) row_counts[bin] = 0;
    if (weighs) {
#pragma unroll 4
        for (uint32_t bin = threadIdx.x; bin < BINS; bin += THREADS) row_masses[bin] = 0;
    }
    if (threadIdx.x != 0) return;

    const auto cut = [&](Plan plan, uint32_t draw_below, uint32_t from, uint32_t to, uint32_t keep, double mass_above, double needed) {
        state.plan = plan, state.draw_below = draw_below, state.list_from = from, state.list_to = to;
        state.keep = keep, state.mass_above = mass_above, state.enough = needed;
    };
    const auto plan_for = [](uint32_t tokens) { return tokens <= TILE_LISTED ? CUT : SEARCH; };
    const bool shares = request.top_p < 1.0f;
    if (shared.kth_through <= TILE_LISTED) {
        // All that can stay. The list knows how much it is together.
        cut(CUT, 0, 0, shared.kth_bin, k, 0.0, -1.0);
    } else if (shares && k == kept.all) {
        const uint32_t bin = shared.enough_bin, in_bin = shared.enough_through - shared.enough_above;
        if (shared.enough_through <= TILE_LISTED) {
            cut(CUT, 0, 0, bin, kept.all, 0.0, enough);
        } else {
            cut(plan_for(in_bin), bin, bin, bin, in_bin, shared.enough_mass_above, enough);
        }
    } else if (k == kept.all) {
        cut(CUT, shared.kth_bin + 1, 1, 0, 0, 0.0, 0.0);
    } else {
        const uint32_t bin = shared.kth_bin, in_bin = shared.kth_through - shared.kth_above;
        cut(shares ? SEARCH : plan_for(in_bin), bin, bin, bin, k - shared.kth_above, 0.0, shares ? -1.0 : 0.0);
    }
}
