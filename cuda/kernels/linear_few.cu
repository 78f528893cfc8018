// `linear`, `linear_split`, `swiglu` and `lm_head` for few tokens: out[t, o] = weight[o] . x[t]. The weight, which is read once, is all
// that counts.
//
// Features are the 16 rows of an MMA, tokens its 8 columns. The order of the products of a dot product is free as long as weight and x
// agree: lane (g, t) holds 8 neighbouring columns of rows g, g + 8 and of token g, 16 bytes each, which make two MMAs. Every lane copies
// into slots of its own and reads them back itself: a ring as deep as shared memory allows, with no barrier.
// The warps of a block share its columns in turns, blocks share them in one stretch each (gridDim.y); parts are added in their order.
//
// Constants: those of linear.cuh; TOKEN_GROUPS of 8 tokens.
// Tile: TILE_WARPS, TILE_ROW_TILES of 16 features, TILE_HALVES of 32 columns a step, TILE_STAGES steps of the ring, TILE_BLOCKS.
#include "linear.cuh"

constexpr int FEATURES = 16 * TILE_ROW_TILES, TOKENS = 8 * TOKEN_GROUPS, COLUMNS = 32 * TILE_HALVES;
constexpr int THREADS = 32 * TILE_WARPS;
// Vectors of 16 bytes that hold 8 columns of a weight row, and of a lane's step.
constexpr int ROW_VECTORS = WEIGHT_BYTES / 2, STEP_VECTORS = TILE_HALVES * (2 * TILE_ROW_TILES * ROW_VECTORS + TOKEN_GROUPS);
// Rows of four banks more: the lanes that hold a fragment write to 32 different ones.
constexpr int STRIDE = FEATURES + 4;

