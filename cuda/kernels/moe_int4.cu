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
#include "moe_next.cuh"
#include "moe_parts.cuh"
#include "silu.cuh"

constexpr int WARPS_M = TILE_WARPS_M, WARPS_K = TILE_WARPS_K, WARPS = WARPS_M * WARPS_K, THREADS = 32 * WARPS, COLUMN = 32 * WARPS_M;
constexpr int ROW_TILES = TILE_ROW_TILES, GROUP_TILES = WARPS_M * ROW_TILES;
constexpr int TOKENS = TILE_TOKENS, TOKEN_TILES = TOKENS / 8;
constexpr int K_TILES = TILE_K_TILES, STAGES = TILE_STAGES, UNITS = 64 / UNIT;
// Row tiles whose results are written together.
constexpr int BUNDLE = PACKED ? 2 : 1;
// Of many tokens, rows of the next two tiles are read from shared memory while these are multiplied.
constexpr bool AHEAD = TOKEN_TILES > 4;
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
    // Where a pair's row of `out` begins.
    int32_t rows[TOKENS];
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

// What a thread copies next: stages of a column, one row group after the other. All that moves from stage to stage is kept and moved,
// places in shared memory (`to`, in units of 16 bytes) among it: what the compiler can work out again, it does, at every copy.
struct Source {
    static constexpr int CHUNKS = K_TILES * 8, ROWS = COLUMN / CHUNKS, COPIES = (X_ROWS + ROWS - 1) / ROWS;
    static constexpr int PIECES = ROW_TILES * K_TILES * UNITS, SCALE_COPIES = (PIECES * SCALE_CHUNKS + 31) / 32;

    const uint4* weight[ROW_TILES];
    const uint4* scales[SCALE_COPIES];
    const uint16_t* x[COPIES];
    int weight_to, scales_to, x_to, other_parity;
#if ZEROS
    const uint2* zeros[SCALE_COPIES];
    int zeros_to;
#endif
    int row_tile, k_tile, step, steps, column, slot, lane, warp_m, rows, x_column;

    DEVICE void start(const Stage& first) {
        const uint4* all = reinterpret_cast<const uint4*>(&shared_memory<Shared>());
        slot = 0;
        weight_to = static_cast<int>(&first.weight[warp_m * ROW_TILES][0][lane] - all);
        scales_to = static_cast<int>(&first.scales[warp_m * ROW_TILES][0][0][0] - all) + lane;
#if ZEROS
        zeros_to = static_cast<int>(&first.zeros[warp_m * ROW_TILES][0][0] - reinterpret_cast<const uint2*>(all)) + lane / SCALE_CHUNKS;
#endif
    }

    // A thread has one place of every ROWS-th row.
    DEVICE void start_x(const Stage& first, const Arguments& args, const int32_t* pairs, int count, int thread, int first_token,
                        int top_k) {
        const uint4* all = reinterpret_cast<const uint4*>(&shared_memory<Shared>());
        const int row = thread / CHUNKS, j = thread / 8 % K_TILES, chunk = thread % 8;
        rows = count - row, x_column = thread % CHUNKS * 8;
        x_to = static_cast<int>(&first.x[0][0][0] - all) + (j * X_ROWS + row) * 8 + (chunk ^ (row & 1) << 2);
        // With an odd step, rows of odd copies have the other parity.
        other_parity = ROWS % 2 == 0 ? 0 : (chunk ^ (~row & 1) << 2) - (chunk ^ (row & 1) << 2);
#pragma unroll
        for (int copy = 0; copy < COPIES; ++copy) {
            const int pair = copy * ROWS < rows ? pairs[copy * ROWS + row] : 0;
            const int source = GATE_UP ? first_token + pair / top_k : pair;
            x[copy] = args.x + static_cast<int64_t>(source) * args.columns + column * K_TILES * 64 + x_column;
        }
    }

