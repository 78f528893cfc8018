// out = x W^T for a packed INT4 weight and many tokens: blocks of features x tokens, whose operands pass through shared memory in
// TILE_STAGES stages of TILE_STEPS times 64 inputs.
//
// Warps lie TILE_WARPS_ROWS along the features and TILE_WARPS_TOKENS along the tokens, each with TILE_ROW_TILES tiles of 16 features and
// TILE_TOKEN_TILES of 8 tokens. Sums are in units of the scale of the group that they are at: products go on top of them as they are, and
// where the next group begins one multiplication makes its scale the unit. So no group's products need registers beside the sums.
//
// Constants: those of linear_int4.cuh.
#include "linear_int4.cuh"

constexpr int R = TILE_ROW_TILES, N = TILE_TOKEN_TILES;
constexpr int ROW_TILES = TILE_WARPS_ROWS * R, TOKENS = TILE_WARPS_TOKENS * N * 8, THREADS = TILE_WARPS_ROWS * TILE_WARPS_TOKENS * 32;
// Tiles of tokens whose activations are in registers at a time.
constexpr int M = N % 4 == 0 ? 4 : 2;
static_assert(N % M == 0, "whole turns");

// The operands of 64 inputs.
struct Step {
    // 16-byte pieces of a token's 64 activations: piece i lies at i ^ 4 in odd rows, so that two rows' fragments meet all banks.
    uint4 x[TOKENS][8];
    uint4 words[ROW_TILES][32];
    Int4Scale<SCALE_TYPE> scales[ROW_TILES][GROUPS_PER_TILE][8];
    uint8_t zeros[ROW_TILES][GROUPS_PER_TILE][8];
};

struct Shared {
    Step stages[TILE_STAGES][TILE_STEPS];
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher's sum");

constexpr int rounds(int count) { return (count + THREADS - 1) / THREADS; }

// A thread's part of the copies of a block's steps. What lies beyond the weight or the tokens is the last tile or token again: its results
// are dropped.
struct Loader {
    static constexpr int PIECES = TOKENS * 8, WORDS = ROW_TILES * 32, GROUPS = ROW_TILES * GROUPS_PER_TILE, PAIRS = GROUPS * 8;
    const uint16_t* x;
    const Int4Weight& weight;
    int tokens, in_features, row_tile, token;
    uint32_t pieces[rounds(PIECES)], words[rounds(WORDS)], pairs[rounds(PAIRS)];

    DEVICE int tile(uint32_t place) const { return min(row_tile + static_cast<int>(place), weight.row_tiles - 1); }

    // In bytes of 32 bits, which the launcher has counted.
    DEVICE void prepare() {
        const uint32_t thread = threadIdx.x;
#pragma unroll
        for (uint32_t i = 0; i < rounds(PIECES); ++i) {
            const int row = min(token + static_cast<int>((i * THREADS + thread) / 8), tokens - 1);
            pieces[i] = (static_cast<uint32_t>(row * in_features) + thread % 8 * 8) * sizeof(uint16_t);
        }
#pragma unroll
        for (uint32_t i = 0; i < rounds(WORDS); ++i) {
            const int from = tile((i * THREADS + thread) / 32);
            words[i] = (static_cast<uint32_t>(from * weight.k_tiles) * 32 + thread % 32) * sizeof(uint4);
        }
#pragma unroll
        for (uint32_t i = 0; i < rounds(PAIRS); ++i) {
            const uint32_t place = i * THREADS + thread;
            pairs[i] = static_cast<uint32_t>(tile(place / 8 / GROUPS_PER_TILE) * weight.groups) * 8 + place % 8;
        }
    }

