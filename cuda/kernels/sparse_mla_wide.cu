// `sparse_mla` for 64 query rows that share their keys: 64 heads of a token, or 64 / TILE_TOKENS heads of neighbouring tokens over the
// union of their selections (`sparse_mla_union`).
//
// Eight warps, tiles of TILE_KEYS gathered rows. Queries stay in registers: warp (block, half) holds 16 of the query rows and half of
// their columns, so a key tile is all that shared memory must hold, and the next one arrives meanwhile. Scores: each warp multiplies its
// part with all keys; the two halves of a block exchange, and each keeps the sums of half of the keys. Values: each warp owns an eighth
// of the latent columns of all query rows.
//
// The maximum that weights are relative to follows the true one only when it falls behind by 2^LAG: the output does not depend on it, and
// few tiles then rescale what has been accumulated.
#include "sparse_mla.cuh"

constexpr int QUERIES = 64, WARPS = 8, THREADS = 32 * WARPS, BLOCKS = QUERIES / 16;
constexpr int KEYS = TILE_KEYS, STAGES = TILE_STAGES, HALF_KEYS = KEYS / 2, SCORES = HALF_KEYS / 8;
constexpr int WIDTH = KV_LORA_RANK + ROPE_DIM, STEPS = WIDTH / 16, HALF_STEPS = (STEPS + 1) / 2;
constexpr int HEADS = QUERIES / TILE_TOKENS;
constexpr int COLUMN_PAIRS = KV_LORA_RANK / 16, PAIRS = (COLUMN_PAIRS + WARPS - 1) / WARPS;
// 16 bytes behind a row keep eight rows of a matrix off each other's banks.
constexpr int KEY_STRIDE = WIDTH + 8, P_STRIDE = KEYS + 8;
// 16-byte chunks of a row; those that 32 lanes at a time leave over are copied for several rows at a time.
constexpr int CHUNKS = WIDTH / 8, ROWS_PER_WARP = KEYS / WARPS, REST = CHUNKS % 32;
constexpr int REST_ROWS = REST == 0 ? 1 : REST <= 8 ? 4 : REST <= 16 ? 2 : 1;
constexpr int PIECES = ROWS_PER_WARP + (REST == 0 ? 0 : ROWS_PER_WARP / REST_ROWS);
constexpr float LAG = 8.0f;

static_assert(KEYS % 32 == 0 && STAGES >= 2 && STAGES * KEYS >= QUERIES + KEYS, "the queries pass through the last stages");
static_assert(KV_LORA_RANK % 16 == 0 && ROPE_DIM % 16 == 0 && QUERIES % TILE_TOKENS == 0 && TILE_TOKENS <= 8, "dims");

struct Shared {
    uint16_t keys[STAGES * KEYS][KEY_STRIDE];
    // A half's scores for the other half; then, in the place of both, the block's weights.
    float4 exchange[BLOCKS][2][SCORES][32];
    float maxima[2][QUERIES];
    float factors[QUERIES];
    uint8_t members[STAGES][KEYS];
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher's sum");
static_assert(16 * P_STRIDE * 2 <= sizeof(Shared::exchange) / BLOCKS, "weights fit their block's exchange");

#if TILE_TOKENS > 1
// A cache row and the tokens that it belongs to; a negative number for none.
struct Row {
    int entry;
    DEVICE int slot(int) const { return entry < 0 ? -1 : entry >> 8; }
    DEVICE uint8_t members() const { return entry < 0 ? 0 : entry & 0xff; }
};
#else
// A page, under way, and the row in it; -1 for none.
struct Row {
    int page, row;
    DEVICE int slot(int page_size) const { return row < 0 ? -1 : page * page_size + row; }
    DEVICE uint8_t members() const { return row < 0 ? 0 : 1; }
};
#endif

// Where a token group's keys come from, and which of them come next. Places count through all groups' lists.
struct Keys {
    const int32_t* entries;
    const int32_t* block_table;
    const uint16_t* cache;
    int page_size, first_block;
    // This lane's row of the tile that is gathered next; its place in the tile after that, and the entry there.
    Row row;
    int place, end_place, entry;
    // The tile that is gathered now.
    int slot;
    uint16_t (*target)[KEY_STRIDE];