    // At `row_tile` and the column's first tile of inputs. The last row tile stands in for those beyond it, whose results nobody keeps.
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
        constexpr int UNITS_OF_16 = sizeof(Stage) / 16, K_STEP = WARPS_K * K_TILES;
        const int hop = ++slot == STAGES ? (1 - STAGES) * UNITS_OF_16 : UNITS_OF_16;
        if (slot == STAGES) slot = 0;
        weight_to += hop, scales_to += hop, x_to += hop;
#if ZEROS
        zeros_to += 2 * hop;
#endif
        const bool again = ++step == steps;
        const int x_step = again ? (1 - steps) * K_STEP * 64 : K_STEP * 64;
#pragma unroll
        for (int copy = 0; copy < COPIES; ++copy) x[copy] += x_step;
        if (again) {
            row_tile += GROUP_TILES;
            aim(args, first_tile);
        } else {
            k_tile += K_STEP;
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r) weight[r] += K_STEP * 32;
        }
    }

    // The weights of this warp's row tiles.
    DEVICE void copy_weights(const Arguments& args) const {
        uint4* all = reinterpret_cast<uint4*>(&shared_memory<Shared>());
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
            for (int j = 0; j < K_TILES; ++j)
                if (WHOLE || k_tile + j < args.k_tiles) cp_async_16(all + weight_to + (r * K_TILES + j) * 32, weight[r] + j * 32);
#pragma unroll
        for (int copy = 0; copy < SCALE_COPIES; ++copy) {
            const int i = copy * 32 + lane, piece = i / SCALE_CHUNKS;
            if (PIECES * SCALE_CHUNKS % 32 != 0 && piece >= PIECES) break;
            const uint32_t input = (k_tile + piece / UNITS % K_TILES) * 64 + piece % UNITS * UNIT;
            int group = static_cast<int>(input / GROUP_SIZE);
            if (!WHOLE) group = min(group, args.groups - 1);
            cp_async_16(all + scales_to + copy * 32, scales[copy] + group * SCALE_CHUNKS);
#if ZEROS
            if (i % SCALE_CHUNKS == 0)
                cp_async_8(reinterpret_cast<uint2*>(all) + zeros_to + copy * (32 / SCALE_CHUNKS), zeros[copy] + group);
#endif
        }
    }

    DEVICE void copy_x(const Arguments& args) const {
        uint4* all = reinterpret_cast<uint4*>(&shared_memory<Shared>());
        const bool valid = WHOLE || k_tile * 64 + x_column < args.columns;
#pragma unroll
        for (int copy = 0; copy < COPIES; ++copy) {
            if (copy * ROWS >= rows) continue;
            uint4* to = all + x_to + copy * ROWS * 8 + (ROWS % 2 != 0 && copy % 2 != 0 ? other_parity : 0);
            if constexpr (WHOLE)
                cp_async_16(to, x[copy]);
            else
                cp_async_16_or_zero(to, valid ? x[copy] : args.x, valid);
        }
    }
};

// Adds the products of a unit and COUNT tiles of tokens from the `n`-th on.
template <int COUNT>
DEVICE void add_products(float (&acc)[ROW_TILES][TOKEN_TILES][4], const uint32_t (&a)[ROW_TILES][UNIT / 16][4],
                         const float2 (&scale)[ROW_TILES], const uint4* const (&x)[2], int unit, int n) {
    float part[COUNT][ROW_TILES][4] = {};
#pragma unroll
    for (int h = 0; h < UNIT / 32; ++h) {
        uint32_t b[COUNT][2][2];
#pragma unroll
        for (int c = 0; c < COUNT; ++c) {
            const uint4 four = x[unit * (UNIT / 32) + h][(n + c) * 64];
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

// What a unit takes of two tiles of tokens.
struct TwoTiles {
    uint4 b[2][UNIT / 32];

    DEVICE void load(const uint4* const (&x)[2], int unit, int n, int last) {
        const int tiles[2] = {n * 64, min(n + 1, last) * 64};
#pragma unroll
        for (int c = 0; c < 2; ++c)
#pragma unroll
            for (int h = 0; h < UNIT / 32; ++h) b[c][h] = x[unit * (UNIT / 32) + h][tiles[c]];
    }

    // Of the last two, the second may stand for none: its sums are not kept.
    DEVICE void add(float (&acc)[ROW_TILES][TOKEN_TILES][4], const uint32_t (&a)[ROW_TILES][UNIT / 16][4],
                    const float2 (&scale)[ROW_TILES], int n) const {
        float part[2][ROW_TILES][4] = {};
#pragma unroll
        for (int h = 0; h < UNIT / 32; ++h)
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        const uint32_t pair[2] = {i == 0 ? b[c][h].x : b[c][h].z, i == 0 ? b[c][h].y : b[c][h].w};
                        mma_bf16(part[c][r], a[r][2 * h + i], pair);
                    }
#pragma unroll
        for (int c = 0; c < 2; ++c)
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r) {
                if (n + c >= TOKEN_TILES) break;
                float(&sum)[4] = acc[r][n + c];
                sum[0] = fmaf(part[c][r][0], scale[r].x, sum[0]);
                sum[1] = fmaf(part[c][r][1], scale[r].x, sum[1]);
                sum[2] = fmaf(part[c][r][2], scale[r].y, sum[2]);
                sum[3] = fmaf(part[c][r][3], scale[r].y, sum[3]);
            }
    }
};

// Adds the products of one stage: acc[r][n] is row tile r against tokens 8 n to 8 n + 7.
DEVICE void multiply(float (&acc)[ROW_TILES][TOKEN_TILES][4], const Stage& stage, int k_tiles, int count, int warp_m, int lane) {
    const int g = lane / 4, t = lane % 4;
    // A lone tile of tokens has no rows of zeros: what stands in columns of no token is not kept.
    const int row = TOKEN_TILES > 1 || g < count ? g : 0;
#pragma unroll
    for (int j = 0; j < K_TILES; ++j) {
        if (!WHOLE && j >= k_tiles) break;
        const uint4* tile_x = &stage.x[j][0][0] + row * 8;
        const uint4* const x[2] = {tile_x + (t ^ (row & 1) << 2), tile_x + ((t + 4) ^ (row & 1) << 2)};
#pragma unroll
        for (int unit = 0; unit < UNITS; ++unit) {
            constexpr int WORDS = UNIT / 16;
            const int last = (count - 1) / 8;
            TwoTiles two[2];
            if constexpr (AHEAD) two[0].load(x, unit, 0, last);
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
                if constexpr (AHEAD) {
                    if (n + 2 < TOKEN_TILES && n + 2 <= last) two[(n / 2 + 1) % 2].load(x, unit, n + 2, last);
                    two[n / 2 % 2].add(acc, a, scale, n);
                    continue;
                }
                if constexpr (TOKEN_TILES == 1) {
                    add_products<1>(acc, a, scale, x, unit, n);
                } else if (n + 1 < TOKEN_TILES && n * 8 + 8 < count) {
                    add_products<2>(acc, a, scale, x, unit, n);
                } else {
                    add_products<1>(acc, a, scale, x, unit, n);
                }
            }
        }
    }
}

