// `sparse_mla` for 64 query rows that share their keys: 64 heads of a token, or 64 / TILE_TOKENS heads of neighbouring tokens over the
// union of their selections (`sparse_mla_union`).
//
// Eight warps, tiles of 32 gathered rows. Queries stay in registers: warp (block, half) holds 16 of the query rows and half of their
// columns, so shared memory is left to the keys. Scores: each warp multiplies its part with all keys of a tile; the two halves of a block
// exchange, and each keeps the sums of half of the keys. Values: each warp owns an eighth of the latent columns of all query rows.
//
// Scores are bound by shared memory, weights by latency, values by the tensor cores: so the weights of tile i are computed between the
// products of tile i + 1, and tile i + STAGES - 1 is gathered between those of the values of tile i.
//
// The maximum that weights are relative to follows the true one only when it falls behind by 2^LAG: the output does not depend on it, and
// few tiles then rescale what has been accumulated.
#include "sparse_mla.cuh"

constexpr int QUERIES = 64, WARPS = 8, THREADS = 32 * WARPS, BLOCKS = QUERIES / 16;
constexpr int KEYS = 32, STAGES = TILE_STAGES, HALF_KEYS = KEYS / 2, SCORES = HALF_KEYS / 8;
constexpr int WIDTH = KV_LORA_RANK + ROPE_DIM, STEPS = WIDTH / 16, HALF_STEPS = (STEPS + 1) / 2;
constexpr int HEADS = QUERIES / TILE_TOKENS;
constexpr int COLUMN_PAIRS = KV_LORA_RANK / 16, PAIRS = (COLUMN_PAIRS + WARPS - 1) / WARPS;
// 16 bytes behind a row keep eight rows of a matrix off each other's banks; which tokens the row belongs to is noted there.
constexpr int KEY_STRIDE = WIDTH + 8, MEMBERS = WIDTH;
// 16-byte chunks of a row; those that 32 lanes at a time leave over are copied for several rows at a time.
constexpr int CHUNKS = WIDTH / 8, ROWS_PER_WARP = KEYS / WARPS, REST = CHUNKS % 32;
constexpr int REST_ROWS = REST == 0 ? 1 : REST <= 8 ? 4 : REST <= 16 ? 2 : 1;
constexpr int PIECES = ROWS_PER_WARP + (REST == 0 ? 0 : ROWS_PER_WARP / REST_ROWS);
constexpr float LAG = 8.0f;

static_assert(STAGES >= 4, "one tile for values, one for scores, one arrived, one under way; the queries pass through the last two");
static_assert(KV_LORA_RANK % 16 == 0 && ROPE_DIM % 16 == 0 && QUERIES % TILE_TOKENS == 0 && TILE_TOKENS <= 8, "dims");

struct Shared {
    uint16_t keys[STAGES * KEYS][KEY_STRIDE];
    // A half's scores for the other half.
    float4 exchange[BLOCKS][2][SCORES][32];
    // The weights of the tile whose values are next, and of the tile after.
    uint16_t weights[2][QUERIES][KEYS];
    float factors[2][QUERIES];
    float maxima[2][QUERIES];
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher's sum");

// Eight keys' weights of a query, where eight rows of a matrix are off each other's banks.
DEVICE uint16_t* weight_chunk(uint16_t (*weights)[KEYS], int query, int chunk) { return weights[query] + (chunk ^ (query / 2 & 3)) * 8; }

#if TILE_TOKENS > 1
// A cache row and the tokens that it belongs to; a negative number for none.
struct Row {
    int entry;
    DEVICE int slot(int) const { return entry < 0 ? -1 : entry >> 8; }
    DEVICE uint16_t members() const { return entry < 0 ? 0 : entry & 0xff; }
};
#else
// A page, under way, and the row in it; -1 for none.
struct Row {
    int page, row;
    DEVICE int slot(int page_size) const { return row < 0 ? -1 : page * page_size + row; }
    DEVICE uint16_t members() const { return row < 0 ? 0 : 1; }
};
#endif

// Where a token group's keys come from, and which of them come next. Places are those of all groups' lists.
struct Keys {
    const int32_t* entries;
    const int32_t* block_table;
    const uint16_t* cache;
    int page_size, first_block;
    // This lane's place in the tile whose entries are read next, and the end of the list.
    int place, end_place;
    // The tile that is gathered next: this lane's row of it; the entry of the tile after that.
    Row row;
    int entry;
    // The tile that is gathered now.
    int slot;
    uint16_t (*target)[KEY_STRIDE];

    DEVICE void advance() {
#if TILE_TOKENS > 1
        row = {entry};
#else
        row = {0, -1};
        if (entry >= 0) {
            const uint32_t position = entry, block = position / static_cast<uint32_t>(page_size);
            row = {__ldg(block_table + first_block + block), static_cast<int>(position - block * page_size)};
        }
#endif
        entry = place < end_place ? __ldg(entries + place) : -1;
        place += KEYS;
    }