    DEVICE Row find(int entry) const {
#if TILE_TOKENS > 1
        return {entry};
#else
        if (entry < 0) return {0, -1};
        const uint32_t position = entry, block = position / static_cast<uint32_t>(page_size);
        return {__ldg(block_table + first_block + block), static_cast<int>(position - block * page_size)};
#endif
    }

    // One tile on. Where the list has ended the entry is left as it was: a load and a constant would meet in a copy, which waits for the
    // load.
    DEVICE void advance() {
        row = find(place < end_place ? entry : -1);
        place += KEYS;
        if (place < end_place) entry = __ldg(entries + place);
    }

    // A gather is `begin`, PIECES pieces, a commit and `advance`.
    DEVICE void begin(Shared& shared, int stage, int warp, int lane) {
        slot = row.slot(page_size);
        target = shared.keys + stage * KEYS + warp * ROWS_PER_WARP;
        if (lane < ROWS_PER_WARP) shared.members[stage][warp * ROWS_PER_WARP + lane] = row.members();
    }

    DEVICE void copy(int my_row, int chunk, bool lane_copies) const {
        const int from = __shfl_sync(ALL, slot, my_row);
        const uint16_t* source = cache + static_cast<int64_t>(max(from, 0)) * WIDTH + chunk * 8;
        if (!lane_copies) return;
        if (TILE_L1)
            cp_async_16_or_zero_l1(target[my_row] + chunk * 8, source, from >= 0);
        else
            cp_async_16_or_zero(target[my_row] + chunk * 8, source, from >= 0);
    }

    DEVICE void piece(int i, int lane) const {
        if (i < ROWS_PER_WARP) {
#pragma unroll
            for (int c = 0; c < CHUNKS / 32; ++c) copy(i, c * 32 + lane, true);
        } else {
            constexpr int LANES = 32 / REST_ROWS;
            copy((i - ROWS_PER_WARP) * REST_ROWS + lane / LANES, CHUNKS / 32 * 32 + lane % LANES, lane % LANES < REST);
        }
    }

