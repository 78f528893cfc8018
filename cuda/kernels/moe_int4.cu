// Routed experts, INT4: the product of an expert's weight with the rows of the tokens that chose it, gate and up (GATE_UP) or down.
//
// A block takes one item, up to TILE_TOKENS tokens of one expert, and a range of row groups, WARPS_M * ROW_TILES tiles of 16 features each.
// Features lie on the 16 rows of an `mma` and tokens on its 8 columns. WARPS_K columns of WARPS_M warps share out the inputs: each column
// is a pipeline of its own, with a ring of stages that its copies run ahead in, across row groups; a warp loads the weights that it uses,
// the tokens' rows are shared by the column. Sums of columns are added up in a fixed order.
//
// Constants: GATE_UP; SORTED (items from `moe_sort`) or one item a pair of token and k; SCALE_TYPE, GROUP_SIZE, UNIT (inputs that surely
// share a scale: 32 or 64), ZEROS; WHOLE (no stage and no row ends early); PACKED. Tile: TILE_WARPS_M, TILE_WARPS_K, TILE_ROW_TILES,
// TILE_TOKENS, TILE_K_TILES a stage, TILE_STAGES, TILE_BLOCKS.
//
// Arithmetic: products of a unit are summed in f32 by the tensor core, scaled and added in f32. Gate-up rounds silu(gate) * up to bf16, the
// contract's rounding point; down writes f32, or with PACKED fours of neighbouring features as `moe_parts.cuh` packs them.
#include "moe_parts.cuh"

constexpr int WARPS_M = TILE_WARPS_M, WARPS_K = TILE_WARPS_K, WARPS = WARPS_M * WARPS_K, THREADS = 32 * WARPS, COLUMN = 32 * WARPS_M;
constexpr int ROW_TILES = TILE_ROW_TILES, GROUP_TILES = WARPS_M * ROW_TILES;
constexpr int TOKENS = TILE_TOKENS, TOKEN_TILES = TOKENS / 8;
constexpr int K_TILES = TILE_K_TILES, STAGES = TILE_STAGES, UNITS = 64 / UNIT;
// Row tiles whose results are written together.
constexpr int BUNDLE = PACKED ? 2 : 1;
// A pair's item has one token.
constexpr int X_ROWS = SORTED ? TOKENS : 1;
constexpr int SCALE_CHUNKS = 8 * static_cast<int>(sizeof(Int4Scale<SCALE_TYPE>)) / 16;

static_assert(TOKENS % 8 == 0 && (UNIT == 32 || UNIT == 64) && STAGES >= 2, "whole tiles of tokens, groups of whole halves of a tile");
static_assert(ROW_TILES % BUNDLE == 0 && !(PACKED && GATE_UP), "parts are packed two tiles at a time");
static_assert(GROUP_SIZE % UNIT == 0, "a unit lies in one group");
static_assert(COLUMN % (K_TILES * 8) == 0 && X_ROWS >= 1, "a thread copies one place of every so many rows");
static_assert(WARPS_M == 1 || WARPS_K == 1 || WARPS_K < 16, "a named barrier a column");

struct Stage {
    uint4 weight[GROUP_TILES][K_TILES][32];
    // Of odd rows the halves of a tile are swapped: eight lanes then read two rows without meeting a bank twice.
    uint4 x[K_TILES][X_ROWS][8];
    uint4 scales[GROUP_TILES][K_TILES][UNITS][SCALE_CHUNKS];
#if ZEROS
    uint2 zeros[GROUP_TILES][K_TILES][UNITS];
#endif
};
struct Shared {
    Stage stages[WARPS_K][STAGES];
#if TILE_WARPS_K > 1
    float4 sums[WARPS_K][GROUP_TILES][TOKEN_TILES][32];
#endif
    int32_t pairs[TOKENS];
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher's sum");

struct Arguments {
    const uint16_t* x;
    const uint4* weight;
    const uint4* scales;
    const uint2* zeros;
    void* out;
    int columns, k_tiles, row_tiles, groups, out_features;
};

DEVICE void sync_column(int column) {
    if constexpr (WARPS_M == 1)
        __syncwarp();
    else if constexpr (WARPS_K == 1)
        __syncthreads();
    else
        named_barrier(1 + column, COLUMN);
}

// What a thread copies next: stages of a column, one row group after the other.
struct Source {
    static constexpr int CHUNKS = K_TILES * 8, ROWS = COLUMN / CHUNKS, COPIES = (X_ROWS + ROWS - 1) / ROWS;
    static constexpr int PIECES = ROW_TILES * K_TILES * UNITS, SCALE_COPIES = (PIECES * SCALE_CHUNKS + 31) / 32;

