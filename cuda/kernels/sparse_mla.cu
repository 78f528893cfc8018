// `sparse_mla` for groups of 8 heads: keys lie on the 16 rows of an `mma` and heads on its 8 columns, so 8 heads fill it.
//
// Every warp works alone: it takes blocks of 16 selected rows, gathers them into a ring of its own and uses a row for both products. Scores
// come out as [16 keys x 8 heads], become the second operand of the second product by transposing two 8x8 matrices between lanes, and
// the [KV_LORA_RANK x 8 heads] output stays in registers. Warps meet once, at the end, and merge in a fixed order.
//
// The maximum that scores are taken relative to follows the true one only when it falls behind by 2^LAG: the output does not depend on it,
// and few blocks then rescale what has been accumulated or compare maxima between lanes.
#include "sparse_mla.cuh"

constexpr int WARPS = TILE_WARPS, STAGES = TILE_STAGES, THREADS = 32 * WARPS;
constexpr int KEYS = 16, HEADS = 8;
// Half a step of rotary columns is filled up with zeros.
constexpr int WIDTH = KV_LORA_RANK + ROPE_DIM, STEPS = (WIDTH + 15) / 16, VALUE_TILES = KV_LORA_RANK / 16;
constexpr int Q_CHUNKS = WIDTH / 8, Q_USED = STEPS * 2;
#if FP8
constexpr int GROUP = 128, GROUPS = (KV_LORA_RANK + GROUP - 1) / GROUP, ROPE_OFFSET = KV_LORA_RANK + 4 * GROUPS;
constexpr int CHUNKS = (ROPE_OFFSET + 2 * ROPE_DIM + 15) / 16, USED = (ROPE_OFFSET + 2 * (STEPS * 16 - KV_LORA_RANK) + 15) / 16;
// Eight bytes of four heads' four lanes meet 32 banks.
constexpr int Q_STRIDE = (STEPS * 32 + 127) / 128 * 128 + 32;
#else
constexpr int CHUNKS = WIDTH / 8, USED = Q_USED, Q_STRIDE = (USED | 1) * 16;
#endif
// An odd number of 16-byte chunks from row to row: `ldmatrix` then meets no bank twice.
constexpr int ROW_BYTES = CHUNKS * 16, STRIDE = (USED | 1) * 16;
// From head to head of a warp's output: lanes of four heads and eight columns meet 32 banks.
constexpr int O_STRIDE = (KV_LORA_RANK + 31) / 32 * 32 + 4;
constexpr float LAG = 8.0f;

static_assert(KV_LORA_RANK % 16 == 0 && ROPE_DIM % 8 == 0, "whole steps of an mma, and half a one");
static_assert(USED - CHUNKS <= 1 && Q_USED - Q_CHUNKS <= 1, "what is filled up is one chunk");
static_assert(STAGES >= 2, "one block is read while the next arrives");

struct Shared {
    uint8_t rows[WARPS][STAGES][KEYS][STRIDE];
#if FP8
    uint8_t queries[HEADS][Q_STRIDE];
#endif
    float maxima[WARPS][HEADS];
    float sums[WARPS][HEADS];
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher's sum");
static_assert(HEADS * O_STRIDE * 4 <= STAGES * KEYS * STRIDE, "a warp's output fits its ring");

DEVICE void copy_or_zero(void* shared, const void* global, bool valid) {
#if TILE_THROUGH_L1
    cp_async_16_or_zero_l1(shared, global, valid);
#else
    cp_async_16_or_zero(shared, global, valid);
#endif
}

// A warp's blocks of keys: of the blocks from `first` to `end`, every WARPS-th. Lanes look up two blocks at a time, two steps ahead.
struct Blocks {
    SelectedRows rows;
    int first, end, lane;
    // Slots of the two blocks that are gathered now, of the next two, and the positions after those.
    int slot;
    Lookup next;
    int position, first_position;

    DEVICE int position_of(int pair) const {
        const int block = first + (2 * pair + lane / KEYS) * WARPS;
        return block < end ? rows.position(block * KEYS + lane % KEYS) : -1;
    }