    DEVICE void start() {
        entry = place < end_place ? __ldg(entries + place) : -1;
        place += KEYS;
        advance();
    }

    // The gather of the next tile: in PIECES pieces between `begin` and `end`.
    DEVICE void begin(Shared& shared, int stage, int warp, int lane) {
        slot = row.slot(page_size);
        target = shared.keys + stage * KEYS + warp * ROWS_PER_WARP;
        if (lane < ROWS_PER_WARP) target[lane][MEMBERS] = row.members();
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
            constexpr int LANES = 32 / REST_ROWS;
            copy((i - ROWS_PER_WARP) * REST_ROWS + lane / LANES, CHUNKS / 32 * 32 + lane % LANES, lane % LANES < REST);
        }
    }

    DEVICE void end() {
        cp_async_commit();
        advance();
    }

    DEVICE void gather(Shared& shared, int stage, int warp, int lane) {
        begin(shared, stage, warp, lane);
#pragma unroll
        for (int i = 0; i < PIECES; ++i) piece(i, lane);
        end();
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

// One warp's share of the scores and weights.
struct Scores {
    uint32_t queries[HALF_STEPS][4];
    // The products of the tile under way: 16 queries x the other half's keys, then its own; sums over the warp's half of the columns.
    float products[2 * SCORES][4];
    // The tile before: scores (log2) of the warp's own keys.
    float s[SCORES][4];
    float reference[2], sum[2], most[2];

    DEVICE void begin() {
#pragma unroll
        for (int n = 0; n < 2 * SCORES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) products[n][i] = 0.0f;
    }

    DEVICE void step(int step, const uint16_t* others_keys, const uint16_t* own_keys) {
#pragma unroll
        for (int n = 0; n < 2 * SCORES; n += 2) {
            uint32_t b[4];
            ldmatrix_x4(b, (n < SCORES ? others_keys + n * 8 * KEY_STRIDE : own_keys + (n - SCORES) * 8 * KEY_STRIDE) + step * 16);
            mma_bf16(products[n], queries[step], {b[0], b[1]});
            mma_bf16(products[n + 1], queries[step], {b[2], b[3]});
        }
    }

    DEVICE void end(float4 (&mine)[SCORES][32], int lane) {
#pragma unroll
        for (int n = 0; n < SCORES; ++n) {
            mine[n][lane] = make_float4(products[n][0], products[n][1], products[n][2], products[n][3]);
#pragma unroll
            for (int i = 0; i < 4; ++i) s[n][i] = products[SCORES + n][i];
        }
    }

    // Adds the other half's products of 8 keys; `keys` is the first of this lane's two.
    DEVICE void add(int n, float4 other, const uint16_t (*keys)[KEY_STRIDE], uint32_t low_bit, uint32_t high_bit, float scale_log2) {
        const uint32_t first = keys[n * 8][MEMBERS], second = keys[n * 8 + 1][MEMBERS];
        s[n][0] = first & low_bit ? (s[n][0] + other.x) * scale_log2 : negative_infinity();
        s[n][1] = second & low_bit ? (s[n][1] + other.y) * scale_log2 : negative_infinity();
        s[n][2] = first & high_bit ? (s[n][2] + other.z) * scale_log2 : negative_infinity();
        s[n][3] = second & high_bit ? (s[n][3] + other.w) * scale_log2 : negative_infinity();
    }

    DEVICE void find_most() {
        most[0] = most[1] = negative_infinity();
#pragma unroll
        for (int n = 0; n < SCORES; ++n)
#pragma unroll
            for (int h = 0; h < 2; ++h) most[h] = fmaxf(most[h], fmaxf(s[n][2 * h], s[n][2 * h + 1]));
    }

    DEVICE void share_most(int distance) {
#pragma unroll
        for (int h = 0; h < 2; ++h) most[h] = fmaxf(most[h], __shfl_xor_sync(ALL, most[h], distance));
    }

    // Moves the reference of query h * 8 to `most_now` where it has fallen behind, and returns what that multiplies earlier weights with.
    DEVICE float follow(int h, float most_now) {
        if (!(most_now > reference[h] + LAG)) return 1.0f;
        const float factor = exp2_approx(reference[h] - most_now);
        reference[h] = most_now;
        sum[h] *= factor;
        return factor;
    }

    DEVICE uint32_t weigh(int n, int h) {
        const float base = finite_base(reference[h]);
        const float first = exp2_approx(s[n][2 * h] - base), second = exp2_approx(s[n][2 * h + 1] - base);
        sum[h] += first + second;
        return pack_bf16(first, second);
    }
};

// `q` [T, H, WIDTH]; `cache` rows of WIDTH; `entries` [T, k] positions or, of a group of tokens, `row << 8 | members` (`counts` of them in
// `k` places); `out` [T, H, KV_LORA_RANK], or with SPLIT the partial results of a range of tiles. A group with more than `most` entries is
// left alone.
KERNEL void __launch_bounds__(THREADS, 1)
sparse_mla_wide(const uint16_t* q, const uint16_t* cache, const int32_t* entries, const int32_t* counts, const int32_t* positions,
                const int32_t* seq_ids, const int32_t* block_table, uint16_t* out, float* partial_out, float* partial_max, float* partial_sum,
                int tokens, int heads, int k, int page_size, int max_blocks, int most, float scale_log2) {
    Shared& shared = shared_memory<Shared>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = warp % BLOCKS, half = warp / BLOCKS;
    const int group = blockIdx.x, first_token = group * TILE_TOKENS, first_head = blockIdx.y * HEADS;
    const int splits = gridDim.z, split = blockIdx.z;

    const int first_place = group * k;
#if TILE_TOKENS > 1
    const int count = counts[group];
    if (count > most) return;
    const int first_block = 0;
#else
    const int first_block = seq_ids[first_token] * max_blocks;
    // A token that sees fewer rows than it has places ends in holes.
    int count = k;
    if (positions[first_token] + 1 < k)
        for (const int thread = threadIdx.x;
             count > 0 && !__syncthreads_or(thread < count && __ldg(entries + first_place + count - 1 - thread) >= 0);)
            count = max(count - THREADS, 0);
#endif
    const int all_tiles = (count + KEYS - 1) / KEYS;
    const int first_tile = static_cast<int>(static_cast<int64_t>(all_tiles) * split / splits);
    const int tiles = static_cast<int>(static_cast<int64_t>(all_tiles) * (split + 1) / splits) - first_tile;
    const int place = first_place + first_tile * KEYS + warp * ROWS_PER_WARP + lane % ROWS_PER_WARP;
    Keys next = {entries, block_table, cache, page_size, first_block, place, first_place + min(count, (first_tile + tiles) * KEYS)};
    next.start();

    uint16_t(*staging)[KEY_STRIDE] = shared.keys + STAGES * KEYS - QUERIES;
    load_queries(staging, q, first_token, tokens, first_head, heads);
    cp_async_commit();
    next.gather(shared, 0, warp, lane);
    next.gather(shared, 1, warp, lane);
    cp_async_wait<2>();
    __syncthreads();
    Scores scores;
    // With an odd number of steps the middle one is the first half's: the second multiplies it with zeros.
    const int first_step = half == 0 ? 0 : STEPS - HALF_STEPS;
#pragma unroll
    for (int step = 0; step < HALF_STEPS; ++step)
        ldmatrix_x4(scores.queries[step], staging[block * 16 + lane % 16] + (first_step + step) * 16 + lane / 16 * 8);
    if (STEPS % 2 != 0 && half != 0)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores.queries[0][i] = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) scores.reference[h] = negative_infinity(), scores.sum[h] = 0.0f;
    cp_async_wait<1>();
    __syncthreads();
#pragma unroll
    for (int i = 2; i < STAGES - 1; ++i) next.gather(shared, i, warp, lane);

    float o[BLOCKS][2 * PAIRS][4];
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
        for (int n = 0; n < 2 * PAIRS; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) o[m][n][i] = 0.0f;

    // With 8 heads a token, rows 8 to 15 of a block are another token's than rows 0 to 7.
    const uint32_t low_bit = 1u << block * 2 * TILE_TOKENS / 8, high_bit = 1u << (block * 2 + 1) * TILE_TOKENS / 8;
    const int query = block * 16 + lane / 4, lane_key = half * HALF_KEYS + lane % 4 * 2;
    const int key_offset = (lane % 8 + lane / 16 * 8) * KEY_STRIDE + first_step * 16 + lane / 8 % 2 * 8;

    // The scores of the first tile; those of the others come with the weights of the tile before.
    {
        const uint16_t* keys = shared.keys[0] + key_offset;
        scores.begin();
#pragma unroll
        for (int step = 0; step < HALF_STEPS; ++step)
            scores.step(step, keys + (1 - half) * HALF_KEYS * KEY_STRIDE, keys + half * HALF_KEYS * KEY_STRIDE);
        scores.end(shared.exchange[block][half], lane);
    }
    cp_async_wait<STAGES - 3>();
    __syncthreads();

    int stage = 0;
    for (int remaining = tiles; remaining > 0; --remaining) {
        const int parity = remaining % 2, next_stage = stage + 1 == STAGES ? 0 : stage + 1;
        const uint16_t* next_keys = shared.keys[next_stage * KEYS] + key_offset;
        const uint16_t* others_keys = next_keys + (1 - half) * HALF_KEYS * KEY_STRIDE;
        const uint16_t* own_keys = next_keys + half * HALF_KEYS * KEY_STRIDE;
        uint16_t(*weights)[KEYS] = shared.weights[parity];
        bool rescaled = false;

        const auto first_part = [&](int step) {
            if (step < SCORES) scores.add(step, shared.exchange[block][1 - half][step][lane], shared.keys + stage * KEYS + lane_key, low_bit, high_bit, scale_log2);
            if (step == SCORES) scores.find_most();
            if (step == SCORES) scores.share_most(1);
            if (step == SCORES + 1) scores.share_most(2);
            if (step == SCORES + 1 && lane % 4 == 0) {
                shared.maxima[half][query] = scores.most[0];
                shared.maxima[half][query + 8] = scores.most[1];
            }
        };
        const auto second_part = [&](int step) {
            if (step < 2) {
                const float factor = scores.follow(step, fmaxf(scores.most[step], shared.maxima[1 - half][query + step * 8]));
                rescaled |= factor != 1.0f;
                if (half == 0 && lane % 4 == 0) shared.factors[parity][query + step * 8] = factor;
            }
            if (step >= 2 && step < 2 + 2 * SCORES) {
                const int n = (step - 2) / 2, h = step % 2;
                uint16_t* chunk = weight_chunk(weights, query + h * 8, half * SCORES + n);
                *reinterpret_cast<uint32_t*>(chunk + lane % 4 * 2) = scores.weigh(n, h);
            }
        };
        constexpr int FIRST_STEPS = HALF_STEPS / 2, PARTS = 2 + 2 * SCORES;
        if (remaining > 1) {
            scores.begin();
#pragma unroll
            for (int step = 0; step < FIRST_STEPS || step < SCORES + 2; ++step) {
                if (step < FIRST_STEPS) scores.step(step, others_keys, own_keys);
                first_part(step);
            }
            named_barrier(1 + block, 64);
#pragma unroll
            for (int step = 0; step < HALF_STEPS - FIRST_STEPS || step < PARTS; ++step) {
                if (step < HALF_STEPS - FIRST_STEPS) scores.step(FIRST_STEPS + step, others_keys, own_keys);
                second_part(step);
            }
            scores.end(shared.exchange[block][half], lane);
        } else {
#pragma unroll
            for (int step = 0; step < SCORES + 2; ++step) first_part(step);
            named_barrier(1 + block, 64);
#pragma unroll
            for (int step = 0; step < PARTS; ++step) second_part(step);
        }

        cp_async_wait<STAGES - 4>();
        if (__syncthreads_or(rescaled)) {
#pragma unroll
            for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float factor = shared.factors[parity][m * 16 + h * 8 + lane / 4];
#pragma unroll
                    for (int n = 0; n < 2 * PAIRS; ++n) o[m][n][2 * h] *= factor, o[m][n][2 * h + 1] *= factor;
                }
        }

        next.begin(shared, stage == 0 ? STAGES - 1 : stage - 1, warp, lane);
        constexpr int PLACES = KEYS / 16 * BLOCKS;
#pragma unroll
        for (int step = 0; step < KEYS / 16; ++step) {
            uint32_t values[PAIRS][4];
#pragma unroll
            for (int pair = 0; pair < PAIRS; ++pair)
                if (COLUMN_PAIRS % WARPS == 0 || warp * PAIRS + pair < COLUMN_PAIRS)
                    ldmatrix_x4_trans(values[pair], shared.keys[stage * KEYS + step * 16 + lane % 16] + (warp * PAIRS + pair) * 16 + lane / 16 * 8);
#pragma unroll
            for (int m = 0; m < BLOCKS; ++m) {
                uint32_t p[4];
                ldmatrix_x4(p, weight_chunk(weights, m * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
                for (int pair = 0; pair < PAIRS; ++pair)
                    if (COLUMN_PAIRS % WARPS == 0 || warp * PAIRS + pair < COLUMN_PAIRS) {
                        mma_bf16(o[m][2 * pair], p, {values[pair][0], values[pair][1]});
                        mma_bf16(o[m][2 * pair + 1], p, {values[pair][2], values[pair][3]});
                    }
                const int place = step * BLOCKS + m;
#pragma unroll
                for (int i = place * PIECES / PLACES; i < (place + 1) * PIECES / PLACES; ++i) next.piece(i, lane);
            }
        }
        next.end();
        stage = next_stage;
    }

    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        scores.sum[h] += __shfl_xor_sync(ALL, scores.sum[h], 1);
        scores.sum[h] += __shfl_xor_sync(ALL, scores.sum[h], 2);
        if (lane % 4 == 0) {
            shared.maxima[half][query + h * 8] = scores.sum[h];
            if (half == 0) shared.factors[0][query + h * 8] = scores.reference[h];
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
                partial_max[at * splits + split] = shared.factors[0][my_query];
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
