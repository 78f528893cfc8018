// Products of tiles: TILE_TOKENS rows of x with TILE_FEATURES features of a dense weight, 64 columns a step, through a ring of
// TILE_STAGES steps in shared memory. TILE_TOKEN_WARPS x TILE_FEATURE_WARPS warps share a tile. TILE_AHEAD: a warp holds two parts of a
// step.
//
// Constants: those of linear.cuh; TRANSPOSED: a weight lies as [columns, features], and is turned on its way to the tensor cores.
#pragma once

#include "linear.cuh"

constexpr int COLUMNS = 64;
constexpr int THREADS = 32 * TILE_TOKEN_WARPS * TILE_FEATURE_WARPS;
constexpr int WARP_TOKENS = TILE_TOKENS / TILE_TOKEN_WARPS, WARP_FEATURES = TILE_FEATURES / TILE_FEATURE_WARPS;
constexpr int M = WARP_TOKENS / 16, N = WARP_FEATURES / 8;
static_assert(TILE_TOKENS % (16 * TILE_TOKEN_WARPS) == 0 && TILE_FEATURES % (16 * TILE_FEATURE_WARPS) == 0, "whole matrices of a warp");
static_assert(TILE_STAGES >= 2, "one step is loaded while another is multiplied");

// A row of x, and of the weight as it lies, in vectors of 16 bytes.
constexpr int X_VECTORS = COLUMNS / 8;
constexpr int WEIGHT_ROWS = TRANSPOSED ? COLUMNS : TILE_FEATURES;
constexpr int WEIGHT_VECTORS = (TRANSPOSED ? TILE_FEATURES : COLUMNS) * WEIGHT_BYTES / 16;
static_assert(WEIGHT_VECTORS % 8 == 0, "eight rows of a matrix lie in different banks");