    // In two parts, for what can be done while the first positions come.
    DEVICE void start() {
        first_position = position_of(0);
        position = position_of(1);
    }

    DEVICE void look_up() { next = rows.lookup(first_position); }

    // Gathers the warp's block `i`, and returns which of its places hold a key.
    DEVICE uint32_t gather(uint8_t (*stage)[STRIDE], int i) {
        if (i % 2 == 0) {
            slot = rows.slot(next);
            next = rows.lookup(position);
            position = position_of(i / 2 + 2);
        }
        const int base = i % 2 * KEYS;
        const uint32_t held = __ballot_sync(ALL, slot >= 0) >> base & 0xffffu;
        if (held == 0) return 0;
        constexpr int FULL = CHUNKS / 32, REST = CHUNKS % 32;
        if constexpr (FULL > 0) {
#pragma unroll
            for (int r = 0; r < KEYS; ++r) {
                const int row = __shfl_sync(ALL, slot, base + r);
                const uint8_t* source = rows.address(row, ROW_BYTES) + lane * 16;
#pragma unroll
                for (int c = 0; c < FULL; ++c) copy_or_zero(stage[r] + (c * 32 + lane) * 16, source + c * 512, row >= 0);
            }
        }
        if constexpr (REST > 0) {
#pragma unroll
            for (int at = 0; at < KEYS * REST; at += 32) {
                const int r = (at + lane) / REST, chunk = FULL * 32 + (at + lane) % REST;
                const int row = __shfl_sync(ALL, slot, base + r % KEYS);
                if (KEYS * REST % 32 == 0 || r < KEYS)
                    copy_or_zero(stage[r] + chunk * 16, rows.address(row, ROW_BYTES) + chunk * 16, row >= 0);
            }
        }
        return held;
    }
};

// The second operand of the first product. An 8-bit cache's rows need more registers: queries then stay in shared memory.
struct Step {
    uint32_t words[2];
};
#if FP8
struct Queries {
    const uint8_t* lane_row;

    // Of the latent part, columns stand as `ldmatrix` leaves a row's bytes: 4t and 4t + 2 as columns 2t and 2t + 1 of an mma's first
    // operand, 4t + 1 and 4t + 3 as 2t + 8 and 2t + 9.
    DEVICE Step step(int i, int lane) const {
        if (i < VALUE_TILES) {
            const uint2 four = *reinterpret_cast<const uint2*>(lane_row + i * 32 + lane % 4 * 8);
            return {{__byte_perm(four.x, four.y, 0x5410), __byte_perm(four.x, four.y, 0x7632)}};
        }
        const uint32_t* two = reinterpret_cast<const uint32_t*>(lane_row + i * 32 + lane % 4 * 4);
        return {{two[0], two[4]}};
    }
};
#else
struct Queries {
    Step steps[STEPS];
    DEVICE const Step& step(int i, int) const { return steps[i]; }