// From row to row of `out`, in what is written at once.
DEVICE int out_pitch(const Arguments& args) { return PACKED ? (args.row_tiles + 1) / 2 * 8 : args.out_features; }

// Writes the results of a bundle of row tiles and a tile of tokens: c[0], c[1] are row g of tokens 2t, 2t + 1, c[2], c[3] row g + 8.
DEVICE void store(const Arguments& args, const int32_t* rows, int count, int row_tile, int token_tile, int lane,
                  const float (&c)[BUNDLE][4]) {
    if (row_tile >= args.row_tiles) return;
    const int g = lane / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int token = token_tile * 8 + lane % 4 * 2 + i;
        if (token >= count) continue;
        const int row = rows[token];
#if GATE_UP
        static_cast<uint16_t*>(args.out)[row + row_tile * 8 + g] = float_to_bf16(swiglu(c[0][i], c[0][i + 2]));
#elif PACKED
        // A tile beyond the last was given the last one's weights: its numbers are the same, and so is the largest.
        const float four[4] = {c[0][i], c[0][i + 2], c[1][i], c[1][i + 2]};
        static_cast<uint2*>(args.out)[row + row_tile / 2 * 8 + g] = pack_part(four);
#else
        float* out = static_cast<float*>(args.out) + row;
        const int feature = row_tile * 16 + g;
        if (feature < args.out_features) out[feature] = c[0][i];
        if (feature + 8 < args.out_features) out[feature + 8] = c[0][i + 2];
#endif
    }
}

// An item: tokens of an expert, whose pairs are `order[first]` on, or `first` alone.
struct Item {
    int expert, first, count;
    // Of what comes next, what this block brings to the L2: `parts` is 0 where it brings nothing.
    int next_expert, part, parts;
};