struct Shared {
    union {
        uint4 ring[TILE_WARPS][TILE_STAGES][STEP_VECTORS][32];
        float parts[TILE_WARPS][TOKENS][STRIDE];
    };
    uint32_t last;
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher's sum");

// Where a lane's rows begin.
struct Rows {
    const uint8_t* weight[2 * TILE_ROW_TILES];
    bool weight_valid[2 * TILE_ROW_TILES];
    const uint16_t* x[TOKEN_GROUPS];
    bool x_valid[TOKEN_GROUPS];
};

// Starts the copies of a step.
DEVICE void load(uint4 (&step)[STEP_VECTORS][32], const Rows& rows, int column, int columns, int lane) {
    int slot = 0;
#pragma unroll
    for (int i = 0; i < 2 * TILE_ROW_TILES; ++i) {
#pragma unroll
        for (int half = 0; half < TILE_HALVES; ++half) {
#pragma unroll
            for (int part = 0; part < ROW_VECTORS; ++part) {
                const int at = column + 32 * half + 4 * part;
                copy_vector<WEIGHT_BYTES>(&step[slot++][lane], rows.weight[i], at, columns, rows.weight_valid[i]);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < TOKEN_GROUPS; ++n) {
#pragma unroll
        for (int half = 0; half < TILE_HALVES; ++half) {
            copy_vector<2>(&step[slot++][lane], rows.x[n], column + 32 * half, columns, rows.x_valid[n]);
        }
    }
}

// The pieces of 8 neighbouring columns of a row.
DEVICE void split_row(const uint4 (&step)[STEP_VECTORS][32], int slot, int lane, uint32_t (&pieces)[4][PIECES]) {
    uint32_t words[4 * ROW_VECTORS];
#pragma unroll
    for (int part = 0; part < ROW_VECTORS; ++part) {
        const uint4 four = step[slot + part][lane];
        words[4 * part] = four.x, words[4 * part + 1] = four.y, words[4 * part + 2] = four.z, words[4 * part + 3] = four.w;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (WEIGHT_TYPE == F32) {
            split(__uint_as_float(words[2 * i]), __uint_as_float(words[2 * i + 1]), pieces[i]);
        } else {
            split(words[i], pieces[i]);
        }
    }
}

DEVICE void multiply(const uint4 (&step)[STEP_VECTORS][32], int lane, float (&c)[TILE_ROW_TILES][TOKEN_GROUPS][4]) {
#pragma unroll
    for (int half = 0; half < TILE_HALVES; ++half) {
        uint32_t x[TOKEN_GROUPS][4];
#pragma unroll
        for (int n = 0; n < TOKEN_GROUPS; ++n) {
            const uint4 four = step[TILE_HALVES * (2 * TILE_ROW_TILES * ROW_VECTORS + n) + half][lane];
            x[n][0] = four.x, x[n][1] = four.y, x[n][2] = four.z, x[n][3] = four.w;
        }
#pragma unroll
        for (int r = 0; r < TILE_ROW_TILES; ++r) {
            uint32_t upper[4][PIECES], lower[4][PIECES];
            split_row(step, ((2 * r) * TILE_HALVES + half) * ROW_VECTORS, lane, upper);
            split_row(step, ((2 * r + 1) * TILE_HALVES + half) * ROW_VECTORS, lane, lower);
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
#pragma unroll
                for (int piece = 0; piece < PIECES; ++piece) {
                    const uint32_t a[4] = {upper[i][piece], lower[i][piece], upper[i + 1][piece], lower[i + 1][piece]};
#pragma unroll
                    for (int n = 0; n < TOKEN_GROUPS; ++n) {
                        const uint32_t b[2] = {x[n][i], x[n][i + 1]};
                        mma_bf16(c[r][n], a, b);
                    }
                }
            }
        }
    }
}

KERNEL void __launch_bounds__(THREADS, TILE_BLOCKS)
linear_few(const uint16_t* __restrict__ x,       // [x_rows, columns] bf16
           const int32_t* __restrict__ gathered, // [tokens] rows of x, or null: one after the other
           const uint8_t* __restrict__ weight,   // [features, columns]
           uint8_t* first,                        // [tokens, first_end] bf16, or floats, as the others
           uint8_t* second,                       // [tokens, second_end - first_end], or null
           uint8_t* third,                        // [tokens, third_end - second_end], or null
           uint8_t* fourth,                       // [tokens, features - third_end], or null
           float* __restrict__ parts,            // [row blocks, splits, TOKENS, FEATURES]
           uint32_t* __restrict__ arrivals,      // [row blocks], zero
           int x_rows, int tokens, int columns, int features, int first_end, int second_end, int third_end,
           int floats) {
    Shared& shared = shared_memory<Shared>();
    const Outputs outputs = {first, second, third, fourth, first_end, second_end, third_end, features, floats};
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int splits = gridDim.y, first_feature = blockIdx.x * FEATURES;

    Rows rows;
#pragma unroll
    for (int i = 0; i < 2 * TILE_ROW_TILES; ++i) {
        const int feature = first_feature + 8 * i + g;
        rows.weight_valid[i] = feature < features;
        rows.weight[i] = weight + static_cast<int64_t>(rows.weight_valid[i] ? feature : 0) * columns * WEIGHT_BYTES;
    }
#pragma unroll
    for (int n = 0; n < TOKEN_GROUPS; ++n) {
        const int token = 8 * n + g;
        int row = token < tokens ? token : -1;
        if (gathered != nullptr && token < tokens) row = gathered[token];
        rows.x_valid[n] = row >= 0 && row < x_rows;
        rows.x[n] = x + (rows.x_valid[n] ? static_cast<int64_t>(row) * columns : 0);
    }

    const int steps = (columns + COLUMNS - 1) / COLUMNS;
    const int begin = static_cast<int>(static_cast<int64_t>(steps) * blockIdx.y / splits) + warp;
    const int end = static_cast<int>(static_cast<int64_t>(steps) * (blockIdx.y + 1) / splits);
    float c[TILE_ROW_TILES][TOKEN_GROUPS][4] = {};
    int next = begin;
#pragma unroll
    for (int stage = 0; stage < TILE_STAGES - 1; ++stage) {
        if (next < end) load(shared.ring[warp][stage], rows, next * COLUMNS + 8 * t, columns, lane);
        cp_async_commit();
        next += TILE_WARPS;
    }
    int stage = 0, stage_of_next = TILE_STAGES - 1;
    for (int step = begin; step < end; step += TILE_WARPS) {
        // The slot that was multiplied last is free again.
        if (next < end) load(shared.ring[warp][stage_of_next], rows, next * COLUMNS + 8 * t, columns, lane);
        cp_async_commit();
        next += TILE_WARPS;
        cp_async_wait<TILE_STAGES - 1>();
        multiply(shared.ring[warp][stage], lane, c);
        stage = stage + 1 == TILE_STAGES ? 0 : stage + 1;
        stage_of_next = stage_of_next + 1 == TILE_STAGES ? 0 : stage_of_next + 1;
    }
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int r = 0; r < TILE_ROW_TILES; ++r) {
#pragma unroll
        for (int n = 0; n < TOKEN_GROUPS; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) shared.parts[warp][8 * n + 2 * t + i % 2][16 * r + g + i / 2 * 8] = c[r][n][i];
        }
    }
    __syncthreads();

