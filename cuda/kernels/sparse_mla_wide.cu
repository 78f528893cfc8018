// `sparse_mla` for 64 query rows that share their keys: 64 heads of a token, or 64 / TILE_TOKENS heads of neighbouring tokens over the
// union of their selections (`sparse_mla_union`).
//
// Eight warps, tiles of TILE_KEYS gathered rows. Queries stay in registers: warp (block, half) holds 16 of the query rows and half of
// their columns, so a key tile is all that shared memory must hold, and the next one arrives meanwhile. Scores: each warp multiplies its
// part with all keys; the two halves of a block exchange, and each keeps the sums of half of the keys. Values: each warp owns an eighth
// of the latent columns of all query rows.
//
// The maximum that scores are taken relative to follows the true one only when it falls behind by 2^LAG: the output does not depend on it,
// and few tiles then rescale what has been accumulated.
#include "ptx.cuh"
#ifndef PREFETCH
#define PREFETCH 0
#endif
#ifndef SPREAD
#define SPREAD (PIECES / 2)
#endif
#ifndef PBUF
#define PBUF 0
#endif

constexpr int QUERIES = 64, WARPS = 8, THREADS = 32 * WARPS, BLOCKS = QUERIES / 16;
constexpr int KEYS = TILE_KEYS, STAGES = TILE_STAGES, HALF_KEYS = KEYS / 2, SCORES = HALF_KEYS / 8;
constexpr int WIDTH = KV_LORA_RANK + ROPE_DIM, STEPS = WIDTH / 16, HALF_STEPS = (STEPS + 1) / 2;
constexpr int HEADS = QUERIES / TILE_TOKENS;
constexpr int KEY_STRIDE = WIDTH + 8, P_STRIDE = KEYS + 8;
constexpr int COLUMN_PAIRS = KV_LORA_RANK / 16, PAIRS = (COLUMN_PAIRS + WARPS - 1) / WARPS;
// 16-byte chunks of a row; those that 32 lanes at a time leave over go several rows at a time.
constexpr int CHUNKS = WIDTH / 8, ROWS_PER_WARP = KEYS / WARPS, REST = CHUNKS % 32;
constexpr int REST_ROWS = REST == 0 ? 1 : REST <= 8 && ROWS_PER_WARP >= 4 ? 4 : REST <= 16 ? 2 : 1;
constexpr int PIECES = ROWS_PER_WARP + (REST == 0 ? 0 : ROWS_PER_WARP / REST_ROWS);
constexpr float LAG = 8.0f;
constexpr uint32_t ALL = 0xffffffff;

static_assert(KEYS % 32 == 0 && STAGES >= 2 && STAGES * KEYS >= QUERIES + KEYS, "the queries pass through the last stages");
static_assert(KV_LORA_RANK % 16 == 0 && ROPE_DIM % 16 == 0 && QUERIES % TILE_TOKENS == 0 && TILE_TOKENS <= 8, "dims");

DEVICE float negative_infinity() { return __uint_as_float(0xff800000u); }

struct Shared {
    uint16_t keys[STAGES * KEYS][KEY_STRIDE];
    // A half's scores for the other half; then, in the place of both, the block's P.
    float4 exchange[BLOCKS][2][SCORES][32];
    float maxima[2][QUERIES];
    float factors[QUERIES];
    uint8_t members[STAGES][KEYS];
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher's sum");
static_assert(16 * P_STRIDE * 2 <= sizeof(Shared::exchange) / BLOCKS, "P fits its block's exchange");

// Where a token group's keys come from, and which of them come next.
struct Keys {
    const int32_t* entries;
    const int32_t* blocks;
    const uint16_t* cache;
    int count;
    int page_size;
    int lane_row;
    // Of the tile after the one gathered last: its page and the row in it (and members, -1 for a hole); the index of the one after.
    int page, row, members, index;
    int slot;
    uint16_t (*target)[KEY_STRIDE];

    DEVICE int entry(int tile) const {
        const int i = tile * KEYS + lane_row;
        return i < count ? __ldg(entries + i) : -1;
    }