// A range of row groups of an item.
DEVICE void multiply_item(Shared& shared, const Arguments& args, const Item& item, const int32_t* order, int range, int row_groups,
                          int top_k, int first_token, const Next& next, int next_share) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = warp / WARPS_M, warp_m = warp % WARPS_M;
    const int thread = threadIdx.x % COLUMN, count = item.count, k_tiles = args.k_tiles;
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const int pair = SORTED ? order[item.first + i] : item.first;
        shared.pairs[i] = pair;
        shared.rows[i] = pair * out_pitch(args);
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
    const int my_groups = min(row_groups, (args.row_tiles - first_row_tile + GROUP_TILES - 1) / GROUP_TILES);
    const int all_steps = my_groups * steps;
    const int64_t first_tile = static_cast<int64_t>(item.expert) * args.row_tiles;

    // The first weights are under way before it is known whose rows they meet.
    Source source = {};
    source.lane = lane, source.warp_m = warp_m, source.column = column, source.steps = steps, source.row_tile = first_row_tile;
    source.start(ring[0]);
    source.aim(args, first_tile);
    Source rows = source;
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        if (i < all_steps) source.copy_weights(args);
        source.advance(args, first_tile);
    }
    __syncthreads();
    rows.start_x(ring[0], args, shared.pairs, count, thread, first_token, top_k);
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        if (i < all_steps) rows.copy_x(args);
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
            source.copy_weights(args);
            source.copy_x(args);
        }
        cp_async_commit();
        source.advance(args, first_tile);
        multiply(acc, ring[slot], k_tiles - (step * WARPS_K + column) * K_TILES, count, warp_m, lane);
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        if (++step < steps) continue;
        step = 0;

        if (GATE_UP && item.parts > 0 && i + 1 == all_steps) next.prefetch<THREADS>(item.next_expert, next_share, item.part, item.parts);
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
            store(args, shared.rows, count, row_tile + row, n, lane, c);
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
                store(args, shared.rows, count, row_tile + warp_m * ROW_TILES + r, n, lane, c);
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

// `x` [rows, columns] bf16: of a token at row `first_token` + pair / top_k (gate-up), or of a pair; columns are a multiple of 8. `items`
// (expert, first, count, 0) over `order`, pairs of token and k by expert, the unused ones last; without SORTED the topk_ids. `out`
// [pairs, out_features]: bf16 of whole row tiles (gate-up), or f32, or packed parts. `next_` is what down reads, of which the last
// `late_items` items (without SORTED, the later half of the ranges) bring a part to the L2: what were brought sooner would be gone by then.
// Grid: ranges of `row_groups` row groups and items (all of them without SEVERAL_ITEMS), for down and without SORTED the other way round.
KERNEL void __launch_bounds__(THREADS, TILE_BLOCKS)
moe_int4(const uint16_t* x, const uint4* weight, const uint4* scales, const uint2* zeros, const int32_t* items, const int32_t* order,
         void* out, int experts, int columns, int k_tiles, int row_tiles, int groups, int out_features, int top_k, int first_token,
         int row_groups, int item_count, int late_items, const uint8_t* next_weight, const uint8_t* next_scales, const uint8_t* next_zeros,
         int next_weight_bytes, int next_scales_bytes, int next_zeros_bytes, int next_share) {
    Shared& shared = shared_memory<Shared>();
    const Arguments args = {x, weight, scales, zeros, out, columns, k_tiles, row_tiles, groups, out_features};
    const Next next = {{next_weight, next_scales, next_zeros}, {next_weight_bytes, next_scales_bytes, next_zeros_bytes}};
#if SORTED
    // Registers that the sums of many tokens need are not kept for a next item.
    constexpr bool SEVERAL_ITEMS = TOKENS <= 32;
    const int4* all = reinterpret_cast<const int4*>(items);
    // Gate-up's blocks that run together share a token's rows. Down goes through the features as a whole, so that of its results the last
    // features are in the L2 when the sum begins with them.
    const int range = GATE_UP ? blockIdx.x : blockIdx.y, ranges = gridDim.x;
    const int first_item = GATE_UP ? blockIdx.y : blockIdx.x, item_step = GATE_UP ? gridDim.y : gridDim.x;
    for (int at = first_item; at < item_count; at += item_step) {
        const int4 tokens = all[at];
        if (tokens.z == 0) return;
        Item item = {tokens.x, tokens.y, tokens.z, 0, range, 0};
        if (GATE_UP && late_items > 0 && (at + late_items >= item_count || all[at + late_items].z == 0))
            item.next_expert = all[at % late_items].x, item.parts = ranges;
        // All are done with the item before.
        if (at >= item_step) __syncthreads();
        multiply_item(shared, args, item, order, range, row_groups, top_k, first_token, next, next_share);
        if (!SEVERAL_ITEMS) return;
    }
#else
    const int expert = items[static_cast<int64_t>(first_token) * top_k + blockIdx.x], range = blockIdx.y;
    if (expert < 0 || expert >= experts) return;
    const int late = static_cast<int>(gridDim.y) / 2, parts = late_items > 0 && range >= late ? static_cast<int>(gridDim.y) - late : 0;
    const Item item = {expert, static_cast<int>(blockIdx.x), 1, expert, range - late, parts};
    multiply_item(shared, args, item, order, range, row_groups, top_k, first_token, next, next_share);
#endif
}