    // Starts those of k tile `k_tile`.
    DEVICE void start(Step& step, int k_tile) const {
        const uint32_t thread = threadIdx.x;
        const auto* k_x = reinterpret_cast<const uint8_t*>(x + k_tile * 64);
        const int input = k_tile * 64 + thread % 8 * 8;
        // A thread's rows are all even or all odd.
        static_assert(THREADS % 16 == 0, "whole pairs of rows");
        uint4* first = &step.x[thread / 8][thread % 8 ^ 4 * (thread / 8 % 2)];
#pragma unroll
        for (uint32_t i = 0; i < rounds(PIECES); ++i) {
            if (PIECES % THREADS != 0 && i * THREADS + thread >= PIECES) break;
            uint4* to = first + i * THREADS;
            if constexpr (ALIGNED == 2) {
                cp_async_16(to, k_x + pieces[i]);
            } else if constexpr (ALIGNED == 1) {
                const bool valid = input < in_features;
                cp_async_16_or_zero(to, valid ? k_x + pieces[i] : k_x, valid);
            } else {
                const int row = static_cast<int>((i * THREADS + thread) / 8);
                *to = activations(x, token + row, input, tokens, in_features);
            }
        }
        const auto* k_words = reinterpret_cast<const uint8_t*>(weight.words + k_tile * 32);
#pragma unroll
        for (uint32_t i = 0; i < rounds(WORDS); ++i) {
            if (WORDS % THREADS != 0 && i * THREADS + thread >= WORDS) break;
            cp_async_16(&step.words[0][0] + i * THREADS + thread, k_words + words[i]);
        }
#pragma unroll
        for (uint32_t i = 0; i < rounds(PAIRS); ++i) {
            const uint32_t place = i * THREADS + thread, part = place / 8 % GROUPS_PER_TILE;
            if (PAIRS % THREADS != 0 && place >= PAIRS) break;
            const auto* scale =
                static_cast<const Int4Scale<SCALE_TYPE>*>(weight.scales) + (pairs[i] + weight.group(k_tile, static_cast<int>(part)) * 8);
            auto* to = &step.scales[0][0][0] + place;
            if constexpr (SCALE_TYPE == F32) {
                cp_async_8(to, scale);
            } else {
                cp_async_4(to, scale);
            }
        }
        if constexpr (ZERO_POINTS) {
#pragma unroll
            for (uint32_t i = 0; i < rounds(GROUPS); ++i) {
                const uint32_t place = i * THREADS + thread, part = place % GROUPS_PER_TILE;
                if (GROUPS % THREADS != 0 && place >= GROUPS) break;
                const int64_t index = weight.group_index(tile(place / GROUPS_PER_TILE), k_tile, static_cast<int>(part));
                cp_async_8(&step.zeros[0][0][0] + place * 8, weight.zeros + index);
            }
        }
    }
};

// A row's unit, zero before there is one; what q + 128 of its weights is multiplied with, and what is then added.
struct Row {
    float unit;
    uint32_t factor, offset;

    // Whether a group's scale can be the next unit as it is; `change` is what sums are then multiplied with.
    DEVICE bool is_near(float scale, float& change) const {
        change = unit * reciprocal_approx(scale);
        return fabsf(change) <= FAR && fabsf(scale) < FAR && change != 0.0f;
    }

    // Moves on to any group: the first, one whose scale is zero or next to nothing beside the unit, scales that are no numbers. The new
    // unit may be a power of two times the scale, by which the weights are then less. Returns what sums are multiplied with.
    DEVICE float enter_far(float scale) {
        float next = scale;
        uint32_t exponent = 127;
        for (int i = 0; i < 3 && fabsf(next) * FAR < fabsf(unit); ++i) next *= 1ull << 32, exponent -= 32;
        const bool nothing = fabsf(next) * FAR < fabsf(unit) || scale == 0.0f;
        factor = nothing ? 0 : exponent * 0x00800080u;
        offset = fma_bf16x2(offset, factor, 0);
        if (nothing) return 1.0f;
        const float change = unit == 0.0f ? 1.0f : unit / next;
        unit = next;
        return change;
    }

    static constexpr float FAR = 1ull << 40;
};

// A warp's rows and the group that they are at.
struct Rows {
    Row rows[R][2];
    int group;

    DEVICE void enter(const Step& step, int row_tile, int part, float (&sums)[R][N][4]) {
        const uint32_t g = threadIdx.x % 32 / 4;
        float changes[R][2];
        bool near = true;
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const float2 scales = step.scales[row_tile + r][part][g].widen();
            const uint32_t zeros = ZERO_POINTS ? step.zeros[row_tile + r][part][g] : 0x88u;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                near &= rows[r][i].is_near(i == 0 ? scales.x : scales.y, changes[r][i]);
                rows[r][i].factor = 0x3f803f80u, rows[r][i].offset = int4_offset(zeros >> (4 * i));
            }
        }
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const float2 scales = step.scales[row_tile + r][part][g].widen();
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float scale = i == 0 ? scales.x : scales.y;
                if (near) {
                    rows[r][i].unit = scale;
                } else {
                    changes[r][i] = rows[r][i].enter_far(scale);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[r][n][i] *= changes[r][i / 2];
            }
        }
    }

    // The products of a step on top of the sums.
    DEVICE void multiply(const Step& step, const Int4Weight& weight, int k_tile, int row_tile, int token, float (&sums)[R][N][4]) {
        const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        uint4 words[R];
#pragma unroll
        for (int r = 0; r < R; ++r) words[r] = step.words[row_tile + r][lane];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int part = h * (GROUPS_PER_TILE - 1), next = weight.group(k_tile, part);
            if (h < GROUPS_PER_TILE && next != group) {
                group = next;
                enter(step, row_tile, part, sums);
            }
            uint32_t a[R][2][4];
#pragma unroll
            for (int r = 0; r < R; ++r) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const uint32_t word = h == 0 ? (i == 0 ? words[r].x : words[r].y) : (i == 0 ? words[r].z : words[r].w);
#pragma unroll
                    for (int p = 0; p < 4; ++p) a[r][i][p] = fma_bf16x2(int4_biased(word, p), rows[r][p % 2].factor, rows[r][p % 2].offset);
                }
            }