    const uint4* weight[ROW_TILES];
    const uint4* scales[SCALE_COPIES];
#if ZEROS
    const uint2* zeros[SCALE_COPIES];
#endif
    const uint16_t* x[COPIES];
    int row_tile, k_tile, step, steps, column, lane, warp_m, thread_row, thread_chunk, rows;

    // What stands at `row_tile` and `column`'s first tile of inputs. The last row tile stands in for those beyond it, whose results nobody
    // keeps.
    DEVICE void aim(const Arguments& args, int64_t first_tile) {
        step = 0, k_tile = column * K_TILES;
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) {
            const int64_t tile = first_tile + min(row_tile + warp_m * ROW_TILES + r, args.row_tiles - 1);
            weight[r] = args.weight + (tile * args.k_tiles + k_tile) * 32 + lane;
        }
#pragma unroll
        for (int copy = 0; copy < SCALE_COPIES; ++copy) {
            const int i = copy * 32 + lane, r = i / SCALE_CHUNKS / (K_TILES * UNITS);
            const int64_t tile = first_tile + min(row_tile + warp_m * ROW_TILES + r, args.row_tiles - 1);
            scales[copy] = args.scales + tile * args.groups * SCALE_CHUNKS + i % SCALE_CHUNKS;
#if ZEROS
            zeros[copy] = args.zeros + tile * args.groups;
#endif
        }
    }

    DEVICE void advance(const Arguments& args, int64_t first_tile) {
        if (++step == steps) {
            row_tile += GROUP_TILES;
            aim(args, first_tile);
            return;
        }
        k_tile += WARPS_K * K_TILES;
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) weight[r] += WARPS_K * K_TILES * 32;
    }

    // The weights of this warp's row tiles.
    DEVICE void copy_weights(Stage& stage, const Arguments& args) const {
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
            for (int j = 0; j < K_TILES; ++j)
                if (WHOLE || k_tile + j < args.k_tiles) cp_async_16(&stage.weight[warp_m * ROW_TILES + r][j][lane], weight[r] + j * 32);
        uint4* const to = &stage.scales[warp_m * ROW_TILES][0][0][0] + lane;
#pragma unroll
        for (int copy = 0; copy < SCALE_COPIES; ++copy) {
            const int i = copy * 32 + lane, piece = i / SCALE_CHUNKS;
            if (PIECES * SCALE_CHUNKS % 32 != 0 && piece >= PIECES) break;
            const uint32_t input = (k_tile + piece / UNITS % K_TILES) * 64 + piece % UNITS * UNIT;
            int group = static_cast<int>(input / GROUP_SIZE);
            if (!WHOLE) group = min(group, args.groups - 1);
            cp_async_16(to + copy * 32, scales[copy] + group * SCALE_CHUNKS);
#if ZEROS
            if (i % SCALE_CHUNKS == 0) cp_async_8(&stage.zeros[warp_m * ROW_TILES][0][0] + piece, zeros[copy] + group);
#endif
        }
    }

    // A thread has one place of every ROWS-th row.
    DEVICE void aim_x(const Arguments& args, const int32_t* pairs, int count, int thread, int first_token, int top_k) {
        thread_row = thread / CHUNKS, thread_chunk = thread % CHUNKS, rows = count - thread_row;
#pragma unroll
        for (int copy = 0; copy < COPIES; ++copy) {
            const int pair = copy * ROWS < rows ? pairs[copy * ROWS + thread_row] : 0;
            const int row = GATE_UP ? first_token + pair / top_k : pair;
            x[copy] = args.x + static_cast<int64_t>(row) * args.columns + thread_chunk * 8;
        }
    }

    DEVICE void copy_x(Stage& stage, const Arguments& args) const {
        // With an odd step, rows of odd copies have the other parity.
        uint4* const row = &stage.x[0][0][0] + (thread_chunk / 8 * X_ROWS + thread_row) * 8;
        uint4* const to = row + (thread_chunk % 8 ^ (thread_row & 1) << 2);
        uint4* const other = row + (thread_chunk % 8 ^ (~thread_row & 1) << 2);
#pragma unroll
        for (int copy = 0; copy < COPIES; ++copy) {
            if (copy * ROWS >= rows) continue;
            uint4* const place = ROWS % 2 != 0 && copy % 2 != 0 ? other : to;
            const uint16_t* from = x[copy] + k_tile * 64;
            if constexpr (WHOLE) {
                cp_async_16(place + copy * ROWS * 8, from);
            } else {
                const bool valid = k_tile * 64 + thread_chunk * 8 < args.columns;
                cp_async_16_or_zero(place + copy * ROWS * 8, valid ? from : args.x, valid);
            }
        }
    }
};

