// Routed experts, INT4: the product of an expert's weight with the rows of the tokens that chose it, gate and up (GATE_UP) or down.
//
// A share of work is a range of row groups, WARPS_M * ROW_TILES tiles of 16 features each, of one item, up to TILE_TOKENS tokens of one
// expert. Features lie on the 16 rows of an `mma` and tokens on its 8 columns. WARPS_K columns of WARPS_M warps share out the inputs: each
// column is a pipeline of its own, with a ring of stages that its copies run ahead in, across row groups and shares; a warp loads the
// weights that it uses, the tokens' rows are shared by the column. Sums of columns are added up in a fixed order.
//
// Constants: GATE_UP; SORTED (items from `moe_sort`) or one item a pair of token and k; SCALE_TYPE, GROUP_SIZE, UNIT (inputs that surely
// share a scale: 32 or 64), ZEROS; an expert's ALL_ROW_TILES, ALL_K_TILES and GROUPS; PACKED. Tile: TILE_WARPS_M, TILE_WARPS_K,
// TILE_ROW_TILES, TILE_TOKENS, TILE_K_TILES a stage, TILE_STAGES, TILE_BLOCKS.
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
constexpr int ROW_GROUPS = (ALL_ROW_TILES + GROUP_TILES - 1) / GROUP_TILES;
// From stage to stage of a column, and how many there are.
constexpr int K_STEP = WARPS_K * K_TILES, STEPS = (ALL_K_TILES + K_STEP - 1) / K_STEP;
// No row group ends early. That no stage does, and no row, is what WHOLE says.
constexpr bool WHOLE_ROWS = ALL_ROW_TILES % GROUP_TILES == 0;
// Row tiles whose results are written together.
constexpr int BUNDLE = PACKED ? 2 : 1;
// Of many tokens, rows of the next two tiles are read from shared memory while these are multiplied.
constexpr bool AHEAD = TOKEN_TILES > 4;
// A block takes one share after the other. Of many tokens, registers that the sums need are not kept for a next share: there it takes one.
constexpr bool STREAM = SORTED && TOKENS <= 32;
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
};
static_assert(sizeof(Shared) == TILE_SHARED_BYTES, "the launcher's sum");

struct Arguments {
    const uint16_t* x;
    const uint4* weight;
    const uint4* scales;
    const uint2* zeros;
    const int4* items;
    const int32_t* order;
    void* out;
    int columns, out_features, top_k, first_token, row_groups, item_count, ranges;
};

// A share of work: tokens of an expert, whose pairs are `order[first]` on, or `first` alone, and which of the item's ranges. None without
// tokens.
struct Share {
    int expert, first, count, range;

    DEVICE int row_tile(const Arguments& args) const { return range * args.row_groups * GROUP_TILES; }
    DEVICE int row_groups(const Arguments& args) const {
        return min(args.row_groups, ROW_GROUPS - range * args.row_groups);
    }
    DEVICE int pair(const Arguments& args, int token) const { return SORTED ? args.order[first + token] : first; }
};

// The shares that a block takes: of those of all items, in their order, every `step`-th.
struct Shares {
    int item, range, items_a_step, ranges_a_step;

    DEVICE void start(const Arguments& args, int first, int step) {
        item = first / args.ranges, range = first % args.ranges, items_a_step = step / args.ranges, ranges_a_step = step % args.ranges;
    }

    DEVICE Share take(const Arguments& args) {
        Share share = {0, 0, 0, range};
        if (item < args.item_count) {
            const int4 found = args.items[item];
            share.expert = found.x, share.first = found.y, share.count = found.z;
        }
        item += items_a_step, range += ranges_a_step;
        if (range >= args.ranges) range -= args.ranges, ++item;
        return share;
    }
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
    // Where a stage has whole groups, a piece's group lies as far from the stage's first in every stage.
    static constexpr bool WHOLE_GROUPS = WHOLE && WHOLE_ROWS && K_TILES * 64 % GROUP_SIZE == 0;