#pragma unroll
            for (int n = 0; n < N; n += M) {
                uint4 x[M];
#pragma unroll
                for (int m = 0; m < M; ++m) x[m] = step.x[token + 8 * (n + m) + g][(4 * h + t) ^ 4 * (g % 2)];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
#pragma unroll
                    for (int m = 0; m < M; ++m) {
                        const uint32_t b[2] = {i == 0 ? x[m].x : x[m].z, i == 0 ? x[m].y : x[m].w};
#pragma unroll
                        for (int r = 0; r < R; ++r) mma_bf16(sums[r][n + m], a[r][i], b);
                    }
                }
            }
        }
    }
};

KERNEL void __launch_bounds__(THREADS, TILE_BLOCKS)
linear_int4_wide(const uint16_t* __restrict__ x,    // [tokens, in_features] bf16
                 const uint4* __restrict__ words,   // [row_tiles, k_tiles, 32]
                 const void* __restrict__ scales,   // [row_tiles, groups, 8] pairs
                 const uint8_t* __restrict__ zeros, // [row_tiles, groups, 8], or null
                 void* __restrict__ out,            // [tokens, out_features] bf16 or f32
                 float4* __restrict__ partials,     // [token blocks, row blocks, splits, R * N, THREADS], where there are splits
                 uint32_t* __restrict__ tickets,    // [token blocks, row blocks], zero
                 int tokens, int in_features, int out_features, int groups, int group_size, int k_tiles_per_split) {
    Shared& shared = shared_memory<Shared>();
    const int row_tiles = (out_features + FEATURES_PER_TILE - 1) / FEATURES_PER_TILE, k_tiles = (in_features + 63) / 64;
    const Int4Weight weight{words, scales, zeros, row_tiles, k_tiles, groups, group_size};
    const int row_tile = blockIdx.x * ROW_TILES, token = blockIdx.y * TOKENS;
    Loader loader{x, weight, tokens, in_features, row_tile, token};
    loader.prepare();
    const int first = blockIdx.z * k_tiles_per_split, end = min(first + k_tiles_per_split, weight.k_tiles);
    const int warp = threadIdx.x / 32, own_row_tile = warp / TILE_WARPS_TOKENS * R, own_token = warp % TILE_WARPS_TOKENS * (8 * N);

    const auto load = [&](int stage, int k_tile) {
#pragma unroll
        for (int i = 0; i < TILE_STEPS; ++i) {
            if (k_tile + i < end) loader.start(shared.stages[stage][i], k_tile + i);
        }
        cp_async_commit();
    };
#pragma unroll
    for (int s = 0; s < TILE_STAGES - 1; ++s) load(s, first + s * TILE_STEPS);
    Rows rows;
    rows.group = -1;
#pragma unroll
    for (int r = 0; r < R; ++r) rows.rows[r][0].unit = rows.rows[r][1].unit = 0.0f;
    float sums[R][N][4] = {};
    int stage = 0;
    for (int k_tile = first; k_tile < end; k_tile += TILE_STEPS) {
        cp_async_wait<TILE_STAGES - 2>();
        // This stage's operands are there, and the stage before's are no longer read.
        __syncthreads();
        load(stage == 0 ? TILE_STAGES - 1 : stage - 1, k_tile + (TILE_STAGES - 1) * TILE_STEPS);
#pragma unroll 1
        for (int i = 0; i < TILE_STEPS && k_tile + i < end; ++i) {
            rows.multiply(shared.stages[stage][i], weight, k_tile + i, own_row_tile, own_token, sums);
        }
        stage = stage == TILE_STAGES - 1 ? 0 : stage + 1;
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[r][n][i] *= rows.rows[r][i / 2].unit;
        }
    }

    const int splits = gridDim.z, group = blockIdx.y * gridDim.x + blockIdx.x;
    if (splits > 1) {
        float4* all = partials + static_cast<int64_t>(group) * splits * (R * N * THREADS) + threadIdx.x;
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const float4 sum = make_float4(sums[r][n][0], sums[r][n][1], sums[r][n][2], sums[r][n][3]);
                all[(static_cast<int>(blockIdx.z) * (R * N) + r * N + n) * THREADS] = sum;
            }
        }
        if (!is_last_block(tickets + group, splits)) return;
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[r][n][i] = 0.0f;
            }
        }
#pragma unroll 1
        for (int split = 0; split < splits; ++split) {
            const float4* from = all + split * (R * N * THREADS);
#pragma unroll
            for (int r = 0; r < R; ++r) {
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    const float4 sum = load_published_16(from + (r * N + n) * THREADS);
                    sums[r][n][0] += sum.x, sums[r][n][1] += sum.y, sums[r][n][2] += sum.z, sums[r][n][3] += sum.w;
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const float4 sum = make_float4(sums[r][n][0], sums[r][n][1], sums[r][n][2], sums[r][n][3]);
            store_fragment(out, sum, row_tile + own_row_tile + r, token + own_token + 8 * n, out_features, tokens);
        }
    }
}