// Adds the products of a unit and COUNT tiles of tokens from the `n`-th on.
template <int COUNT>
DEVICE void add_products(float (&acc)[ROW_TILES][TOKEN_TILES][4], const uint32_t (&a)[ROW_TILES][UNIT / 16][4],
                         const float2 (&scale)[ROW_TILES], const uint4 (&x)[X_ROWS][8], int unit, int n, int count, int lane) {
    const int g = lane / 4, t = lane % 4;
    float part[COUNT][ROW_TILES][4] = {};
#pragma unroll
    for (int h = 0; h < UNIT / 32; ++h) {
        uint32_t b[COUNT][2][2];
#pragma unroll
        for (int c = 0; c < COUNT; ++c) {
            // A lone tile of tokens has no rows of zeros: what stands in columns of no token is not kept.
            const int token = TOKEN_TILES > 1 ? (n + c) * 8 + g : g < count ? g : 0;
            const uint4 four = x[token][((unit * (UNIT / 32) + h) * 4 + t) ^ (token & 1) << 2];
            b[c][0][0] = four.x, b[c][0][1] = four.y, b[c][1][0] = four.z, b[c][1][1] = four.w;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
                for (int c = 0; c < COUNT; ++c) mma_bf16(part[c][r], a[r][2 * h + i], b[c][i]);
    }
#pragma unroll
    for (int c = 0; c < COUNT; ++c)
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) {
            float(&sum)[4] = acc[r][n + c];
            sum[0] = fmaf(part[c][r][0], scale[r].x, sum[0]);
            sum[1] = fmaf(part[c][r][1], scale[r].x, sum[1]);
            sum[2] = fmaf(part[c][r][2], scale[r].y, sum[2]);
            sum[3] = fmaf(part[c][r][3], scale[r].y, sum[3]);
        }
}

// Adds the products of one stage: acc[r][n] is row tile r against tokens 8 n to 8 n + 7.
DEVICE void multiply(float (&acc)[ROW_TILES][TOKEN_TILES][4], const Stage& stage, int k_tiles, int count, int warp_m, int lane) {
    const int g = lane / 4;
#pragma unroll
    for (int j = 0; j < K_TILES; ++j) {
        if (!WHOLE && j >= k_tiles) break;
#pragma unroll
        for (int unit = 0; unit < UNITS; ++unit) {
            constexpr int WORDS = UNIT / 16;
            uint32_t a[ROW_TILES][WORDS][4];
            float2 scale[ROW_TILES];
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r) {
                const int row = warp_m * ROW_TILES + r;
                uint32_t low = INT4_OFFSET_SYMMETRIC, high = INT4_OFFSET_SYMMETRIC;
#if ZEROS
                const uint32_t zero = reinterpret_cast<const uint8_t*>(&stage.zeros[row][j][unit])[g];
                low = int4_offset(zero), high = int4_offset(zero >> 4);
#endif
                uint32_t words[4];
                const uint4 four = stage.weight[row][j][lane];
                words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
#pragma unroll
                for (int i = 0; i < WORDS; ++i) int4_fragment(words[unit * WORDS + i], low, high, a[r][i]);
                scale[r] = int4_scale<SCALE_TYPE>(&stage.scales[row][j][unit], g).widen();
            }
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; n += 2) {
                if (n > 0 && n * 8 >= count) break;
                if constexpr (TOKEN_TILES == 1) {
                    add_products<1>(acc, a, scale, stage.x[j], unit, n, count, lane);
                } else if (n + 1 < TOKEN_TILES && n * 8 + 8 < count) {
                    add_products<2>(acc, a, scale, stage.x[j], unit, n, count, lane);
                } else {
                    add_products<1>(acc, a, scale, stage.x[j], unit, n, count, lane);
                }
            }
        }
    }
}