    DEVICE void resolve() {
#if TILE_TOKENS > 1
        members = index < 0 ? 0 : index & 0xff;
        row = index < 0 ? -1 : index >> 8;
#else
        members = index < 0 ? 0 : 1;
        const int block = index < 0 ? 0 : index / page_size;
        row = index < 0 ? -1 : index - block * page_size;
        page = index < 0 ? 0 : __ldg(blocks + block);
#endif
    }

    DEVICE void start(int tile) {
        page = 0;
        index = entry(tile);
        resolve();
        index = entry(tile + 1);
    }

    // The next tile's gather, in PIECES pieces between `begin` and `end`: whole rows as far as 32 lanes take 16 bytes each, then the rest of
    // rows.
    DEVICE void begin(Shared& shared, int stage, int lane) {
        slot = row < 0 ? -1 : page * page_size + row;
        target = shared.keys + stage * KEYS + lane_row / ROWS_PER_WARP * ROWS_PER_WARP;
        if (lane < ROWS_PER_WARP) shared.members[stage][lane_row] = static_cast<uint8_t>(members);
    }

    DEVICE void copy(int my_row, int chunk, bool lane_copies) const {
        const int from = __shfl_sync(ALL, slot, my_row);
        if (lane_copies)
            cp_async_16_or_zero(target[my_row] + chunk * 8, cache + static_cast<int64_t>(max(from, 0)) * WIDTH + chunk * 8, from >= 0);
    }

    DEVICE void piece(int i, int lane) const {
        if (i < ROWS_PER_WARP) {
#pragma unroll
            for (int c = 0; c < CHUNKS / 32; ++c) copy(i, c * 32 + lane, true);
        } else {
            const int first_row = (i - ROWS_PER_WARP) * REST_ROWS;
            copy(first_row + lane / (32 / REST_ROWS), CHUNKS / 32 * 32 + lane % (32 / REST_ROWS), lane % (32 / REST_ROWS) < REST);
        }
    }

    DEVICE void end(int tile) {
        cp_async_commit();
        resolve();
        index = entry(tile + 2);
    }