    const uint4* weight;
    const uint4* scales;
    // Rows, from this thread's place in the column's first stage on.
    const uint16_t* x[COPIES];
    int weight_to, scales_to, x_to, other_parity;
#if ZEROS
    const uint2* zeros;
    int zeros_to;
#endif
    // How far a piece's group is from the first, where that is the same in every stage.
    int groups_on[SCALE_COPIES];
    int row_tile, row_groups, k_tile, step, column, slot, lane, warp_m, row, x_column;
    // Rows from this thread's first on: those of tokens, and those of whole tiles of tokens.
    int rows, filled;
    int64_t first_tile;
    // The share that comes next, with this thread's pairs of it, and the one after: what they are is on its way a share ahead.
    Share next, after;
    Shares shares;
    int pairs[COPIES];

    DEVICE void start(const Stage& first, int thread) {
        const uint4* all = reinterpret_cast<const uint4*>(&shared_memory<Shared>());
        slot = 0;
        weight_to = static_cast<int>(&first.weight[warp_m * ROW_TILES][0][lane] - all);
        scales_to = static_cast<int>(&first.scales[warp_m * ROW_TILES][0][0][0] - all) + lane;
#if ZEROS
        zeros_to = static_cast<int>(&first.zeros[warp_m * ROW_TILES][0][0] - reinterpret_cast<const uint2*>(all)) + lane / SCALE_CHUNKS;
#endif
#pragma unroll
        for (int copy = 0; copy < SCALE_COPIES; ++copy) {
            const int piece = (copy * 32 + lane) / SCALE_CHUNKS;
            groups_on[copy] = (piece / UNITS % K_TILES * 64 + piece % UNITS * UNIT) / GROUP_SIZE + piece / (K_TILES * UNITS) * GROUPS;
        }
        // A thread has one place of every ROWS-th row.
        row = thread / CHUNKS;
        const int j = thread / 8 % K_TILES, chunk = thread % 8;
        x_column = thread % CHUNKS * 8;
        x_to = static_cast<int>(&first.x[0][0][0] - all) + (j * X_ROWS + row) * 8 + (chunk ^ (row & 1) << 2);
        // With an odd step, rows of odd copies have the other parity.
        other_parity = ROWS % 2 == 0 ? 0 : (chunk ^ (~row & 1) << 2) - (chunk ^ (row & 1) << 2);
    }

    DEVICE bool live() const { return row_groups > 0; }

    DEVICE void find_pairs(const Arguments& args) {
#pragma unroll
        for (int copy = 0; copy < COPIES; ++copy)
            pairs[copy] = copy * ROWS + row < next.count ? next.pair(args, copy * ROWS + row) : 0;
    }

    // Goes on to the weights of the next share.
    DEVICE void begin(const Arguments& args) {
        row_groups = next.count > 0 ? next.row_groups(args) : 0;
        row_tile = next.row_tile(args);
        first_tile = static_cast<int64_t>(next.expert) * ALL_ROW_TILES;
        aim(args);
    }

    // And to its rows.
    DEVICE void begin_x(const Arguments& args) {
        rows = next.count - row, filled = (TOKEN_TILES > 1 ? (next.count + 7) / 8 * 8 : next.count) - row;
#pragma unroll
        for (int copy = 0; copy < COPIES; ++copy) {
            const int source = GATE_UP ? args.first_token + pairs[copy] / args.top_k : pairs[copy];
            x[copy] = args.x + static_cast<int64_t>(source) * args.columns + column * K_TILES * 64 + x_column;
        }
        if constexpr (STREAM) {
            next = after;
            find_pairs(args);
            after = shares.take(args);
        } else {
            next.count = 0;
        }
    }

    // This warp's first row tile, and how far its row tile number `r` is from that. The last row tile stands in for those beyond it, whose
    // results nobody keeps.
    DEVICE int first_row_tile() const {
        const int tile = row_tile + warp_m * ROW_TILES;
        return WHOLE_ROWS ? tile : min(tile, ALL_ROW_TILES - 1);
    }
    DEVICE int ahead(int r) const { return WHOLE_ROWS ? r : min(r, ALL_ROW_TILES - 1 - first_row_tile()); }

    // At `row_tile` and the column's first tile of inputs.
    DEVICE void aim(const Arguments& args) {
        step = 0, k_tile = column * K_TILES;
        const int64_t tile = first_tile + first_row_tile();
        weight = args.weight + (tile * ALL_K_TILES + k_tile) * 32 + lane;
        const int64_t group = tile * GROUPS + (WHOLE_GROUPS ? k_tile * 64 / GROUP_SIZE : 0);
        scales = args.scales + group * SCALE_CHUNKS + lane % SCALE_CHUNKS;
#if ZEROS
        zeros = args.zeros + group;
#endif
    }