    DEVICE void load(const uint8_t* staging, int lane) {
        const uint8_t* row = staging + lane % 8 * Q_STRIDE + lane / 8 * 16;
#pragma unroll
        for (int i = 0; i < STEPS; i += 2) {
            if (i + 1 < STEPS) {
                uint32_t two[4];
                ldmatrix_x4(two, row + i * 32);
                steps[i] = {{two[0], two[1]}};
                steps[i + 1] = {{two[2], two[3]}};
            } else {
                ldmatrix_x2(steps[i].words, row - lane / 16 * 32 + i * 32);
            }
        }
    }
};
#endif

#if FP8

DEVICE float group_scale(const uint8_t* row, int group) { return reinterpret_cast<const float*>(row + KV_LORA_RANK)[group]; }

DEVICE void score(float (&s)[4], const Queries& q, const uint8_t (*keys)[STRIDE], int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] = 0.0f;
    const uint8_t* low = keys[lane / 4];
    const uint8_t* high = keys[lane / 4 + 8];
    constexpr int ROPE_STEPS = STEPS - VALUE_TILES;
#pragma unroll
    for (int step = 0; step < ROPE_STEPS; ++step) {
        const int offset = ROPE_OFFSET + step * 32 + lane % 4 * 4;
        const uint32_t a[4] = {
            *reinterpret_cast<const uint32_t*>(low + offset), *reinterpret_cast<const uint32_t*>(high + offset),
            *reinterpret_cast<const uint32_t*>(low + offset + 16), *reinterpret_cast<const uint32_t*>(high + offset + 16)};
        mma_bf16(s, a, q.step(VALUE_TILES + step, lane).words);
    }
    const uint8_t* lane_row = keys[lane % 16] + lane / 16 * 16;
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
        float part[2][4] = {};
        constexpr int GROUP_STEPS = GROUP / 16;
#pragma unroll
        for (int step = group * GROUP_STEPS; step < (group + 1) * GROUP_STEPS && step < VALUE_TILES; step += 2) {
            uint32_t bytes[4];
            // An odd last step: the second half is not used.
            ldmatrix_x4(bytes, step + 1 < VALUE_TILES ? lane_row + step * 16 : keys[lane % 16] + step * 16);
#pragma unroll
            for (int i = 0; i < 2 && step + i < VALUE_TILES; ++i) {
                uint32_t a[4];
                e4m3x4_to_bf16(bytes[2 * i], a[0], a[2]);
                e4m3x4_to_bf16(bytes[2 * i + 1], a[1], a[3]);
                mma_bf16(part[i], a, q.step(step + i, lane).words);
            }
        }
        const float low_scale = group_scale(low, group), high_scale = group_scale(high, group);
        s[0] = fmaf(part[0][0] + part[1][0], low_scale, s[0]);
        s[1] = fmaf(part[0][1] + part[1][1], low_scale, s[1]);
        s[2] = fmaf(part[0][2] + part[1][2], high_scale, s[2]);
        s[3] = fmaf(part[0][3] + part[1][3], high_scale, s[3]);
    }
}

// A row's scale joins its weight before that is rounded. Column 2g of 16 stands in row g of `o`, column 2g + 1 in row g + 8.
DEVICE void add_values(float (&o)[VALUE_TILES][4], const float (&p)[4], const uint8_t (*keys)[STRIDE], int lane) {
    const uint8_t* lane_row = keys[lane % 16] + lane / 16 * 16;
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
        const float low_scale = group_scale(keys[lane / 4], group), high_scale = group_scale(keys[lane / 4 + 8], group);
        const uint32_t weights[2] = {movmatrix_trans(pack_bf16(p[0] * low_scale, p[1] * low_scale)),
                                     movmatrix_trans(pack_bf16(p[2] * high_scale, p[3] * high_scale))};
        constexpr int GROUP_TILES = GROUP / 16;
#pragma unroll
        for (int tile = group * GROUP_TILES; tile < (group + 1) * GROUP_TILES && tile < VALUE_TILES; tile += 2) {
            uint32_t bytes[4];
            ldmatrix_x4_trans(bytes, tile + 1 < VALUE_TILES ? lane_row + tile * 16 : keys[lane % 16] + tile * 16);
#pragma unroll
            for (int i = 0; i < 2 && tile + i < VALUE_TILES; ++i) {
                uint32_t a[4];
                e4m3x4_to_bf16(bytes[2 * i], a[0], a[1]);
                e4m3x4_to_bf16(bytes[2 * i + 1], a[2], a[3]);
                mma_bf16(o[tile + i], a, weights);
            }
        }
    }
}

DEVICE void store_tile(float* exchange, const float (&o)[4], const float (&factor)[2], int tile, int lane) {
    float* at = exchange + lane % 4 * 2 * O_STRIDE + tile * 16 + lane / 4 * 2;
    *reinterpret_cast<float2*>(at) = make_float2(o[0] * factor[0], o[2] * factor[0]);
    *reinterpret_cast<float2*>(at + O_STRIDE) = make_float2(o[1] * factor[1], o[3] * factor[1]);
}

#else

