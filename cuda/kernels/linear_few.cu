// `linear`, `linear_split`, `swiglu` and `lm_head` for few tokens: out[t, o] = weight[o] . x[t]. The weight, which is read once, is all
// that counts.
//
// Features are the 16 rows of an MMA, tokens its 8 columns. The order of the products of a dot product is free as long as weight and x
// agree: lane (g, t) multiplies 8 neighbouring columns of rows g, g + 8 and of token g, 16 bytes each, which make two MMAs.
// A warp copies steps of whole pieces of rows, 128 bytes and more that lie side by side, into a ring of its own, as deep as shared memory
// allows, with no barrier of the block. The warps of a block share its columns in turns, blocks share them in one stretch each
// (gridDim.y); parts are added in their order.
//
// The last blocks may take a second weight, of as many columns. The first may have nothing to do with the product, and choose experts.
//
// Constants: those of linear.cuh; TOKEN_GROUPS of 8 tokens; ROUTES (the first blocks choose experts), and then those of router.cuh.
// Tile: TILE_WARPS, TILE_ROW_TILES of 16 features, TILE_COLUMNS of a step, TILE_STAGES steps of the ring, TILE_BLOCKS.
#include "linear.cuh"
#if ROUTES
#include "router.cuh"
#endif

constexpr int FEATURES = 16 * TILE_ROW_TILES, TOKENS = 8 * TOKEN_GROUPS, THREADS = 32 * TILE_WARPS;
// Vectors of 16 bytes of a step: of a row of each, and of all of them; and the rows that a warp copies at a time.
constexpr int WEIGHT_VECTORS = TILE_COLUMNS * WEIGHT_BYTES / 16, X_VECTORS = TILE_COLUMNS / 8;
constexpr int STEP_VECTORS = FEATURES * WEIGHT_VECTORS + TOKENS * X_VECTORS;
constexpr int WEIGHT_ROWS = 32 / WEIGHT_VECTORS, X_ROWS = 32 / X_VECTORS;
constexpr int X_COPIES = TOKENS / X_ROWS;
static_assert(X_VECTORS % 8 == 0 && WEIGHT_ROWS > 0 && TOKENS % X_ROWS == 0, "whole pieces of rows");
// Rows of four banks more: the lanes that hold a fragment write to 32 different ones.
constexpr int STRIDE = FEATURES + 4;

struct Shared {
    union {
        uint4 ring[TILE_WARPS][TILE_STAGES][STEP_VECTORS];
        float parts[TILE_WARPS][TOKENS][STRIDE];
    };
    uint32_t adds;
};
#if ROUTES
constexpr int ROUTER_BYTES = sizeof(routing::Shared);
#else
constexpr int ROUTER_BYTES = 0;
#endif
constexpr int PRODUCT_BYTES = sizeof(Shared);
static_assert((PRODUCT_BYTES > ROUTER_BYTES ? PRODUCT_BYTES : ROUTER_BYTES) == TILE_SHARED_BYTES, "the launcher's sum");

// Where a vector of a row lies. Eight lanes read at a time, the same four vectors of two neighbouring rows: of 4 bytes an element every
// other one.
template <int BYTES>
DEVICE int place(int row, int vector) {
    constexpr int ROW = TILE_COLUMNS * BYTES / 16;
    return row * ROW + (vector ^ ((row & 1) * (BYTES == 4 ? 1 : 4)));
}

// What a lane copies: the same vector of some rows. None of them lies outside: a feature or token beyond the last is not stored.
struct Source {
    const uint8_t* weight;
    int weight_rows[FEATURES / WEIGHT_ROWS];
    const uint8_t* x;
    int x_rows[X_COPIES];
    int tokens;  // that are left from the lane's first one on: others get zeros
    int columns;
};

// Starts the copies of the step from `column` on. Of an address there is little to compute: the column's part is that of all rows.
DEVICE void load(uint4 (&step)[STEP_VECTORS], const Source& source, int column, int lane) {
    const int vector = lane % WEIGHT_VECTORS, weight_left = source.columns - column - vector * (16 / WEIGHT_BYTES);
    const uint8_t* weight = source.weight + (weight_left > 0 ? column * WEIGHT_BYTES + vector * 16 : 0);
    const int weight_row_bytes = source.columns * WEIGHT_BYTES;
#pragma unroll
    for (int i = 0; i < FEATURES / WEIGHT_ROWS; ++i) {
        uint4* to = &step[place<WEIGHT_BYTES>(i * WEIGHT_ROWS + lane / WEIGHT_VECTORS, vector)];
        const uint8_t* from = weight + static_cast<int64_t>(source.weight_rows[i]) * weight_row_bytes;
        if constexpr (VECTORS) {
            cp_async_16_or_zero_once(to, from, weight_left > 0);
        } else {
            copy_elements<WEIGHT_BYTES>(to, from, weight_left);
        }
    }
    const int x_vector = lane % X_VECTORS, x_left = source.columns - column - 8 * x_vector;
    const uint8_t* x = source.x + (x_left > 0 ? column * 2 + x_vector * 16 : 0);
    const int x_row_bytes = source.columns * 2, tokens = x_left > 0 ? source.tokens : 0;
#pragma unroll
    for (int i = 0; i < X_COPIES; ++i) {
        uint4* to = &step[FEATURES * WEIGHT_VECTORS + place<2>(i * X_ROWS + lane / X_VECTORS, x_vector)];
        const uint8_t* from = x + static_cast<int64_t>(source.x_rows[i]) * x_row_bytes;
        const bool valid = i * X_ROWS < tokens;
        if constexpr (VECTORS) {
            cp_async_16_or_zero(to, from, valid);
        } else {
            copy_elements<2>(to, from, valid ? x_left : 0);
        }
    }
}