struct Stage {
    uint4 x[TILE_TOKENS * X_VECTORS];
    uint4 weight[WEIGHT_ROWS * WEIGHT_VECTORS];
};
// How `linear` shares out the steps of all tiles.
struct Stretches {
    int32_t steps, token_tiles, total, end;
};
struct Shared {
    Stage ring[TILE_STAGES];
    Stretches stretches;
    uint32_t last;
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher's sum");

// The operands of a head, and its part of the output.
struct Operands {
    const uint16_t* x;
    const int32_t* gathered;
    const uint8_t* weight;
    int x_rows, tokens, columns, features, x_stride;
};

// Where a vector lies: the eight rows that a matrix takes one from have it in eight different places.
template <int VECTORS_OF_ROW>
DEVICE int place(int row, int vector) {
    return row * VECTORS_OF_ROW + (vector ^ row & 7);
}

// A thread copies one vector of every so many rows.
constexpr int X_STRIDE = THREADS / X_VECTORS, WEIGHT_STRIDE = THREADS / WEIGHT_VECTORS;
constexpr int X_COPIES = (TILE_TOKENS + X_STRIDE - 1) / X_STRIDE, WEIGHT_COPIES = (WEIGHT_ROWS + WEIGHT_STRIDE - 1) / WEIGHT_STRIDE;
static_assert(THREADS % X_VECTORS == 0 && THREADS % WEIGHT_VECTORS == 0, "the same vector of each");

// The rows of x that a thread copies. Beyond the last token, and where `gathered` names none, some row serves: what becomes of it is not
// stored, or not defined.
DEVICE void find_rows(int32_t (&x_rows)[X_COPIES], const Operands& in, int first_token) {
#pragma unroll
    for (int i = 0; i < X_COPIES; ++i) {
        const int token = min(first_token + static_cast<int>(threadIdx.x) / X_VECTORS + i * X_STRIDE, in.tokens - 1);
        x_rows[i] = in.gathered == nullptr ? token : min(max(in.gathered[token], 0), in.x_rows - 1);
    }
}

// Starts a PARTS-th of the copies of the step from `column` on. They are spread over the products: their addresses would hold these up.
template <int PARTS>
DEVICE void load(Stage& stage, const int32_t (&x_rows)[X_COPIES], const Operands& in, int first_feature, int column, int part) {
    const int x_vector = threadIdx.x % X_VECTORS, weight_vector = threadIdx.x % WEIGHT_VECTORS;
#pragma unroll
    for (int i = 0; i < X_COPIES; ++i) {
        const int row = threadIdx.x / X_VECTORS + i * X_STRIDE;
        if (i % PARTS != part || (TILE_TOKENS % X_STRIDE != 0 && row >= TILE_TOKENS)) continue;
        const uint16_t* from = in.x + static_cast<int64_t>(x_rows[i]) * in.x_stride;
        copy_vector<2>(&stage.x[place<X_VECTORS>(row, x_vector)], from, column + 8 * x_vector, in.columns, true);
    }
    const int outer = TRANSPOSED ? column : first_feature, inner = TRANSPOSED ? first_feature : column;
    const int rows = TRANSPOSED ? in.columns : in.features, length = TRANSPOSED ? in.features : in.columns;
    const int vector = inner + weight_vector * (16 / WEIGHT_BYTES);
#pragma unroll
    for (int i = 0; i < WEIGHT_COPIES; ++i) {
        const int row = threadIdx.x / WEIGHT_VECTORS + i * WEIGHT_STRIDE;
        if (i % PARTS != part || (WEIGHT_ROWS % WEIGHT_STRIDE != 0 && row >= WEIGHT_ROWS)) continue;
        // Features beyond the last are not stored; columns beyond the last count.
        const bool valid = !TRANSPOSED || outer + row < rows;
        const uint8_t* from = in.weight + static_cast<int64_t>(min(outer + row, rows - 1)) * (length * WEIGHT_BYTES);
        copy_vector<WEIGHT_BYTES>(&stage.weight[place<WEIGHT_VECTORS>(row, weight_vector)], from, vector, length, valid);
    }
}

// The pieces of a fragment of 16 columns from `column` on and of the 8 features of each half of 16 from `feature` on.
DEVICE void load_weight(const Stage& stage, int feature, int column, int lane, uint32_t (&b)[2][PIECES][2]) {
    if constexpr (WEIGHT_TYPE == F32) {
        const float* floats = reinterpret_cast<const float*>(stage.weight);
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int f = feature + i / 2 * 8 + g, k = column + i % 2 * 8 + 2 * t;
            uint32_t pieces[PIECES];
            if constexpr (TRANSPOSED) {
                const float low = floats[4 * place<WEIGHT_VECTORS>(k, f / 4) + f % 4];
                split(low, floats[4 * place<WEIGHT_VECTORS>(k + 1, f / 4) + f % 4], pieces);
            } else {
                const float2 pair = *reinterpret_cast<const float2*>(floats + 4 * place<WEIGHT_VECTORS>(f, k / 4) + k % 4);
                split(pair.x, pair.y, pieces);
            }
#pragma unroll
            for (int piece = 0; piece < PIECES; ++piece) b[i / 2][piece][i % 2] = pieces[piece];
        }
    } else {
        // Lanes of eight give the rows of a matrix: the first columns of the first features, the next columns, the next features. Where
        // the vector lies that has a row's first columns does not depend on column or feature, and theirs are even: so they are added.
        const int half = lane / 8 % 2, next = lane / 16, row = lane % 8;
        uint32_t words[4];
        if constexpr (TRANSPOSED) {
            const int at = (8 * half + row) * WEIGHT_VECTORS + (next ^ row);
            ldmatrix_x4_trans(words, &stage.weight[column * WEIGHT_VECTORS + (at ^ feature / 8)]);
        } else {
            const int at = (8 * next + row) * WEIGHT_VECTORS + (half ^ row);
            ldmatrix_x4(words, &stage.weight[feature * WEIGHT_VECTORS + (at ^ column / 8)]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint32_t pieces[PIECES];
            split(words[i], pieces);
#pragma unroll
            for (int piece = 0; piece < PIECES; ++piece) b[i / 2][piece][i % 2] = pieces[piece];
        }
    }
}

// The fragment of 16 rows of x, from the warp's `m`-th 16 and `column` on.
DEVICE void load_x(const Stage& stage, int m, int column, uint32_t (&a)[4]) {
    const int lane = threadIdx.x % 32, token = threadIdx.x / 32 / TILE_FEATURE_WARPS * WARP_TOKENS;
    const int at = lane % 16 * X_VECTORS + (lane / 16 ^ lane % 8);
    ldmatrix_x4(a, &stage.x[(token + 16 * m) * X_VECTORS + (at ^ column / 8)]);
}

// Those of the warp's `pair`-th 16 features.
DEVICE void load_pair(const Stage& stage, int pair, int column, uint32_t (&b)[2][PIECES][2]) {
    const int lane = threadIdx.x % 32, feature = threadIdx.x / 32 % TILE_FEATURE_WARPS * WARP_FEATURES;
    load_weight(stage, feature + 16 * pair, column, lane, b);
}

DEVICE void multiply(const uint32_t (&a)[M][4], const uint32_t (&b)[2][PIECES][2], int pair, float (&c)[M][N][4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) {
#pragma unroll
            for (int m = 0; m < M; ++m) mma_bf16(c[m][2 * pair + i], a[m], b[i][piece]);
        }
    }
}

DEVICE void clear(float (&c)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) c[m][n][i] = 0.0f;
        }
    }
}