DEVICE void score(float (&s)[4], const Queries& q, const uint8_t (*keys)[STRIDE], int lane) {
    constexpr int CHAINS = 4;
    float chains[CHAINS][4] = {};
    const uint8_t* lane_row = keys[lane % 16] + lane / 16 * 16;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        uint32_t a[4];
        ldmatrix_x4(a, lane_row + step * 32);
        mma_bf16(chains[step % CHAINS], a, q.step(step, lane).words);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] = (chains[0][i] + chains[1][i]) + (chains[2][i] + chains[3][i]);
}

DEVICE void add_values(float (&o)[VALUE_TILES][4], const uint32_t (&p)[2], const uint8_t (*keys)[STRIDE], int lane) {
    const uint32_t weights[2] = {movmatrix_trans(p[0]), movmatrix_trans(p[1])};
    const uint8_t* lane_row = keys[lane % 8 + lane / 16 * 8] + lane / 8 % 2 * 16;
#pragma unroll
    for (int tile = 0; tile < VALUE_TILES; ++tile) {
        uint32_t a[4];
        ldmatrix_x4_trans(a, lane_row + tile * 32);
        mma_bf16(o[tile], a, weights);
    }
}

DEVICE void store_tile(float* exchange, const float (&o)[4], const float (&factor)[2], int tile, int lane) {
    float* at = exchange + lane % 4 * 2 * O_STRIDE + tile * 16 + lane / 4;
    at[0] = o[0] * factor[0];
    at[O_STRIDE] = o[1] * factor[1];
    at[8] = o[2] * factor[0];
    at[O_STRIDE + 8] = o[3] * factor[1];
}

#endif

// The queries of `heads` heads, and zeros for the others, by `COPIERS` lanes of which this is the `copier`-th.
template <int COPIERS>
DEVICE void copy_queries(uint8_t* rows, const uint16_t* q, int heads, int copier) {
#pragma unroll
    for (int first = 0; first < HEADS * Q_CHUNKS; first += COPIERS) {
        const int i = first + copier, head = i / Q_CHUNKS;
        if (first + COPIERS > HEADS * Q_CHUNKS && i >= HEADS * Q_CHUNKS) break;
        uint8_t* to = rows + head * Q_STRIDE + i % Q_CHUNKS * 16;
        if (WHOLE_GROUPS)
            cp_async_16(to, q + i * 8);
        else
            cp_async_16_or_zero(to, head < heads ? q + i * 8 : q, head < heads);
    }
}

// Zeros where `COUNT` rows end in half a step: no copy writes there.
template <int COUNT, int ROW_STRIDE>
DEVICE void fill_up(uint8_t* rows, int chunk, int filler, int fillers) {
    for (int row = filler; row < COUNT; row += fillers)
        *reinterpret_cast<uint4*>(rows + row * ROW_STRIDE + chunk * 16) = make_uint4(0, 0, 0, 0);
}

// One block of keys: `reference` is what the weights of this lane's two heads are relative to, `sum` adds up those of the lane's keys.
DEVICE void attend(float (&o)[VALUE_TILES][4], float (&reference)[2], float (&sum)[2], const Queries& queries,
                   const uint8_t (*keys)[STRIDE], uint32_t held, float scale_log2, int lane) {
    float s[4];
    score(s, queries, keys, lane);
    const bool low = held >> lane / 4 & 1, high = held >> (lane / 4 + 8) & 1;
    s[0] = low ? s[0] * scale_log2 : negative_infinity();
    s[1] = low ? s[1] * scale_log2 : negative_infinity();
    s[2] = high ? s[2] * scale_log2 : negative_infinity();
    s[3] = high ? s[3] * scale_log2 : negative_infinity();
    float most[2] = {fmaxf(s[0], s[2]), fmaxf(s[1], s[3])};
    if (__any_sync(ALL, most[0] > reference[0] + LAG || most[1] > reference[1] + LAG)) {
        float factor[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int distance = 4; distance < 32; distance *= 2) most[h] = fmaxf(most[h], __shfl_xor_sync(ALL, most[h], distance));
            most[h] = fmaxf(most[h], reference[h]);
            factor[h] = exp2_approx(reference[h] - finite_base(most[h]));
            reference[h] = most[h];
            sum[h] *= factor[h];
        }
#pragma unroll
        for (int tile = 0; tile < VALUE_TILES; ++tile)
#pragma unroll
            for (int j = 0; j < 4; ++j) o[tile][j] *= factor[j % 2];
    }
    const float base[2] = {finite_base(reference[0]), finite_base(reference[1])};
    float p[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) p[j] = exp2_approx(s[j] - base[j % 2]);