DEVICE float silu(float x) { return x / (1.0f + exp2_approx(-1.44269504f * x)); }

// Writes the results of a bundle of row tiles and a tile of tokens: c[0], c[1] are row g of tokens 2t, 2t + 1, c[2], c[3] row g + 8.
DEVICE void store(const Arguments& args, const int32_t* pairs, int count, int row_tile, int token_tile, int lane,
                  const float (&c)[BUNDLE][4]) {
    if (row_tile >= args.row_tiles) return;
    const int g = lane / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int token = token_tile * 8 + lane % 4 * 2 + i;
        if (token >= count) continue;
        const int64_t pair = pairs[token];
#if GATE_UP
        static_cast<uint16_t*>(args.out)[pair * args.out_features + row_tile * 8 + g] = float_to_bf16(silu(c[0][i]) * c[0][i + 2]);
#elif PACKED
        // A tile beyond the last, which stands for another, has no part in the scale.
        const bool both = row_tile + 1 < args.row_tiles;
        const float four[4] = {c[0][i], c[0][i + 2], both ? c[1][i] : 0.0f, both ? c[1][i + 2] : 0.0f};
        static_cast<uint2*>(args.out)[(pair * ((args.row_tiles + 1) / 2) + row_tile / 2) * 8 + g] = pack_part(four);
#else
        float* out = static_cast<float*>(args.out) + pair * args.out_features;
        const int feature = row_tile * 16 + g;
        if (feature < args.out_features) out[feature] = c[0][i];
        if (feature + 8 < args.out_features) out[feature + 8] = c[0][i + 2];
#endif
    }
}

// What comes next reads other weights of the same expert: `part` of `parts` blocks bring `share` 256ths of their first bytes to the L2,
// while the memory has nothing else to do.
struct Next {
    const uint8_t* data[3];
    int bytes[3];

    DEVICE void prefetch(int expert, int share, int part, int parts) const {
        constexpr int LINE = 32;
#pragma unroll
        for (int i = 0; i < 2 + ZEROS; ++i) {
            const uint8_t* first = data[i] + static_cast<int64_t>(expert) * bytes[i];
            const int end = static_cast<int>(static_cast<int64_t>(bytes[i]) * share / 256);
            for (int at = (part * THREADS + threadIdx.x) * LINE; at < end; at += parts * THREADS * LINE) prefetch_l2(first + at);
        }
    }
};

