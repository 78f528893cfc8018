// Attention of a chunk of one sequence over keys and values that were expanded out of the latent rows, for all positions up to the last
// query's; which of them a token has selected says its row of bits (`expanded_mla_rows`).
//
// A block takes QUERIES neighbouring tokens of one head, a warp 16 of them; tiles of KEYS positions. Queries stay in shared memory, the
// keys of the next tile arrive while the values of this one are multiplied, and its values while its keys are. Blocks with the most keys
// come first.
//
// The maximum that weights are relative to follows the true one only when it falls behind by 2^LAG: the output does not depend on it, and
// few tiles then rescale what has been accumulated.
//
// Constants: NOPE, ROPE, V_DIM columns of a head. Tile: TILE_WARPS, TILE_KEYS.
//
// Arithmetic: both products and the sums of weights in f32; weights, relative to the maximum, are rounded to bf16 for the second product.
#include "sparse_mla.cuh"

constexpr int WARPS = TILE_WARPS, THREADS = 32 * WARPS, QUERIES = 16 * WARPS, KEYS = TILE_KEYS;
constexpr int WIDTH = NOPE + ROPE, EXPANDED = NOPE + V_DIM, STEPS = (WIDTH + 15) / 16, PAIRS = V_DIM / 16, SCORES = KEYS / 8;
// 16-byte chunks of a query or key; those beyond its columns fill the last step with zeros.
constexpr int CHUNKS = 2 * STEPS;
// 16 bytes behind a row keep eight rows of a matrix off each other's banks.
constexpr int KEY_STRIDE = 16 * STEPS + 8, VALUE_STRIDE = V_DIM + 8;
constexpr float LAG = 8.0f;

static_assert(NOPE % 8 == 0 && ROPE % 8 == 0 && V_DIM % 16 == 0 && KEYS % 32 == 0, "whole vectors, pairs of columns, words of bits");

struct Shared {
    uint16_t queries[QUERIES][KEY_STRIDE];
    uint16_t keys[KEYS][KEY_STRIDE];
    uint16_t values[KEYS][VALUE_STRIDE];
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher's sum");

struct Source {
    const uint16_t* expanded;  // [context, heads, NOPE + V_DIM], at the head
    const uint16_t* rotary;    // [context, ROPE]
    int heads, context;

    DEVICE const uint16_t* row(int position) const { return expanded + static_cast<int64_t>(position) * (heads * EXPANDED); }

    // Rows beyond the context are zeros.
    DEVICE void copy_keys(Shared& shared, int first) const {
        for (int i = threadIdx.x; i < KEYS * CHUNKS; i += THREADS) {
            const int key = i / CHUNKS, column = i % CHUNKS * 8;
            const bool valid = first + key < context && column < WIDTH;
            const int position = valid ? first + key : 0, turned = valid ? max(column - NOPE, 0) : 0;
            const uint16_t* from = column < NOPE ? row(position) + column : rotary + static_cast<int64_t>(position) * ROPE + turned;
            cp_async_16_or_zero(shared.keys[key] + column, from, valid);
        }
        cp_async_commit();
    }

    DEVICE void copy_values(Shared& shared, int first) const {
        constexpr int OF_VALUE = V_DIM / 8;
        for (int i = threadIdx.x; i < KEYS * OF_VALUE; i += THREADS) {
            const int key = i / OF_VALUE, column = i % OF_VALUE * 8;
            const bool valid = first + key < context;
            cp_async_16_or_zero(shared.values[key] + column, row(valid ? first + key : 0) + NOPE + column, valid);
        }
        cp_async_commit();
    }
};

// Which keys of a tile the lane's columns of the scores stand for, of its two rows: bits 8 n and 8 n + 1 of word n / 4.
struct Members {
    uint32_t words[2][KEYS / 32];

    DEVICE void load(const uint32_t* const (&rows)[2], int tile, int lane) {
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int w = 0; w < KEYS / 32; ++w)
                words[h][w] = rows[h] == nullptr ? 0 : __ldg(rows[h] + tile * (KEYS / 32) + w) >> lane % 4 * 2;
    }

    DEVICE bool has(int h, int n, int column) const { return words[h][n / 4] >> (n % 4 * 8 + column) & 1; }

    DEVICE bool any() const {
        uint32_t all = 0;
#pragma unroll
        for (int w = 0; w < KEYS / 32; ++w) all |= words[0][w] | words[1][w];
        return (all & 0x03030303u) != 0;
    }
};

