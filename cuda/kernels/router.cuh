// Which experts see a token. A warp a token: lane l holds experts l, l + 32, and so on, and the best is taken out k times.
//
// Constants: EXPERTS, N_GROUP; BIAS_TYPE; GROUPED (some groups are dropped); TILE_WARPS tokens a block.
//
// Arithmetic is f32 with u = 2^-24. The power of two has the relative error 4 u and its argument moves it by u, so that a score
// s = 1 / (1 + e) has at most 8 u (1 - s) + 2 u relative, a choice s + bias u |s + bias| more, a group's score u of itself more.
// Equal floats go to the lower index. A weight adds the sum's (7 u at most) and 2 u.
#pragma once

#include "rows.cuh"

namespace routing {

constexpr int PER_LANE = (EXPERTS + 31) / 32, GROUP_SIZE = EXPERTS / N_GROUP;
constexpr uint32_t ALL_LANES = 0xffffffffu;
static_assert(EXPERTS > 0 && N_GROUP > 0 && EXPERTS % N_GROUP == 0, "groups are of one size");

struct Shared {
    float scores[TILE_WARPS][EXPERTS];
    int32_t chosen[TILE_WARPS][32];
#if GROUPED
    uint32_t choices[TILE_WARPS][EXPERTS];
    uint32_t groups[TILE_WARPS][N_GROUP];
#endif
};

// 0 ranks below everything, NaN next.
constexpr uint32_t NONE = 0, NOT_A_NUMBER = 1;

DEVICE uint32_t to_key(float value) {
    const uint32_t bits = __float_as_uint(value + 0.0f);
    return value == value ? bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u) : NOT_A_NUMBER;
}

DEVICE float to_value(uint32_t key) {
    const uint32_t flip = static_cast<uint32_t>(static_cast<int32_t>(~key) >> 31) | 0x80000000u;
    return __uint_as_float(key == NOT_A_NUMBER ? 0x7fc00000u : key ^ flip);
}

DEVICE float sigmoid(float x) {
    // Beyond these the power is nothing beside 1, or 1 nothing beside it. NaN stays.
    float y = -x;
    y = y > 89.0f ? 89.0f : y < -60.0f ? -60.0f : y;
    // 2^(y log2(e)), the whole part by the exponent: log2(e) as the sum of two floats.
    const float whole = rintf(y * 1.44269504f);
    const float rest = fmaf(y, 0x1.4ae0c0p-26f, fmaf(y, 0x1.715476p+0f, -whole));
    const uint32_t exponent = whole == whole ? static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) : 127;
    return 1.0f / (1.0f + exp2_approx(rest) * __uint_as_float(exponent << 23));
}

// The best key of the warp, and where it stands; of equal ones the lowest.
struct Best {
    uint32_t key, index;
};
DEVICE Best warp_best(Best own) {
    const uint32_t key = __reduce_max_sync(ALL_LANES, own.key);
    return {key, __reduce_min_sync(ALL_LANES, own.key == key ? own.index : 0xffffffffu)};
}

template <int COUNT>
DEVICE Best lane_best(const uint32_t (&keys)[COUNT], int lane) {
    Best best{keys[0], static_cast<uint32_t>(lane)};
#pragma unroll
    for (int i = 1; i < COUNT; ++i) {
        if (keys[i] > best.key) best = {keys[i], static_cast<uint32_t>(32 * i + lane)};
    }
    return best;
}

// Sorts what a lane holds, best first; equal keys stay in order.
DEVICE void sort(uint32_t (&keys)[PER_LANE], uint32_t (&experts)[PER_LANE]) {
#pragma unroll
    for (int round = 0; round < PER_LANE; ++round) {
#pragma unroll
        for (int i = round % 2; i + 1 < PER_LANE; i += 2) {
            const bool swap = keys[i] < keys[i + 1];
            const uint32_t key = keys[i], expert = experts[i];
            keys[i] = swap ? keys[i + 1] : key, keys[i + 1] = swap ? key : keys[i + 1];
            experts[i] = swap ? experts[i + 1] : expert, experts[i + 1] = swap ? expert : experts[i + 1];
        }
    }
}

#if GROUPED
// Lanes that look through a group together: a power of two, so that they are neighbours of one another.
constexpr int group_lanes(int lanes) { return lanes > 1 && (lanes * N_GROUP > 32 || lanes > GROUP_SIZE) ? group_lanes(lanes / 2) : lanes; }
constexpr int GROUP_LANES = group_lanes(32);