// c = the products of steps `begin` to `end` for the tile from `first_token` and `first_feature` on.
DEVICE void multiply_tile(Shared& shared, const Operands& in, int first_token, int first_feature, int begin, int end, float (&c)[M][N][4]) {
    clear(c);
    int32_t x_rows[X_COPIES];
    find_rows(x_rows, in, first_token);
    // The tile before may still be read.
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < TILE_STAGES - 1; ++i) {
        if (begin + i < end) load<1>(shared.ring[i], x_rows, in, first_feature, (begin + i) * COLUMNS, 0);
        cp_async_commit();
    }
    int stage = 0, stage_of_next = TILE_STAGES - 1;
    constexpr int PARTS = COLUMNS / 16, PAIRS = N / 2;
    // With TILE_AHEAD a warp reads what it multiplies next, a pair of weight fragments and its share of those of x, before it multiplies.
    uint32_t a[TILE_AHEAD ? 2 : 1][M][4], b[TILE_AHEAD ? 2 : 1][2][PIECES][2];
    if constexpr (TILE_AHEAD) {
        cp_async_wait<TILE_STAGES - 2>();
        __syncthreads();
#pragma unroll
        for (int m = 0; m < M; ++m) load_x(shared.ring[0], m, 0, a[0][m]);
        load_pair(shared.ring[0], 0, 0, b[0]);
    }
    for (int step = begin; step < end; ++step) {
        const int next = step + TILE_STAGES - 1, next_stage = stage + 1 == TILE_STAGES ? 0 : stage + 1;
        if constexpr (!TILE_AHEAD) {
            // Every warp's copies of this step are there, and none reads the step before any more.
            cp_async_wait<TILE_STAGES - 2>();
            __syncthreads();
        }
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const bool last_part = part == PARTS - 1;
#pragma unroll
            for (int pair = 0; pair < PAIRS; ++pair) {
                const int now = TILE_AHEAD ? (part * PAIRS + pair) % 2 : 0, x_now = TILE_AHEAD ? part % 2 : 0;
                const bool last_pair = pair == PAIRS - 1;
                if constexpr (TILE_AHEAD) {
                    if (last_part && last_pair) {
                        cp_async_wait<TILE_STAGES - 2>();
                        __syncthreads();
                    }
                    // After the last step what is there is read once more.
                    const Stage& from = shared.ring[last_part && last_pair && step + 1 < end ? next_stage : stage];
                    const int column = (part + 1) % PARTS * 16;
                    load_pair(from, (pair + 1) % PAIRS, last_pair ? column : 16 * part, b[now ^ 1]);
#pragma unroll
                    for (int m = 0; m < M; ++m) {
                        if ((last_part ? PAIRS - 1 : m * PAIRS / M) == pair) load_x(from, m, column, a[x_now ^ 1][m]);
                    }
                } else {
                    if (pair == 0) {
#pragma unroll
                        for (int m = 0; m < M; ++m) load_x(shared.ring[stage], m, 16 * part, a[0][m]);
                    }
                    load_pair(shared.ring[stage], pair, 16 * part, b[0]);
                }
                if (!last_part && pair == 0) {
                    if (next < end) {
                        load<PARTS - 1>(shared.ring[stage_of_next], x_rows, in, first_feature, next * COLUMNS, part);
                    }
                    if (part == PARTS - 2) cp_async_commit();
                }
                multiply(a[x_now], b[now], pair, c);
            }
        }
        stage = next_stage;
        stage_of_next = stage_of_next + 1 == TILE_STAGES ? 0 : stage_of_next + 1;
    }
}

// Hands the outputs of a tile to `store(token, feature, pair)`; of SWIGLU to `store(token, feature of the output, gates, ups)`.
template <typename Store>
DEVICE void store_tile(const float (&c)[M][N][4], int first_token, int first_feature, int tokens, Store store) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int token = first_token + warp / TILE_FEATURE_WARPS * WARP_TOKENS + lane / 4;
    const int feature = first_feature + warp % TILE_FEATURE_WARPS * WARP_FEATURES + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = token + 16 * m + 8 * half;
            if (row >= tokens) continue;
#pragma unroll
            for (int n = 0; n < N; n += SWIGLU ? 2 : 1) {
                const float pair[2] = {c[m][n][2 * half], c[m][n][2 * half + 1]};
                if constexpr (SWIGLU) {
                    const float ups[2] = {c[m][n + 1][2 * half], c[m][n + 1][2 * half + 1]};
                    store(row, (feature - lane % 4 * 2 + 8 * n) / 2 + lane % 4 * 2, pair, ups);
                } else {
                    store(row, feature + 8 * n, pair);
                }
            }
        }
    }
}