// `x` [rows, columns] bf16: of a token at row `first_token` + pair / top_k (gate-up), or of a pair; columns are a multiple of 8. `items`
// (expert, first, count, 0) over `order`, pairs of token and k by expert; without SORTED the topk_ids. `out` [pairs, out_features]: bf16
// of whole row tiles (gate-up), or f32, or packed parts. Grid: ranges of `row_groups` row groups and items, without SORTED the other way
// round; then `next_` is what down reads.
KERNEL void __launch_bounds__(THREADS, TILE_BLOCKS)
moe_int4(const uint16_t* x, const uint4* weight, const uint4* scales, const uint2* zeros, const int32_t* items, const int32_t* order,
         void* out, int experts, int columns, int k_tiles, int row_tiles, int groups, int out_features, int top_k, int first_token,
         int row_groups, const uint8_t* next_weight, const uint8_t* next_scales, const uint8_t* next_zeros, int next_weight_bytes,
         int next_scales_bytes, int next_zeros_bytes, int next_share) {
    Shared& shared = shared_memory<Shared>();
    const Arguments args = {x, weight, scales, zeros, out, columns, k_tiles, row_tiles, groups, out_features};
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = warp / WARPS_M, warp_m = warp % WARPS_M;
    const int thread = threadIdx.x % COLUMN;

#if SORTED
    const int4 item = reinterpret_cast<const int4*>(items)[blockIdx.y];
    const int expert = item.x, count = item.z, range = blockIdx.x;
    if (count == 0) return;
#else
    const int expert = items[static_cast<int64_t>(first_token) * top_k + blockIdx.x], count = 1, range = blockIdx.y;
    if (expert < 0 || expert >= experts) return;
#endif
    for (int i = threadIdx.x; i < count; i += THREADS) {
#if SORTED
        shared.pairs[i] = order[item.y + i];
#else
        shared.pairs[i] = blockIdx.x;
#endif
    }
    Stage(&ring)[STAGES] = shared.stages[column];
    if constexpr (TOKEN_TILES > 1) {
        // Zeros up to a whole tile of tokens: no copy writes there.
        const int rows = (count + 7) / 8 * 8 - count;
        for (int i = thread; i < STAGES * K_TILES * rows * 8; i += COLUMN)
            ring[i / 8 / rows / K_TILES].x[i / 8 / rows % K_TILES][count + i / 8 % rows][i % 8] = make_uint4(0, 0, 0, 0);
    }

    const int steps = (k_tiles + WARPS_K * K_TILES - 1) / (WARPS_K * K_TILES);
    const int first_row_tile = range * row_groups * GROUP_TILES;
    const int my_groups = min(row_groups, (row_tiles - first_row_tile + GROUP_TILES - 1) / GROUP_TILES);
    const int all_steps = my_groups * steps;
    const int64_t first_tile = static_cast<int64_t>(expert) * row_tiles;

    // The first weights are under way before it is known whose rows they meet.
    Source source;
    source.lane = lane, source.warp_m = warp_m, source.column = column, source.steps = steps, source.row_tile = first_row_tile;
    source.aim(args, first_tile);
    Source rows = source;
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        if (i < all_steps) source.copy_weights(ring[i], args);
        source.advance(args, first_tile);
    }
    __syncthreads();
    rows.aim_x(args, shared.pairs, count, thread, first_token, top_k);
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        if (i < all_steps) rows.copy_x(ring[i], args);
        cp_async_commit();
        rows.advance(args, first_tile);
    }
    source = rows;

    float acc[ROW_TILES][TOKEN_TILES][4] = {};
    int slot = 0, step = 0, row_tile = first_row_tile;
    for (int i = 0; i < all_steps; ++i) {
        cp_async_wait<STAGES - 2>();
        sync_column(column);
        if (i + STAGES - 1 < all_steps) {
            Stage& next = ring[slot == 0 ? STAGES - 1 : slot - 1];
            source.copy_weights(next, args);
            source.copy_x(next, args);
        }
        cp_async_commit();
        source.advance(args, first_tile);
        multiply(acc, ring[slot], k_tiles - (step * WARPS_K + column) * K_TILES, count, warp_m, lane);
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        if (++step < steps) continue;
        step = 0;

#if GATE_UP && !SORTED
        // The later half of the blocks does it: what the first had brought would be gone by then.
        const int late = static_cast<int>(gridDim.y) / 2;
        if (i + 1 == all_steps && next_share > 0 && range >= late) {
            const Next next = {{next_weight, next_scales, next_zeros}, {next_weight_bytes, next_scales_bytes, next_zeros_bytes}};
            next.prefetch(expert, next_share, range - late, static_cast<int>(gridDim.y) - late);
        }
#endif
#if TILE_WARPS_K > 1
        if (i >= steps) __syncthreads();
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n)
                shared.sums[column][warp_m * ROW_TILES + r][n][lane] =
                    make_float4(acc[r][n][0], acc[r][n][1], acc[r][n][2], acc[r][n][3]);
        __syncthreads();
        for (int tile = warp; tile < GROUP_TILES / BUNDLE * TOKEN_TILES; tile += WARPS) {
            const int row = tile / TOKEN_TILES * BUNDLE, n = tile % TOKEN_TILES;
            float c[BUNDLE][4] = {};
#pragma unroll
            for (int b = 0; b < BUNDLE; ++b)
#pragma unroll
                for (int k = 0; k < WARPS_K; ++k) {
                    const float4 four = shared.sums[k][row + b][n][lane];
                    c[b][0] += four.x, c[b][1] += four.y, c[b][2] += four.z, c[b][3] += four.w;
                }
            store(args, shared.pairs, count, row_tile + row, n, lane, c);
        }
#else
#pragma unroll
        for (int r = 0; r < ROW_TILES; r += BUNDLE)
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n) {
                if (n > 0 && n * 8 >= count) break;
                float c[BUNDLE][4];
#pragma unroll
                for (int b = 0; b < BUNDLE; ++b)
#pragma unroll
                    for (int i = 0; i < 4; ++i) c[b][i] = acc[r + b][n][i];
                store(args, shared.pairs, count, row_tile + warp_m * ROW_TILES + r, n, lane, c);
            }
#endif
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
                for (int c = 0; c < 4; ++c) acc[r][n][c] = 0.0f;
        row_tile += GROUP_TILES;
    }
    cp_async_wait<0>();
}
