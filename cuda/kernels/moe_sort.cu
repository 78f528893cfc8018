// Pairs of token and k sorted by expert, those of one expert in order, and cut into items of at most `item_tokens` pairs. One block; the
// others bring weights of the first experts to the L2 meanwhile.
//
// Every warp counts the experts of its own range of pairs; after a prefix sum over experts and warps it puts the range in place, in order.
// An expert that does not exist takes no pair. Constants: EXPERTS. Tile: TILE_WARPS.
#include "moe_next.cuh"

constexpr int WARPS = TILE_WARPS, THREADS = 32 * WARPS;
constexpr uint32_t ALL = 0xffffffffu;
// Places of a range that are under way at once.
constexpr int BATCH = 8;

struct Shared {
    // Pairs of an expert in a warp's range, then the place of the next one.
    int32_t counts[WARPS][EXPERTS];
    int32_t warp_sums[2][WARPS];
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher's sum");

DEVICE int warp_prefix(int value, int lane) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(ALL, value, distance);
        if (lane >= distance) value += other;
    }
    return value;
}

// The sums of two numbers over this thread and all before it, where `before` are those of earlier calls.
DEVICE int2 block_prefix(Shared& shared, int2 value, int2& before, int warp, int lane) {
    int2 sum = make_int2(warp_prefix(value.x, lane), warp_prefix(value.y, lane));
    __syncthreads();
    if (lane == 31) shared.warp_sums[0][warp] = sum.x, shared.warp_sums[1][warp] = sum.y;
    __syncthreads();
    int2 total = before;
#pragma unroll 4
    for (int w = 0; w < WARPS; ++w) {
        if (w == warp) sum.x += total.x, sum.y += total.y;
        total.x += shared.warp_sums[0][w], total.y += shared.warp_sums[1][w];
    }
    before = total;
    return sum;
}

// Of the places `at`, `at` + 32, ..., the experts; -1 for those that do not exist, and beyond `end`.
DEVICE void load_batch(const int32_t* topk_ids, int at, int end, int (&experts)[BATCH]) {
#pragma unroll
    for (int i = 0; i < BATCH; ++i) experts[i] = at + i * 32 < end ? topk_ids[at + i * 32] : -1;
#pragma unroll
    for (int i = 0; i < BATCH; ++i)
        if (experts[i] >= EXPERTS || experts[i] < 0) experts[i] = -1;
}

// The `n`-th of the experts that somebody chose, or -1.
DEVICE int chosen_expert(int32_t* flags, const int32_t* topk_ids, int pairs, int n, int lane) {
    for (int i = threadIdx.x; i < EXPERTS; i += THREADS) flags[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < pairs; i += THREADS)
        if (topk_ids[i] >= 0 && topk_ids[i] < EXPERTS) atomicOr(&flags[topk_ids[i]], 1);
    __syncthreads();
    for (int base = 0; base < EXPERTS; base += 32) {
        const uint32_t chosen = __ballot_sync(ALL, base + lane < EXPERTS && flags[base + lane] != 0);
        const uint32_t mine = __ballot_sync(ALL, (chosen >> lane & 1u) != 0 && __popc(chosen & ((1u << lane) - 1u)) == n);
        if (mine != 0) return base + __ffs(mine) - 1;
        n -= __popc(chosen);
    }
    return -1;
}

// `topk_ids` from number `first_pair` on; `order` [pairs]; `items` [max_items] (expert, first place in order, count, 0), of which the
// unused get a count of 0. Grid: one, and `next_parts` blocks for each of some experts whose weights `next_` are.
KERNEL void __launch_bounds__(THREADS, 1)
moe_sort(const int32_t* topk_ids, int32_t* order, int4* items, int first_pair, int pairs, int item_tokens, int max_items,
         const uint8_t* next_weight, const uint8_t* next_scales, const uint8_t* next_zeros, int next_weight_bytes, int next_scales_bytes,
         int next_zeros_bytes, int next_parts) {
    Shared& shared = shared_memory<Shared>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    topk_ids += first_pair;
    if (blockIdx.x > 0) {
        const int place = blockIdx.x - 1, expert = chosen_expert(shared.counts[0], topk_ids, pairs, place / next_parts, lane);
        const Next next = {{next_weight, next_scales, next_zeros}, {next_weight_bytes, next_scales_bytes, next_zeros_bytes}};
        if (expert >= 0) next.prefetch<THREADS>(expert, 256, place % next_parts, next_parts);
        return;
    }
    for (int i = threadIdx.x; i < WARPS * EXPERTS; i += THREADS) (&shared.counts[0][0])[i] = 0;
    __syncthreads();

    const int share = (pairs + THREADS - 1) / THREADS * 32;
    const int first = min(warp * share, pairs), end = min(first + share, pairs);
    for (int base = first; base < end; base += 32 * BATCH) {
        int experts[BATCH];
        load_batch(topk_ids, base + lane, end, experts);
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
            if (experts[i] >= 0) atomicAdd(&shared.counts[warp][experts[i]], 1);
    }
    __syncthreads();

    int2 before = make_int2(0, 0);
    for (int base = 0; base < EXPERTS; base += THREADS) {
        const int expert = base + static_cast<int>(threadIdx.x);
        int count = 0;
        if (expert < EXPERTS) {
#pragma unroll 4
            for (int w = 0; w < WARPS; ++w) count += shared.counts[w][expert];
        }
        const int my_items = (count + item_tokens - 1) / item_tokens;
        const int2 sum = block_prefix(shared, make_int2(count, my_items), before, warp, lane);
        if (expert >= EXPERTS) continue;
        int place = sum.x - count;
        for (int i = 0; i < my_items; ++i)
            items[sum.y - my_items + i] = make_int4(expert, place + i * item_tokens, min(count - i * item_tokens, item_tokens), 0);
#pragma unroll 4
        for (int w = 0; w < WARPS; ++w) {
            const int in_warp = shared.counts[w][expert];
            shared.counts[w][expert] = place;
            place += in_warp;
        }
    }
    for (int i = before.y + threadIdx.x; i < max_items; i += THREADS) items[i] = make_int4(0, 0, 0, 0);
    __syncthreads();

    for (int base = first; base < end; base += 32 * BATCH) {
        int experts[BATCH];
        load_batch(topk_ids, base + lane, end, experts);
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            if (base + i * 32 >= end) break;
            const int expert = experts[i];
            const uint32_t same = __match_any_sync(ALL, expert);
            const int place = expert >= 0 ? shared.counts[warp][expert] : 0;
            __syncwarp();
            if (expert >= 0) {
                order[place + __popc(same & ((1u << lane) - 1u))] = base + i * 32 + lane;
                if ((same >> lane) == 1u) shared.counts[warp][expert] = place + __popc(same);
            }
            __syncwarp();
        }
    }
}