    // Goes on by so many tiles and groups.
    DEVICE void move(int tiles, int groups) {
        weight += tiles * 32;
        if constexpr (WHOLE_GROUPS) {
            scales += groups * SCALE_CHUNKS;
#if ZEROS
            zeros += groups;
#endif
        }
    }

    DEVICE void advance(const Arguments& args) {
        constexpr int UNITS_OF_16 = sizeof(Stage) / 16;
        const int hop = ++slot == STAGES ? (1 - STAGES) * UNITS_OF_16 : UNITS_OF_16;
        if (slot == STAGES) slot = 0;
        weight_to += hop, scales_to += hop, x_to += hop;
#if ZEROS
        zeros_to += 2 * hop;
#endif
        constexpr int GROUPS_A_STEP = K_STEP * 64 / GROUP_SIZE;
        k_tile += K_STEP;
        if (++step < STEPS) return move(K_STEP, GROUPS_A_STEP);
        row_tile += GROUP_TILES;
        if (--row_groups > 0) {
            if constexpr (WHOLE_GROUPS) {
                step = 0, k_tile = column * K_TILES;
                move(GROUP_TILES * ALL_K_TILES - (STEPS - 1) * K_STEP, GROUP_TILES * GROUPS - (STEPS - 1) * GROUPS_A_STEP);
            } else {
                aim(args);
            }
        } else {
            begin(args);
            begin_x(args);
        }
    }

    // The weights of this warp's row tiles.
    DEVICE void copy_weights() const {
        uint4* all = reinterpret_cast<uint4*>(&shared_memory<Shared>());
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
            for (int j = 0; j < K_TILES; ++j)
                if (WHOLE || k_tile + j < ALL_K_TILES)
                    cp_async_16(all + weight_to + (r * K_TILES + j) * 32, weight + (ahead(r) * ALL_K_TILES + j) * 32);
#pragma unroll
        for (int copy = 0; copy < SCALE_COPIES; ++copy) {
            const int i = copy * 32 + lane, piece = i / SCALE_CHUNKS;
            if (PIECES * SCALE_CHUNKS % 32 != 0 && piece >= PIECES) break;
            int group = groups_on[copy];
            if constexpr (!WHOLE_GROUPS) {
                const uint32_t input = (k_tile + piece / UNITS % K_TILES) * 64 + piece % UNITS * UNIT;
                group = min(static_cast<int>(input / GROUP_SIZE), GROUPS - 1) + ahead(piece / (K_TILES * UNITS)) * GROUPS;
            }
            cp_async_16(all + scales_to + copy * 32, scales + group * SCALE_CHUNKS);
#if ZEROS
            if (i % SCALE_CHUNKS == 0) cp_async_8(reinterpret_cast<uint2*>(all) + zeros_to + copy * (32 / SCALE_CHUNKS), zeros + group);
#endif
        }
    }