#if FP8
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[j % 2] += p[j];
    add_values(o, p, keys, lane);
#else
    // What is added up is what is multiplied: a row that outweighs all others comes out as it is.
    const uint32_t weights[2] = {pack_bf16(p[0], p[1]), pack_bf16(p[2], p[3])};
    sum[0] += bf16_low(weights[0]) + bf16_low(weights[1]);
    sum[1] += bf16_high(weights[0]) + bf16_high(weights[1]);
    add_values(o, weights, keys, lane);
#endif
}

// `q` [T, H, WIDTH]; `cache` rows of ROW_BYTES; `topk_indices` [T, k]; `out` [T, H, KV_LORA_RANK], or with SPLIT the partial results of
// a range of blocks as `sparse_mla.cuh` describes them; without WHOLE_GROUPS the last group of heads may be short. Where `union_counts` is
// not null, tokens in groups of `union_tokens` whose count is at most `union_most` are left alone. Grid: tokens, groups of heads, splits.
KERNEL void __launch_bounds__(THREADS, 1)
sparse_mla(const uint16_t* q, const uint8_t* cache, const int32_t* topk_indices, const int32_t* seq_ids, const int32_t* block_table,
           uint16_t* out, float* partial_out, float* partial_max, float* partial_sum, const int32_t* union_counts, int union_tokens,
           int union_most, int heads, int k, int page_size, int max_blocks, float scale_log2) {
    Shared& shared = shared_memory<Shared>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int token = blockIdx.x, splits = gridDim.z, split = blockIdx.z;
    if (union_counts != nullptr && union_counts[token / union_tokens] <= union_most) return;
    const int64_t first_head = static_cast<int64_t>(token) * heads + blockIdx.y * HEADS;
    const int my_heads = WHOLE_GROUPS ? HEADS : min(HEADS, heads - static_cast<int>(blockIdx.y) * HEADS);

    const int all_blocks = (k + KEYS - 1) / KEYS;
    Blocks blocks;
    blocks.rows.start(topk_indices, cache, seq_ids, block_table, token, k, page_size, max_blocks);
    blocks.first = static_cast<int>(static_cast<int64_t>(all_blocks) * split / splits) + warp;
    blocks.end = static_cast<int>(static_cast<int64_t>(all_blocks) * (split + 1) / splits);
    blocks.lane = lane;
    blocks.start();
    const int count = max(0, (blocks.end - blocks.first + WARPS - 1) / WARPS);

    uint8_t(*ring)[KEYS][STRIDE] = shared.rows[warp];
    // Of each stage, which keys it holds: 16 bits.
    uint32_t held[STAGES];
    if constexpr (USED > CHUNKS) fill_up<STAGES * KEYS, STRIDE>(ring[0][0], CHUNKS, lane, 32);
    const uint16_t* my_q = q + first_head * WIDTH;
#if FP8
    if constexpr (Q_USED > Q_CHUNKS) fill_up<HEADS, Q_STRIDE>(shared.queries[0], Q_CHUNKS, threadIdx.x, THREADS);
    copy_queries<THREADS>(shared.queries[0], my_q, my_heads, threadIdx.x);
    cp_async_commit();
    blocks.look_up();
#pragma unroll
    for (int i = 0; i < STAGES; ++i) {
        held[i] = blocks.gather(ring[i], i);
        cp_async_commit();
    }
    cp_async_wait<STAGES>();
    __syncthreads();
    const Queries queries{shared.queries[lane / 4]};
#else
    // Queries pass through the last stage.
    uint8_t* staging = ring[STAGES - 1][0];
    copy_queries<32>(staging, my_q, my_heads, lane);
    cp_async_commit();
    blocks.look_up();
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        held[i] = blocks.gather(ring[i], i);
        cp_async_commit();
    }
    cp_async_wait<STAGES - 1>();
    __syncwarp();
    Queries queries;
    queries.load(staging, lane);
    __syncwarp();
    held[STAGES - 1] = blocks.gather(ring[STAGES - 1], STAGES - 1);
    cp_async_commit();