    float4* all = reinterpret_cast<float4*>(parts) + static_cast<int64_t>(blockIdx.x) * splits * (TOKENS * FEATURES / 4);
    float4* own = all + blockIdx.y * (TOKENS * FEATURES / 4);
    // Every four outputs, once they are summed by `sum_of(sums, i)`. Of a SwiGLU the four of a gate with those of its up projection, which
    // are two further.
    const auto store_all = [&](auto sum_of) {
        for (int i = threadIdx.x; i < tokens * (FEATURES / 4); i += THREADS) {
            const int token = i / (FEATURES / 4), feature = i % (FEATURES / 4) * 4;
            float sums[4];
            if constexpr (SWIGLU) {
                if (feature % 16 >= 8) continue;
                float ups[4];
                sum_of(sums, i);
                sum_of(ups, i + 2);
                outputs.store_swiglu(token, first_feature / 2 + feature / 16 * 8 + feature % 8, sums, ups);
            } else {
                sum_of(sums, i);
                outputs.store(token, first_feature + feature, sums);
            }
        }
    };
    const auto sum_of_warps = [&](float(&sums)[4], int i) {
        const int token = i / (FEATURES / 4), feature = i % (FEATURES / 4) * 4;
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[j] = 0.0f;
#pragma unroll
        for (int w = 0; w < TILE_WARPS; ++w) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[j] += shared.parts[w][token][feature + j];
        }
    };
    if (splits == 1) return store_all(sum_of_warps);
    for (int i = threadIdx.x; i < tokens * (FEATURES / 4); i += THREADS) {
        float sums[4];
        sum_of_warps(sums, i);
        own[i] = make_float4(sums[0], sums[1], sums[2], sums[3]);
    }
    constexpr int BATCH = 4;
    if (!arrive_last(arrivals + blockIdx.x, splits, shared.last)) return;
    store_all([&](float(&sums)[4], int i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[j] = 0.0f;
        for (int first_of_batch = 0; first_of_batch < splits; first_of_batch += BATCH) {
            // All under way before the first is waited for.
            float4 batch[BATCH];
#pragma unroll
            for (int j = 0; j < BATCH; ++j) {
                const int split = min(first_of_batch + j, splits - 1);
                batch[j] = load_published_16(all + split * (TOKENS * FEATURES / 4) + i);
            }
#pragma unroll
            for (int j = 0; j < BATCH; ++j) {
                if (first_of_batch + j >= splits) break;
                sums[0] += batch[j].x, sums[1] += batch[j].y, sums[2] += batch[j].z, sums[3] += batch[j].w;
            }
        }
    });
}