// `q` [T, heads, WIDTH]; `bits` [T, bit_words] of the first positions; `out` [T, heads, V_DIM]. The chunk's first token has
// `first_position`, and `context` is its last position + 1. Grid: heads, and blocks of queries.
KERNEL void __launch_bounds__(THREADS, 1)
expanded_mla(const uint16_t* q, const uint16_t* expanded, const uint16_t* rotary, const uint32_t* bits, uint16_t* out, int tokens,
             int heads, int context, int first_position, int bit_words, float scale_log2) {
    Shared& shared = shared_memory<Shared>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.x;
    const int first = static_cast<int>(gridDim.y - 1 - blockIdx.y) * QUERIES;
    const int end_position = min(context, first_position + min(first + QUERIES, tokens));
    const int tiles = (end_position + KEYS - 1) / KEYS;
    const Source source = {expanded + head * EXPANDED, rotary, heads, context};

    for (int i = threadIdx.x; i < QUERIES * CHUNKS; i += THREADS) {
        const int query = i / CHUNKS, column = i % CHUNKS * 8;
        const bool valid = first + query < tokens && column < WIDTH;
        const int64_t from = valid ? (static_cast<int64_t>(first + query) * heads + head) * WIDTH + column : 0;
        cp_async_16_or_zero(shared.queries[query] + column, q + from, valid);
    }
    source.copy_keys(shared, 0);

    const int token[2] = {first + warp * 16 + lane / 4, first + warp * 16 + lane / 4 + 8};
    const uint32_t* const rows[2] = {token[0] < tokens ? bits + static_cast<int64_t>(token[0]) * bit_words : nullptr,
                                     token[1] < tokens ? bits + static_cast<int64_t>(token[1]) * bit_words : nullptr};
    Members next;
    next.load(rows, 0, lane);

    const uint16_t* query_lane = shared.queries[warp * 16 + lane % 16] + lane / 16 * 8;
    const uint16_t* key_lane = shared.keys[lane % 8 + lane / 16 * 8] + lane / 8 % 2 * 8;
    const uint16_t* value_lane = shared.values[lane % 16] + lane / 16 * 8;
    float o[2 * PAIRS][4];
#pragma unroll
    for (int n = 0; n < 2 * PAIRS; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[n][i] = 0.0f;
    float reference[2] = {negative_infinity(), negative_infinity()}, sum[2] = {0.0f, 0.0f};

    for (int tile = 0; tile < tiles; ++tile) {
        cp_async_wait<0>();
        __syncthreads();
        source.copy_values(shared, tile * KEYS);
        const Members members = next;
        const bool some = __any_sync(ALL, members.any());
        uint32_t weights[SCORES][2];
        if (some) {
            float s[SCORES][4];
#pragma unroll
            for (int n = 0; n < SCORES; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) s[n][i] = 0.0f;
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                uint32_t a[4];
                ldmatrix_x4(a, query_lane + step * 16);
#pragma unroll
                for (int n = 0; n < SCORES; n += 2) {
                    uint32_t b[4];
                    ldmatrix_x4(b, key_lane + n * 8 * KEY_STRIDE + step * 16);
                    mma_bf16(s[n], a, {b[0], b[1]});
                    mma_bf16(s[n + 1], a, {b[2], b[3]});
                }
            }
            bool behind = false;
            float factor[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float most = negative_infinity();
#pragma unroll
                for (int n = 0; n < SCORES; ++n)
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        float& score = s[n][2 * h + c];
                        score = members.has(h, n, c) ? score * scale_log2 : negative_infinity();
                        most = fmaxf(most, score);
                    }
                most = fmaxf(most, __shfl_xor_sync(ALL, most, 1));
                most = fmaxf(most, __shfl_xor_sync(ALL, most, 2));
                factor[h] = 1.0f;
                if (most > reference[h] + LAG) {
                    factor[h] = exp2_approx(reference[h] - most);
                    reference[h] = most;
                    behind = true;
                }
                const float base = finite_base(reference[h]);
                sum[h] *= factor[h];
#pragma unroll
                for (int n = 0; n < SCORES; ++n) {
                    const float p0 = exp2_approx(s[n][2 * h] - base), p1 = exp2_approx(s[n][2 * h + 1] - base);
                    sum[h] += p0 + p1;
                    weights[n][h] = pack_bf16(p0, p1);
                }
            }
            if (__any_sync(ALL, behind)) {
#pragma unroll
                for (int n = 0; n < 2 * PAIRS; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) o[n][i] *= factor[i / 2];
            }
        }
        cp_async_wait<0>();
        __syncthreads();
        if (tile + 1 < tiles) {
            source.copy_keys(shared, (tile + 1) * KEYS);
            next.load(rows, tile + 1, lane);
        }
        if (!some) continue;
#pragma unroll
        for (int step = 0; step < KEYS / 16; ++step) {
            const uint32_t p[4] = {weights[2 * step][0], weights[2 * step][1], weights[2 * step + 1][0], weights[2 * step + 1][1]};
#pragma unroll
            for (int pair = 0; pair < PAIRS; ++pair) {
                uint32_t v[4];
                ldmatrix_x4_trans(v, value_lane + step * 16 * VALUE_STRIDE + pair * 16);
                mma_bf16(o[2 * pair], p, {v[0], v[1]});
                mma_bf16(o[2 * pair + 1], p, {v[2], v[3]});
            }
        }
    }

#pragma unroll
    for (int h = 0; h < 2; ++h) {
        sum[h] += __shfl_xor_sync(ALL, sum[h], 1);
        sum[h] += __shfl_xor_sync(ALL, sum[h], 2);
        if (token[h] >= tokens) continue;
        const float inverse = reciprocal_or_zero(sum[h]);
        uint16_t* row = out + (static_cast<int64_t>(token[h]) * heads + head) * V_DIM + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < 2 * PAIRS; ++n)
            *reinterpret_cast<uint32_t*>(row + n * 8) = pack_bf16(o[n][2 * h] * inverse, o[n][2 * h + 1] * inverse);
    }
}