#endif

    float o[VALUE_TILES][4];
#pragma unroll
    for (int tile = 0; tile < VALUE_TILES; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[tile][i] = 0.0f;
    // Of this lane's two heads: what scores are relative to, and the sum of the weights of the lane's keys.
    float reference[2] = {negative_infinity(), negative_infinity()}, sum[2] = {0.0f, 0.0f};

    int stage = 0;
    for (int i = 0; i < count; ++i) {
        cp_async_wait<STAGES - 1>();
        __syncwarp();
        uint8_t(*keys)[STRIDE] = ring[stage];
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        if (held[0] != 0) attend(o, reference, sum, queries, keys, held[0], scale_log2, lane);
        __syncwarp();
#pragma unroll
        for (int j = 0; j + 1 < STAGES; ++j) held[j] = held[j + 1];
        held[STAGES - 1] = blocks.gather(keys, i + STAGES);
        cp_async_commit();
    }

    cp_async_wait<0>();
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) sum[h] += __shfl_xor_sync(ALL, sum[h], distance);
    if (lane < 4) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            shared.maxima[warp][lane * 2 + h] = reference[h];
            shared.sums[warp][lane * 2 + h] = sum[h];
        }
    }
    __syncthreads();
    float factor[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int head = lane % 4 * 2 + h;
        float most = shared.maxima[0][head];
#pragma unroll
        for (int w = 1; w < WARPS; ++w) most = fmaxf(most, shared.maxima[w][head]);
        const float base = finite_base(most);
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) total = fmaf(shared.sums[w][head], exp2_approx(shared.maxima[w][head] - base), total);
        factor[h] = exp2_approx(reference[h] - base);
#if SPLIT
        if (warp == 0 && lane < 4 && (WHOLE_GROUPS || head < my_heads)) {
            partial_max[(first_head + head) * splits + split] = most;
            partial_sum[(first_head + head) * splits + split] = total;
        }
#else
        factor[h] *= reciprocal_or_zero(total);
#endif
    }
    float* exchange = reinterpret_cast<float*>(ring);
#pragma unroll
    for (int tile = 0; tile < VALUE_TILES; ++tile) store_tile(exchange, o[tile], factor, tile, lane);
    __syncthreads();
    constexpr int FOURS = KV_LORA_RANK / 4, RING_FLOATS = STAGES * KEYS * STRIDE / 4, ITEMS = (HEADS * FOURS + THREADS - 1) / THREADS;
#pragma unroll 8
    for (int item = 0; item < ITEMS; ++item) {
        const int i = item * THREADS + threadIdx.x, head = i / FOURS, column = i % FOURS * 4;
        if ((HEADS * FOURS % THREADS != 0 || !WHOLE_GROUPS) && head >= my_heads) break;
        const float* part = reinterpret_cast<const float*>(shared.rows) + head * O_STRIDE + column;
        float4 v = *reinterpret_cast<const float4*>(part);
#pragma unroll
        for (int w = 1; w < WARPS; ++w) {
            const float4 four = *reinterpret_cast<const float4*>(part + w * RING_FLOATS);
            v.x += four.x, v.y += four.y, v.z += four.z, v.w += four.w;
        }
#if SPLIT
        *reinterpret_cast<float4*>(partial_out + ((first_head + head) * splits + split) * KV_LORA_RANK + column) = v;
#else
        store_bf16(out + (first_head + head) * KV_LORA_RANK + column, v);
#endif
    }
}