    DEVICE void copy_x(const Arguments& args) const {
        uint4* all = reinterpret_cast<uint4*>(&shared_memory<Shared>());
        const bool valid = WHOLE || k_tile * 64 + x_column < args.columns;
#pragma unroll
        for (int copy = 0; copy < COPIES; ++copy) {
            if (copy * ROWS >= filled) continue;
            uint4* to = all + x_to + copy * ROWS * 8 + (ROWS % 2 != 0 && copy % 2 != 0 ? other_parity : 0);
            const uint16_t* from = x[copy] + step * (K_STEP * 64);
            if (TOKEN_TILES > 1 && copy * ROWS >= rows)
                *to = make_uint4(0, 0, 0, 0);
            else if constexpr (WHOLE)
                cp_async_16(to, from);
            else
                cp_async_16_or_zero(to, valid ? from : args.x, valid);
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
                uint32_t low = INT4_64TH_SYMMETRIC, high = INT4_64TH_SYMMETRIC;
#if ZEROS
                const uint32_t zero = reinterpret_cast<const uint8_t*>(&stage.zeros[row][j][unit])[g];
                int4_offsets_64th(zero, low, high);
#endif
                uint32_t words[4];
                const uint4 four = stage.weight[row][j][lane];
                words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
#pragma unroll
                for (int i = 0; i < WORDS; ++i) int4_fragment_64th(words[unit * WORDS + i], low, high, a[r][i]);
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
DEVICE int out_pitch(const Arguments& args) { return PACKED ? (ALL_ROW_TILES + 1) / 2 * 8 : args.out_features; }

// Where the rows of tokens 2t and 2t + 1 of a lone tile of tokens begin in `out`: asked for when a share begins, not when it ends.
struct Rows {
    int at[2];

    DEVICE void find(const Arguments& args, const Share& share, int lane) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int token = lane % 4 * 2 + i;
            at[i] = TOKEN_TILES == 1 && token < share.count ? share.pair(args, token) * out_pitch(args) : 0;
        }
    }
};

// Writes the results of a bundle of row tiles and a tile of tokens: c[0], c[1] are row g of tokens 2t, 2t + 1, c[2], c[3] row g + 8.
DEVICE void store(const Arguments& args, const Share& share, const Rows& rows, int row_tile, int token_tile, int lane,
                  const float (&c)[BUNDLE][4]) {
    if (row_tile >= ALL_ROW_TILES) return;
    const int g = lane / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int token = token_tile * 8 + lane % 4 * 2 + i;
        if (token >= share.count) continue;
        const int row = TOKEN_TILES == 1 ? rows.at[i] : share.pair(args, token) * out_pitch(args);
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

// Writes the sums of a row group and clears them.
DEVICE void finish(Shared& shared, const Arguments& args, const Share& share, const Rows& rows, float (&acc)[ROW_TILES][TOKEN_TILES][4],
                   int row_tile, bool first) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_m = warp % WARPS_M;
#if TILE_WARPS_K > 1
    const int column = warp / WARPS_M;
    // The sums before are written.
    if (!first) __syncthreads();
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n)
            shared.sums[column][warp_m * ROW_TILES + r][n][lane] = make_float4(acc[r][n][0], acc[r][n][1], acc[r][n][2], acc[r][n][3]);
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
#pragma unroll
        for (int b = 0; b < BUNDLE; ++b)
#pragma unroll
            for (int i = 0; i < 4; ++i) c[b][i] *= 64.0f;
        store(args, share, rows, row_tile + row, n, lane, c);
    }
#else
#pragma unroll
    for (int r = 0; r < ROW_TILES; r += BUNDLE)
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) {
            if (n > 0 && n * 8 >= share.count) break;
            float c[BUNDLE][4];
#pragma unroll
            for (int b = 0; b < BUNDLE; ++b)
#pragma unroll
                for (int i = 0; i < 4; ++i) c[b][i] = 64.0f * acc[r + b][n][i];
            store(args, share, rows, row_tile + warp_m * ROW_TILES + r, n, lane, c);
        }
#endif
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
            for (int c = 0; c < 4; ++c) acc[r][n][c] = 0.0f;
}

// What comes next, of which a block brings `part` of `parts` of `items` experts' to the L2.
struct Late {
    Next next;
    // Without STREAM it is one, `expert`'s.
    int items, expert, share, part, parts;

    DEVICE void prefetch(const Arguments& args) const {
        for (int i = 0; i < items; ++i) {
            const int4 item = STREAM ? args.items[i] : make_int4(expert, 0, 1, 0);
            if (item.z > 0) next.prefetch<THREADS>(item.x, share, part, parts);
        }
    }
};