    DEVICE void gather(Shared& shared, int stage, int warp, int lane) {
        begin(shared, stage, warp, lane);
#pragma unroll
        for (int i = 0; i < PIECES; ++i) piece(i, lane);
        cp_async_commit();
        advance();
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

// 16 queries x HALF_KEYS keys, over the warp's half of the columns; between them, pieces of the next tile's gather.
template <int END_PIECE>
DEVICE void score(float (&s)[SCORES][4], const uint32_t (&queries)[HALF_STEPS][4], const uint16_t* keys, const Keys& next, int lane) {
#pragma unroll
    for (int n = 0; n < SCORES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = 0.0f;
#pragma unroll
    for (int step = 0; step < HALF_STEPS; ++step) {
#pragma unroll
        for (int i = step * END_PIECE / HALF_STEPS; i < (step + 1) * END_PIECE / HALF_STEPS; ++i) next.piece(i, lane);
#pragma unroll
        for (int n = 0; n < SCORES; n += 2) {
            uint32_t b[4];
            ldmatrix_x4(b, keys + n * 8 * KEY_STRIDE + step * 16);
            mma_bf16(s[n], queries[step], {b[0], b[1]});
            mma_bf16(s[n + 1], queries[step], {b[2], b[3]});
        }
    }
}

// `q` [T, H, WIDTH]; `cache` rows of WIDTH; `entries` [T, k] positions or, of a group of tokens, `row << 8 | members` (`counts` of them in
// `k` places); `out` [T, H, KV_LORA_RANK], or with SPLIT the partial results of a range of tiles. A group with more than `most` entries is
// left alone.
KERNEL void __launch_bounds__(THREADS, 1)
sparse_mla_wide(const uint16_t* q, const uint16_t* cache, const int32_t* entries, const int32_t* counts, const int32_t* seq_ids,
                const int32_t* block_table, uint16_t* out, float* partial_out, float* partial_max, float* partial_sum, int tokens,
                int heads, int k, int page_size, int max_blocks, int most, float scale_log2) {
    Shared& shared = shared_memory<Shared>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = warp % BLOCKS, half = warp / BLOCKS;
    const int group = blockIdx.x, first_token = group * TILE_TOKENS, first_head = blockIdx.y * HEADS;
    const uint32_t splits = gridDim.z, split = blockIdx.z;

#if TILE_TOKENS > 1
    const int count = counts[group], first_block = 0;
    if (count > most) return;
#else
    const int count = k, first_block = seq_ids[first_token] * max_blocks;
#endif
    const uint32_t all_tiles = (count + KEYS - 1) / KEYS;
    const int first_tile = all_tiles * split / splits, end_tile = all_tiles * (split + 1) / splits;
    const int first_place = group * k, place = first_place + first_tile * KEYS + warp * ROWS_PER_WARP + lane % ROWS_PER_WARP;
    const int end_place = first_place + min(count, end_tile * KEYS);
    const int first_entry = place < end_place ? __ldg(entries + place) : -1;
    Keys next = {entries, block_table, cache, page_size, first_block, {}, place + KEYS, end_place, -1};
    if (next.place < end_place) next.entry = __ldg(entries + next.place);

    uint16_t(*staging)[KEY_STRIDE] = shared.keys + STAGES * KEYS - QUERIES;
    load_queries(staging, q, first_token, tokens, first_head, heads);
    cp_async_commit();
    next.row = next.find(first_entry);
    next.gather(shared, 0, warp, lane);
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
        for (int i = 1; i < STAGES - 1; ++i) next.gather(shared, i, warp, lane);
    }

    float o[BLOCKS][2 * PAIRS][4];
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
        for (int n = 0; n < 2 * PAIRS; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) o[m][n][i] = 0.0f;
    float reference[2] = {negative_infinity(), negative_infinity()}, sum[2] = {0.0f, 0.0f};
    const int query = block * 16 + lane / 4;

    int stage = 0;
    for (int tile = first_tile; tile < end_tile; ++tile, stage = stage + 1 == STAGES ? 0 : stage + 1) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        next.begin(shared, stage == 0 ? STAGES - 1 : stage - 1, warp, lane);
        const uint32_t some = lane < KEYS / 4 ? reinterpret_cast<const uint32_t*>(shared.members[stage])[lane] : 0;
        if (!__any_sync(ALL, some != 0)) {
#pragma unroll
            for (int i = 0; i < PIECES; ++i) next.piece(i, lane);
            cp_async_commit();
            next.advance();
            continue;
        }

        const uint16_t(*keys)[KEY_STRIDE] = shared.keys + stage * KEYS;
        const uint16_t* key_lane = keys[lane % 8 + lane / 16 * 8] + first_step * 16 + lane / 8 % 2 * 8;
        float s[SCORES][4];
        score<0>(s, queries, key_lane + (1 - half) * HALF_KEYS * KEY_STRIDE, next, lane);
#pragma unroll
        for (int n = 0; n < SCORES; ++n) shared.exchange[block][half][n][lane] = make_float4(s[n][0], s[n][1], s[n][2], s[n][3]);
        score<PIECES>(s, queries, key_lane + half * HALF_KEYS * KEY_STRIDE, next, lane);
        cp_async_commit();
        // On either side of the barrier, where registers suffice for it.
        if (TILE_TOKENS > 1) next.advance();
        named_barrier(1 + block, 64);
        if (TILE_TOKENS == 1) next.advance();

        // With 8 heads a token, rows 8 to 15 of a block are another token's than rows 0 to 7.
        const uint32_t low_bit = 1u << block * 2 * TILE_TOKENS / 8, high_bit = 1u << (block * 2 + 1) * TILE_TOKENS / 8;
        float most_low = negative_infinity(), most_high = negative_infinity();
#pragma unroll
        for (int n = 0; n < SCORES; ++n) {
            const float4 other = shared.exchange[block][1 - half][n][lane];
            const uint32_t members = *reinterpret_cast<const uint16_t*>(&shared.members[stage][half * HALF_KEYS + n * 8 + lane % 4 * 2]);
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
            shared.maxima[half][query] = most_low;
            shared.maxima[half][query + 8] = most_high;
        }
        named_barrier(1 + block, 64);
        bool rescaled = false;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float most_now = fmaxf(h == 0 ? most_low : most_high, shared.maxima[1 - half][query + h * 8]);
            float factor = 1.0f;
            if (most_now > reference[h] + LAG) {
                factor = exp2_approx(reference[h] - most_now);
                reference[h] = most_now;
                rescaled = true;
            }
            if (half == 0 && lane % 4 == 0) shared.factors[query + h * 8] = factor;
            const float base = finite_base(reference[h]);
            sum[h] *= factor;
#pragma unroll
            for (int n = 0; n < SCORES; ++n) {
                const float p0 = exp2_approx(s[n][2 * h] - base), p1 = exp2_approx(s[n][2 * h + 1] - base);
                sum[h] += p0 + p1;
                uint16_t* weights = reinterpret_cast<uint16_t*>(shared.exchange[block]) + (lane / 4 + h * 8) * P_STRIDE;
                *reinterpret_cast<uint32_t*>(weights + half * HALF_KEYS + n * 8 + lane % 4 * 2) = pack_bf16(p0, p1);
            }
        }
        if (__syncthreads_or(rescaled)) {
#pragma unroll
            for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float factor = shared.factors[m * 16 + h * 8 + lane / 4];
#pragma unroll
                    for (int n = 0; n < 2 * PAIRS; ++n) o[m][n][2 * h] *= factor, o[m][n][2 * h + 1] *= factor;
                }
        }
#pragma unroll
        for (int step = 0; step < KEYS / 16; ++step) {
            uint32_t values[PAIRS][4];
#pragma unroll
            for (int pair = 0; pair < PAIRS; ++pair)
                if (COLUMN_PAIRS % WARPS == 0 || warp * PAIRS + pair < COLUMN_PAIRS)
                    ldmatrix_x4_trans(values[pair], keys[step * 16 + lane % 16] + (warp * PAIRS + pair) * 16 + lane / 16 * 8);
#pragma unroll
            for (int m = 0; m < BLOCKS; ++m) {
                const uint16_t* weights = reinterpret_cast<const uint16_t*>(shared.exchange[m]) + lane % 16 * P_STRIDE;
                uint32_t p[4];
                ldmatrix_x4(p, weights + step * 16 + lane / 16 * 8);
#pragma unroll
                for (int pair = 0; pair < PAIRS; ++pair)
                    if (COLUMN_PAIRS % WARPS == 0 || warp * PAIRS + pair < COLUMN_PAIRS) {
                        mma_bf16(o[m][2 * pair], p, {values[pair][0], values[pair][1]});
                        mma_bf16(o[m][2 * pair + 1], p, {values[pair][2], values[pair][3]});
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
            shared.maxima[half][query + h * 8] = sum[h];
            if (half == 0) shared.factors[query + h * 8] = reference[h];
        }
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int my_query = m * 16 + h * 8 + lane / 4, token = first_token + my_query / HEADS, head = first_head + my_query % HEADS;
            if (token >= tokens || head >= heads) continue;
            const float total = shared.maxima[0][my_query] + shared.maxima[1][my_query];
            const int64_t at = static_cast<int64_t>(token) * heads + head;
#if SPLIT
            if (warp == 0 && lane % 4 == 0) {
                partial_max[at * splits + split] = shared.factors[my_query];
                partial_sum[at * splits + split] = total;
            }
#else
            const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
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
                    pack_bf16(o[m][n][2 * h] * inverse, o[m][n][2 * h + 1] * inverse);
#endif
            }
        }
}