// The keys of experts whose group is not among the best `topk_group` become NONE.
DEVICE void drop_groups(Shared& shared, uint32_t (&keys)[PER_LANE], int warp, int lane, int topk_group) {
    uint32_t* choices = shared.choices[warp];
    uint32_t* groups = shared.groups[warp];
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        if (32 * i + lane < EXPERTS) choices[32 * i + lane] = keys[i];
    }
    __syncwarp();
    for (int first = 0; first < N_GROUP; first += 32 / GROUP_LANES) {
        const int group = first + lane / GROUP_LANES;
        uint32_t best = NONE, second = NONE;
        const auto see = [&](uint32_t key) {
            second = max(second, min(best, key));
            best = max(best, key);
        };
        for (int i = lane % GROUP_LANES; i < GROUP_SIZE && group < N_GROUP; i += GROUP_LANES) see(choices[group * GROUP_SIZE + i]);
#pragma unroll
        for (int distance = 1; distance < GROUP_LANES; distance *= 2) {
            const uint32_t other = __shfl_xor_sync(ALL_LANES, best, distance);
            const uint32_t other_second = __shfl_xor_sync(ALL_LANES, second, distance);
            see(other);
            see(other_second);
        }
        if (group < N_GROUP && lane % GROUP_LANES == 0) {
            groups[group] = second == NONE ? best : to_key(to_value(best) + to_value(second));
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const int own = (32 * i + lane) / GROUP_SIZE;
        if (own >= N_GROUP) continue;
        int better = 0;
        for (int group = 0; group < N_GROUP; ++group) {
            better += groups[group] > groups[own] || (groups[group] == groups[own] && group < own);
        }
        if (better >= topk_group) keys[i] = NONE;
    }
    __syncwarp();
}
#endif

// The tokens of block `block`.
DEVICE void route(int block, const float* __restrict__ logits, const void* __restrict__ bias, int32_t* __restrict__ topk_ids,
                  float* __restrict__ topk_weights, int tokens, int k, int topk_group, int normalise, float scaling) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t token = static_cast<int64_t>(block) * TILE_WARPS + warp;
    if (token >= tokens) return;
    Shared& shared = shared_memory<Shared>();

    float x[PER_LANE], offset[PER_LANE][1];
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const int expert = 32 * i + lane;
        x[i] = expert < EXPERTS ? logits[token * EXPERTS + expert] : 0.0f;
        offset[i][0] = 0.0f;
        if (expert < EXPERTS) load_weights<BIAS_TYPE>(bias, expert, offset[i]);
    }
    uint32_t keys[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const int expert = 32 * i + lane;
        const float score = sigmoid(x[i]);
        keys[i] = expert < EXPERTS ? to_key(score + offset[i][0]) : NONE;
        if (expert < EXPERTS) shared.scores[warp][expert] = score;
    }
#if GROUPED
    drop_groups(shared, keys, warp, lane, topk_group);
#endif

    // Every lane's best is at hand when it is sorted. Of equal ones all leave at once, which shows at the end; then they go one by one.
    uint32_t sorted[PER_LANE], experts[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) sorted[i] = keys[i], experts[i] = static_cast<uint32_t>(32 * i + lane);
    sort(sorted, experts);
    bool tied = false;
#pragma unroll 2
    for (int place = 0; place < k; ++place) {
        const uint32_t best = __reduce_max_sync(ALL_LANES, sorted[0]);
        const bool own = sorted[0] == best;
        const uint32_t owners = __ballot_sync(ALL_LANES, own);
        tied |= (owners & (owners - 1)) != 0;
        if (lane == __ffs(static_cast<int>(owners)) - 1) shared.chosen[warp][place] = static_cast<int32_t>(experts[0]);
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
            sorted[i] = !own ? sorted[i] : i + 1 < PER_LANE ? sorted[i + 1] : NONE;
            if (i + 1 < PER_LANE) experts[i] = own ? experts[i + 1] : experts[i];
        }
    }
    __syncwarp();
    int chosen = lane < k ? shared.chosen[warp][lane] : 0;
    if (tied) {
        for (int place = 0; place < k; ++place) {
            const int expert = static_cast<int>(warp_best(lane_best(keys, lane)).index);
            if (lane == place) chosen = expert;
#pragma unroll
            for (int i = 0; i < PER_LANE; ++i) {
                if (32 * i + lane == expert) keys[i] = NONE;
            }
        }
    }
    float weight = lane < k ? shared.scores[warp][chosen] : 0.0f;
    if (normalise != 0) weight /= warp_sum(weight) + 1e-20f;
    weight *= scaling;
    if (lane < k) {
        topk_ids[token * k + lane] = chosen;
        topk_weights[token * k + lane] = weight;
    }
}

} // namespace routing