// `first` and what `shares` give after it.
DEVICE void multiply_shares(Shared& shared, const Arguments& args, const Share& first, Shares shares, const Late& late) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = warp / WARPS_M, warp_m = warp % WARPS_M;
    Stage(&ring)[STAGES] = shared.stages[column];
    Shares computed = shares;

    Source source = {};
    source.lane = lane, source.warp_m = warp_m, source.column = column;
    source.next = first, source.shares = shares;
    if constexpr (STREAM) source.after = source.shares.take(args);
    source.start(ring[0], threadIdx.x % COLUMN);
    source.find_pairs(args);
    // The first weights are under way before it is known whose rows they meet; those of a next share only with its rows.
    source.begin(args);
    const int alone = source.row_groups * STEPS;
    Source source_x = source;
    source_x.begin_x(args);
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        if (i >= alone) break;
        source.copy_weights();
        if (i + 1 < alone) source.advance(args);
    }
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        if (source_x.live()) {
            if (i >= alone) source_x.copy_weights();
            source_x.copy_x(args);
            source_x.advance(args);
        }
        cp_async_commit();
    }
    source = source_x;

    float acc[ROW_TILES][TOKEN_TILES][4] = {};
    int slot = 0;
    bool is_first = true;
    Share share = first;
    while (share.count > 0) {
        Share next = {};
        if constexpr (STREAM) next = computed.take(args);
        Rows rows;
        rows.find(args, share, lane);
        const int row_groups = share.row_groups(args);
        for (int group = 0; group < row_groups; ++group) {
            for (int step = 0; step < STEPS; ++step) {
                cp_async_wait<STAGES - 2>();
                sync_column(column);
                if (source.live()) {
                    source.copy_weights();
                    source.copy_x(args);
                    source.advance(args);
                }
                cp_async_commit();
                multiply(acc, ring[slot], ALL_K_TILES - (step * WARPS_K + column) * K_TILES, share.count, warp_m, lane);
                slot = slot + 1 == STAGES ? 0 : slot + 1;
            }
            if (GATE_UP && group + 1 == row_groups && next.count == 0) late.prefetch(args);
            finish(shared, args, share, rows, acc, share.row_tile(args) + group * GROUP_TILES, is_first);
            is_first = false;
        }
        share = next;
    }
    cp_async_wait<0>();
}

// `x` [rows, columns] bf16: of a token at row `first_token` + pair / top_k (gate-up), or of a pair; columns are a multiple of 8. `items`
// (expert, first, count, 0) over `order`, pairs of token and k by expert, the unused ones last; without SORTED the topk_ids. `out`
// [pairs, out_features]: bf16 of whole row tiles (gate-up), or f32, or packed parts. `next_` is what down reads, of which blocks at their
// end bring a part to the L2, of `late_items` items (without SORTED, the later half of an item's ranges, of that item): what were brought
// sooner would be gone by then. An item's ranges are `row_groups` row groups each. Grid: with STREAM as many blocks as run at once; else
// ranges and items, for down and without SORTED the other way round.
KERNEL void __launch_bounds__(THREADS, TILE_BLOCKS)
moe_int4(const uint16_t* x, const uint4* weight, const uint4* scales, const uint2* zeros, const int32_t* items, const int32_t* order,
         void* out, int experts, int columns, int out_features, int top_k, int first_token, int row_groups, int ranges, int item_count,
         int late_items, const uint8_t* next_weight, const uint8_t* next_scales, const uint8_t* next_zeros, int next_weight_bytes,
         int next_scales_bytes, int next_zeros_bytes, int next_share) {
    Shared& shared = shared_memory<Shared>();
    const int4* all = reinterpret_cast<const int4*>(items);
    const Arguments args = {x,     weight,      scales,     zeros, all, order, out, columns, out_features,
                            top_k, first_token, row_groups, item_count, ranges};
    const Next next = {{next_weight, next_scales, next_zeros}, {next_weight_bytes, next_scales_bytes, next_zeros_bytes}};
    Late late = {next, 0, 0, next_share, 0, 1};
    Shares shares = {};
    if constexpr (STREAM) {
        shares.start(args, blockIdx.x, gridDim.x);
        const Share first = shares.take(args);
        late.items = late_items, late.part = blockIdx.x, late.parts = gridDim.x;
        multiply_shares(shared, args, first, shares, late);
    } else if constexpr (SORTED) {
        // Gate-up's blocks that run together share a token's rows. Down goes through the features as a whole, so that of its results the
        // last features are in the L2 when the sum begins with them.
        const int range = GATE_UP ? blockIdx.x : blockIdx.y, at = GATE_UP ? blockIdx.y : blockIdx.x;
        const int4 item = args.items[at];
        if (item.z == 0) return;
        if (GATE_UP && late_items > 0 && (at + late_items >= item_count || args.items[at + late_items].z == 0))
            late.items = 1, late.expert = args.items[at % late_items].x, late.part = range, late.parts = ranges;
        multiply_shares(shared, args, {item.x, item.y, item.z, range}, shares, late);
    } else {
        const int expert = items[static_cast<int64_t>(first_token) * top_k + blockIdx.x], range = blockIdx.y, half = ranges / 2;
        if (expert < 0 || expert >= experts) return;
        if (late_items > 0 && range >= half) late.items = 1, late.expert = expert, late.part = range - half, late.parts = ranges - half;
        multiply_shares(shared, args, {expert, static_cast<int>(blockIdx.x), 1, range}, shares, late);
    }
}