    DEVICE void gather(Shared& shared, int stage, int tile, int lane) {
        begin(shared, stage, lane);
#pragma unroll
        for (int i = 0; i < PIECES; ++i) piece(i, lane);
        end(tile);
    }
};

// The queries, through the last stages of shared memory to registers; rows of no head or no token are zeros.
DEVICE void load_queries(uint16_t (*staging)[KEY_STRIDE], const uint16_t* q, int first_token, int tokens, int first_head, int heads) {
    for (int i = threadIdx.x; i < QUERIES * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        const int token = first_token + row / HEADS, head = first_head + row % HEADS;
        const bool valid = token < tokens && head < heads;
        const int64_t offset = valid ? (static_cast<int64_t>(token) * heads + head) * WIDTH + chunk * 8 : 0;
        cp_async_16_or_zero(staging[row] + chunk * 8, q + offset, valid);
    }
}

// 16 queries x HALF_KEYS keys, over the warp's half of the columns; between them, part of the next tile's gather.
template <int FIRST_PIECE, int END_PIECE>
DEVICE void score(float (&s)[SCORES][4], const uint32_t (&queries)[HALF_STEPS][4], const uint16_t* keys, const Keys& next, int lane) {
#pragma unroll
    for (int n = 0; n < SCORES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = 0.0f;
#if PREFETCH > 0
    uint32_t b[PREFETCH + 1][SCORES / 2][4];
#pragma unroll
    for (int step = 0; step < PREFETCH; ++step)
#pragma unroll
        for (int n = 0; n < SCORES; n += 2) ldmatrix_x4(b[step][n / 2], keys + n * 8 * KEY_STRIDE + step * 16);
#endif
#pragma unroll
    for (int step = 0; step < HALF_STEPS; ++step) {
#pragma unroll
        for (int i = step * (END_PIECE - FIRST_PIECE) / HALF_STEPS; i < (step + 1) * (END_PIECE - FIRST_PIECE) / HALF_STEPS; ++i)
            next.piece(FIRST_PIECE + i, lane);
#if PREFETCH > 0
        if (step + PREFETCH < HALF_STEPS)
#pragma unroll
            for (int n = 0; n < SCORES; n += 2)
                ldmatrix_x4(b[(step + PREFETCH) % (PREFETCH + 1)][n / 2], keys + n * 8 * KEY_STRIDE + (step + PREFETCH) * 16);
#pragma unroll
        for (int n = 0; n < SCORES; n += 2) {
            uint32_t (&bb)[4] = b[step % (PREFETCH + 1)][n / 2];
            mma_bf16(s[n], queries[step], {bb[0], bb[1]});
            mma_bf16(s[n + 1], queries[step], {bb[2], bb[3]});
        }
#else
#pragma unroll
        for (int n = 0; n < SCORES; n += 2) {
            uint32_t b[4];
            ldmatrix_x4(b, keys + n * 8 * KEY_STRIDE + step * 16);
            mma_bf16(s[n], queries[step], {b[0], b[1]});
            mma_bf16(s[n + 1], queries[step], {b[2], b[3]});
        }
#endif
    }
}

// `q` [T, H, WIDTH]; `cache` rows of WIDTH; `entries` [T, k] positions or, of a group of tokens, `row << 8 | members` (`counts` of them in
// `k` places); `out` [T, H, KV_LORA_RANK], or with SPLIT the partial results [T, H, splits, KV_LORA_RANK] and [T, H, splits] of a range of
// tiles: unnormalised sums, the maximum (log2) that they are relative to, and the sum of weights. A group with more than `most` entries
// is left alone.
KERNEL void __launch_bounds__(THREADS, 1)
sparse_mla_wide(const uint16_t* q, const uint16_t* cache, const int32_t* entries, const int32_t* counts, const int32_t* seq_ids,
                const int32_t* block_table, uint16_t* out, float* partial_out, float* partial_max, float* partial_sum, int tokens, int heads,
                int k, int page_size, int max_blocks, int most, float scale_log2) {
    Shared& shared = shared_memory<Shared>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = warp % BLOCKS, half = warp / BLOCKS;
    const int group = blockIdx.x, first_token = group * TILE_TOKENS, first_head = blockIdx.y * HEADS;
    const int splits = gridDim.z, split = blockIdx.z;

    Keys next;
    next.entries = entries + static_cast<int64_t>(group) * k;
    next.cache = cache;
    next.page_size = page_size;
    next.lane_row = warp * ROWS_PER_WARP + lane % ROWS_PER_WARP;
#if TILE_TOKENS > 1
    next.count = counts[group];
    if (next.count > most) return;
    next.blocks = nullptr;
#else
    next.count = k;
    next.blocks = block_table + static_cast<int64_t>(seq_ids[first_token]) * max_blocks;
#endif
    const int all_tiles = (next.count + KEYS - 1) / KEYS;
    const int first_tile = static_cast<int>(static_cast<int64_t>(all_tiles) * split / splits);
    const int end_tile = static_cast<int>(static_cast<int64_t>(all_tiles) * (split + 1) / splits);
    next.count = min(next.count, end_tile * KEYS);
    next.start(first_tile);

    uint16_t(*staging)[KEY_STRIDE] = shared.keys + STAGES * KEYS - QUERIES;
    load_queries(staging, q, first_token, tokens, first_head, heads);
    cp_async_commit();
    next.gather(shared, 0, first_tile, lane);
    cp_async_wait<1>();
    __syncthreads();
    // With an odd number of steps the middle one is the first half's: the second multiplies it with zeros.
    const int first_step = half == 0 ? 0 : STEPS - HALF_STEPS;
    uint32_t queries[HALF_STEPS][4];
#pragma unroll
    for (int step = 0; step < HALF_STEPS; ++step)
        ldmatrix_x4(queries[step], staging[block * 16 + lane % 16] + (first_step + step) * 16 + lane / 16 * 8);
    if (STEPS % 2 != 0 && half != 0)
#pragma unroll
        for (int i = 0; i < 4; ++i) queries[0][i] = 0;
    if constexpr (STAGES > 2) {
        __syncthreads();
#pragma unroll
        for (int i = 1; i < STAGES - 1; ++i) {
            next.gather(shared, i, first_tile + i, lane);
        }
    }

    float o[BLOCKS][2 * PAIRS][4];
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
        for (int n = 0; n < 2 * PAIRS; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) o[m][n][i] = 0.0f;
    float reference[2] = {negative_infinity(), negative_infinity()}, sum[2] = {0.0f, 0.0f};
    const int row = block * 16 + lane / 4;

    int stage = 0;
    for (int tile = first_tile; tile < end_tile; ++tile, stage = stage + 1 == STAGES ? 0 : stage + 1) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        next.begin(shared, stage == 0 ? STAGES - 1 : stage - 1, lane);
        const uint32_t some = lane < KEYS / 4 ? reinterpret_cast<const uint32_t*>(shared.members[stage])[lane] : 0;
        if (!__any_sync(ALL, some != 0)) {
#pragma unroll
            for (int i = 0; i < PIECES; ++i) next.piece(i, lane);
            next.end(tile + STAGES - 1);
            continue;
        }

        const uint16_t(*keys)[KEY_STRIDE] = shared.keys + stage * KEYS;
        const uint16_t* key_lane = keys[lane % 8 + lane / 16 * 8] + first_step * 16 + lane / 8 % 2 * 8;
        float s[SCORES][4];
        score<0, SPREAD>(s, queries, key_lane + (1 - half) * HALF_KEYS * KEY_STRIDE, next, lane);
#pragma unroll
        for (int n = 0; n < SCORES; ++n) shared.exchange[block][half][n][lane] = make_float4(s[n][0], s[n][1], s[n][2], s[n][3]);
        score<SPREAD, PIECES>(s, queries, key_lane + half * HALF_KEYS * KEY_STRIDE, next, lane);
        next.end(tile + STAGES - 1);
        named_barrier(1 + block, 64);

        // With 8 heads a token, rows 8 to 15 of a block are another token's than rows 0 to 7.
        const uint32_t low_bit = 1u << block * 2 * TILE_TOKENS / 8, high_bit = 1u << (block * 2 + 1) * TILE_TOKENS / 8;
        float most_low = negative_infinity(), most_high = negative_infinity();
#pragma unroll
        for (int n = 0; n < SCORES; ++n) {
            const float4 other = shared.exchange[block][1 - half][n][lane];
            const uint32_t members =
                *reinterpret_cast<const uint16_t*>(&shared.members[stage][half * HALF_KEYS + n * 8 + lane % 4 * 2]);
            s[n][0] = members & low_bit ? (s[n][0] + other.x) * scale_log2 : negative_infinity();
            s[n][1] = members >> 8 & low_bit ? (s[n][1] + other.y) * scale_log2 : negative_infinity();
            s[n][2] = members & high_bit ? (s[n][2] + other.z) * scale_log2 : negative_infinity();
            s[n][3] = members >> 8 & high_bit ? (s[n][3] + other.w) * scale_log2 : negative_infinity();
            most_low = fmaxf(most_low, fmaxf(s[n][0], s[n][1]));
            most_high = fmaxf(most_high, fmaxf(s[n][2], s[n][3]));
        }
        most_low = fmaxf(most_low, __shfl_xor_sync(ALL, most_low, 1));
        most_high = fmaxf(most_high, __shfl_xor_sync(ALL, most_high, 1));
        most_low = fmaxf(most_low, __shfl_xor_sync(ALL, most_low, 2));
        most_high = fmaxf(most_high, __shfl_xor_sync(ALL, most_high, 2));
        if (lane % 4 == 0) {
            shared.maxima[half][row] = most_low;
            shared.maxima[half][row + 8] = most_high;
        }
        named_barrier(1 + block, 64);
        bool rescaled = false;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float most_now = fmaxf(h == 0 ? most_low : most_high, shared.maxima[1 - half][row + h * 8]);
            float factor = 1.0f;
            if (most_now > reference[h] + LAG) {
                factor = exp2_approx(reference[h] - most_now);
                reference[h] = most_now;
                rescaled = true;
            }
            if (half == 0 && lane % 4 == 0) shared.factors[row + h * 8] = factor;
            const float base = reference[h] == negative_infinity() ? 0.0f : reference[h];
            sum[h] *= factor;
#pragma unroll
            for (int n = 0; n < SCORES; ++n) {
                const float p0 = exp2_approx(s[n][2 * h] - base), p1 = exp2_approx(s[n][2 * h + 1] - base);
                sum[h] += p0 + p1;
                uint16_t* p_row = reinterpret_cast<uint16_t*>(shared.exchange[block]) + (lane / 4 + h * 8) * P_STRIDE;
                *reinterpret_cast<uint32_t*>(p_row + half * HALF_KEYS + n * 8 + lane % 4 * 2) = pack_bf16(p0, p1);
            }
        }
        if (__syncthreads_or(rescaled)) {
#pragma unroll
            for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float factor = shared.factors[m * 16 + h * 8 + lane / 4];
#pragma unroll
                    for (int n = 0; n < 2 * PAIRS; ++n) {
                        o[m][n][2 * h] *= factor;
                        o[m][n][2 * h + 1] *= factor;
                    }
                }
        }
#pragma unroll
        for (int step = 0; step < KEYS / 16; ++step) {
            uint32_t values[PAIRS][4];
#pragma unroll
            for (int pair = 0; pair < PAIRS; ++pair)
                if (COLUMN_PAIRS % WARPS == 0 || warp * PAIRS + pair < COLUMN_PAIRS)
                    ldmatrix_x4_trans(values[pair], keys[step * 16 + lane % 16] + (warp * PAIRS + pair) * 16 + lane / 16 * 8);
#if PBUF
            uint32_t p[2][4];
            ldmatrix_x4(p[0], reinterpret_cast<const uint16_t*>(shared.exchange[0]) + lane % 16 * P_STRIDE + step * 16 + lane / 16 * 8);
#endif
#pragma unroll
            for (int m = 0; m < BLOCKS; ++m) {
#if PBUF
                if (m + 1 < BLOCKS)
                    ldmatrix_x4(p[(m + 1) % 2],
                                reinterpret_cast<const uint16_t*>(shared.exchange[m + 1]) + lane % 16 * P_STRIDE + step * 16 + lane / 16 * 8);
                uint32_t (&pm)[4] = p[m % 2];
#else
                uint32_t pm[4];
                ldmatrix_x4(pm, reinterpret_cast<const uint16_t*>(shared.exchange[m]) + lane % 16 * P_STRIDE + step * 16 + lane / 16 * 8);
#endif
#pragma unroll
                for (int pair = 0; pair < PAIRS; ++pair)
                    if (COLUMN_PAIRS % WARPS == 0 || warp * PAIRS + pair < COLUMN_PAIRS) {
                        mma_bf16(o[m][2 * pair], pm, {values[pair][0], values[pair][1]});
                        mma_bf16(o[m][2 * pair + 1], pm, {values[pair][2], values[pair][3]});
                    }
            }
        }
    }

    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        sum[h] += __shfl_xor_sync(ALL, sum[h], 1);
        sum[h] += __shfl_xor_sync(ALL, sum[h], 2);
        if (lane % 4 == 0) {
            shared.maxima[half][row + h * 8] = sum[h];
            shared.factors[row + h * 8] = reference[h];
        }
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int query = m * 16 + h * 8 + lane / 4, token = first_token + query / HEADS, head = first_head + query % HEADS;
            if (token >= tokens || head >= heads) continue;
            const float total = shared.maxima[0][query] + shared.maxima[1][query];
            const int64_t at = static_cast<int64_t>(token) * heads + head;
#if SPLIT
            if (warp == 0 && lane % 4 == 0) {
                partial_max[at * splits + split] = shared.factors[query];
                partial_sum[at * splits + split] = total;
            }
#else
            const float weight = total == 0.0f ? 0.0f : 1.0f / total;
#endif
#pragma unroll
            for (int n = 0; n < 2 * PAIRS; ++n) {
                const int column = (warp * PAIRS + n / 2) * 16 + n % 2 * 8 + lane % 4 * 2;
                if (COLUMN_PAIRS % WARPS != 0 && column >= KV_LORA_RANK) continue;
#if SPLIT
                *reinterpret_cast<float2*>(partial_out + (at * splits + split) * KV_LORA_RANK + column) =
                    make_float2(o[m][n][2 * h], o[m][n][2 * h + 1]);
#else
                *reinterpret_cast<uint32_t*>(out + at * KV_LORA_RANK + column) =
                    pack_bf16(o[m][n][2 * h] * weight, o[m][n][2 * h + 1] * weight);
#endif
            }
        }
}