// The pieces of the 8 columns of a row that a lane multiplies, of the `eight`-th eight.
DEVICE void split_row(const uint4 (&step)[STEP_VECTORS], int row, int eight, uint32_t (&pieces)[4][PIECES]) {
    constexpr int PARTS = WEIGHT_BYTES / 2;
    uint32_t words[4 * PARTS];
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const uint4 four = step[place<WEIGHT_BYTES>(row, PARTS * eight + part)];
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

DEVICE void multiply(const uint4 (&step)[STEP_VECTORS], int lane, float (&c)[TILE_ROW_TILES][TOKEN_GROUPS][4]) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int column = 0; column < TILE_COLUMNS; column += 32) {
        const int eight = column / 8 + t;
        uint32_t x[TOKEN_GROUPS][4];
#pragma unroll
        for (int n = 0; n < TOKEN_GROUPS; ++n) {
            const uint4 four = step[FEATURES * WEIGHT_VECTORS + place<2>(8 * n + g, eight)];
            x[n][0] = four.x, x[n][1] = four.y, x[n][2] = four.z, x[n][3] = four.w;
        }
#pragma unroll
        for (int r = 0; r < TILE_ROW_TILES; ++r) {
            uint32_t upper[4][PIECES], lower[4][PIECES];
            split_row(step, 16 * r + g, eight, upper);
            split_row(step, 16 * r + g + 8, eight, lower);
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

// A word of a part that is not there yet, and a NaN that has come from sums.
constexpr uint32_t NOT_THERE = 0xffffffffu, NAN_BITS = 0x7fffffffu;

// To `own`, the part of split `self`, the others' are added, in their order, once they are there; where they lay is left as it was.
DEVICE void add_parts(float (&own)[4], float4* parts, int splits, int self) {
    constexpr int BATCH = 4;
    float sums[4] = {};
    for (int first = 0; first < splits; first += BATCH) {
        // All under way before the first is waited for.
        float4 batch[BATCH];
        bool there;
        do {
            there = true;
#pragma unroll
            for (int j = 0; j < BATCH; ++j) batch[j] = load_awaited_16(parts + min(first + j, splits - 1) * (TOKENS * FEATURES / 4));
#pragma unroll
            for (int j = 0; j < BATCH; ++j) {
                const uint32_t words[4] = {__float_as_uint(batch[j].x), __float_as_uint(batch[j].y), __float_as_uint(batch[j].z),
                                           __float_as_uint(batch[j].w)};
                if (first + j < splits && first + j != self) {
#pragma unroll
                    for (int k = 0; k < 4; ++k) there = there && words[k] != NOT_THERE;
                }
            }
        } while (!there);
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
            if (first + j >= splits) break;
            if (first + j == self) {
                sums[0] += own[0], sums[1] += own[1], sums[2] += own[2], sums[3] += own[3];
            } else {
                sums[0] += batch[j].x, sums[1] += batch[j].y, sums[2] += batch[j].z, sums[3] += batch[j].w;
                const float none = __uint_as_float(NOT_THERE);
                parts[(first + j) * (TOKENS * FEATURES / 4)] = make_float4(none, none, none, none);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) own[j] = sums[j];
}

KERNEL void __launch_bounds__(THREADS, TILE_BLOCKS)
linear_few(const uint16_t* __restrict__ x,       // [x_rows, columns] bf16
           const int32_t* __restrict__ gathered, // [tokens] rows of x, or null: one after the other
           const uint8_t* __restrict__ weight,   // [features, columns]
           const uint8_t* __restrict__ beside,   // [second_end - first_end, columns], whose output is the second; or null
           uint8_t* first,                        // [tokens, first_end] bf16, or floats, as the others
           uint8_t* second,                       // [tokens, second_end - first_end], or null
           uint8_t* third,                        // [tokens, third_end - second_end], or null
           uint8_t* fourth,                       // [tokens, features - third_end], or null
           float* __restrict__ parts,            // [row blocks, splits, TOKENS, FEATURES], all ones
           uint32_t* __restrict__ arrivals,      // [row blocks], zero
           int x_rows, int tokens, int columns, int features, int first_end, int second_end, int third_end,
           int floats
#if ROUTES
           , const float* __restrict__ logits, const void* __restrict__ bias, int32_t* __restrict__ topk_ids,
           float* __restrict__ topk_weights, int routed, int k, int topk_group, int normalise, float scaling
#endif
) {
    int block = blockIdx.x;
#if ROUTES
    // They have less to do, but each step of it waits for the one before.
    const int routing_blocks = (routed + TILE_WARPS - 1) / TILE_WARPS;
    if (block < routing_blocks) {
        if (blockIdx.y == 0) routing::route(block, logits, bias, topk_ids, topk_weights, routed, k, topk_group, normalise, scaling);
        return;
    }
    block -= routing_blocks;
#endif
    Shared& shared = shared_memory<Shared>();
    Outputs outputs = {first, second, third, fourth, first_end, second_end, third_end, features, floats};
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int splits = gridDim.y;
    // The block's rows of its weight, and where the outputs of such rows begin.
    int first_feature = block * FEATURES, first_output = 0;
    bool activates = SWIGLU != 0;
    const int own_blocks = (features + FEATURES - 1) / FEATURES;
    if (beside != nullptr && block >= own_blocks) {
        weight = beside, first_feature = (block - own_blocks) * FEATURES;
        first_output = first_end, features = second_end - first_end, outputs.features = second_end;
        activates = false;
    }

    // The last to come adds the parts up: the others are under way, and wait for nothing.
    uint32_t before = 0;
    if (splits > 1 && threadIdx.x == 0) before = atomicAdd(arrivals + block, 1u);

    Source source = {weight, {}, reinterpret_cast<const uint8_t*>(x), {}, x_rows > 0 ? tokens - lane / X_VECTORS : 0, columns};
#pragma unroll
    for (int i = 0; i < FEATURES / WEIGHT_ROWS; ++i) {
        source.weight_rows[i] = min(first_feature + i * WEIGHT_ROWS + lane / WEIGHT_VECTORS, features - 1);
    }
#pragma unroll
    for (int i = 0; i < X_COPIES; ++i) {
        int row = min(i * X_ROWS + lane / X_VECTORS, tokens - 1);
        if (gathered != nullptr) row = gathered[row];
        source.x_rows[i] = row >= 0 && row < x_rows ? row : 0;
    }

    const int steps = (columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
    const int begin = static_cast<int>(static_cast<int64_t>(steps) * blockIdx.y / splits) + warp;
    const int end = static_cast<int>(static_cast<int64_t>(steps) * (blockIdx.y + 1) / splits);
    float c[TILE_ROW_TILES][TOKEN_GROUPS][4] = {};
    int next = begin;
#pragma unroll
    for (int stage = 0; stage < TILE_STAGES - 1; ++stage) {
        if (next < end) load(shared.ring[warp][stage], source, next * TILE_COLUMNS, lane);
        cp_async_commit();
        next += TILE_WARPS;
    }
    int stage = 0, stage_of_next = TILE_STAGES - 1;
    for (int step = begin; step < end; step += TILE_WARPS) {
        // A step of all lanes is there, and the slot that they multiplied last is free again.
        cp_async_wait<TILE_STAGES - 2>();
        __syncwarp();
        if (next < end) load(shared.ring[warp][stage_of_next], source, next * TILE_COLUMNS, lane);
        cp_async_commit();
        next += TILE_WARPS;
        multiply(shared.ring[warp][stage], lane, c);
        stage_of_next = stage;
        stage = stage + 1 == TILE_STAGES ? 0 : stage + 1;
    }
    cp_async_wait<0>();
    if (threadIdx.x == 0) shared.adds = before + 1 == static_cast<uint32_t>(splits);
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

    const bool adds = splits > 1 && shared.adds != 0;
    if (adds && threadIdx.x == 0) arrivals[block] = 0;
    float4* all = reinterpret_cast<float4*>(parts) + static_cast<int64_t>(block) * splits * (TOKENS * FEATURES / 4);
    float4* own = all + blockIdx.y * (TOKENS * FEATURES / 4);
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
    if (splits > 1 && !adds) {
        for (int i = threadIdx.x; i < tokens * (FEATURES / 4); i += THREADS) {
            float sums[4];
            sum_of_warps(sums, i);
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[j] = __float_as_uint(sums[j]) == NOT_THERE ? __uint_as_float(NAN_BITS) : sums[j];
            store_awaited_16(own + i, make_float4(sums[0], sums[1], sums[2], sums[3]));
        }
        return;
    }
    const auto sum_of = [&](float(&sums)[4], int i) {
        sum_of_warps(sums, i);
        if (splits > 1) add_parts(sums, all + i, splits, blockIdx.y);
    };
    for (int i = threadIdx.x; i < tokens * (FEATURES / 4); i += THREADS) {
        const int token = i / (FEATURES / 4), feature = i % (FEATURES / 4) * 4;
        float sums[4];
        // The four of a gate with those of its up projection, which are two further.
        if (activates && feature % 16 >= 8) continue;
        sum_of(sums, i);
        if (activates) {
            float ups[4];
            sum_of(ups, i + 2);
            outputs.store_swiglu(token, first_feature / 2 + feature / 16 * 8 + feature % 8, sums, ups);
        } else {
            outputs.store(token, first_output + first_feature + feature, sums);
        }
    }
}
