// What the kernels of `indexer_logits` share: 32 keys in a warp's registers, scored against one query out of shared memory.
//
// Keys are the 16 rows of the MMA and heads its 8 columns, so that only queries stream. The order of the dims inside the MMA is free, as
// long as keys and queries agree: lane t of a quad takes whole 16-byte vectors of both (bf16: dims 8 t on, and 32 further; 8-bit keys:
// dims 16 t on), of every 64 dims.
//
// Rounding: products are exact, everything else is f32. A dot product is DIMS additions in the tensor cores (each may truncate), the
// weighted sum over heads HEADS fused ones, plus two over the quad and two multiplications by scales: with u = 2^-24,
// |error| <= (2 DIMS + HEADS + 8) u * scale * sum_h |w_h| sum_d |q_d k_d|.
#pragma once

#include "fp8.cuh"

constexpr uint32_t ALL = 0xffffffff;
constexpr int GROUP_KEYS = 32;
constexpr int HEAD_TILES = (HEADS + 7) / 8;
constexpr int DIM_GROUPS = (DIMS + 63) / 64;
constexpr int KEY_VECTORS = FP8 ? DIM_GROUPS : 2 * DIM_GROUPS;
static_assert(DIMS % 16 == 0, "a key is whole 16-byte vectors");

// Vector `place(head, vector)` of a row holds dims 8 * vector on: the two heads that a quarter of a warp reads lie in different banks.
struct Query {
    uint4 heads[8 * HEAD_TILES][8 * DIM_GROUPS];
    float weights[8 * HEAD_TILES];

    static DEVICE int place(int head, int vector) { return vector ^ (head % 2 * (FP8 ? 1 : 4)); }
};

// The heads and dims that only fill tiles must be zero, not NaN. Ends without a barrier.
DEVICE void clear_padding(Query* queries, int count) {
    if constexpr (HEADS % 8 != 0 || DIMS % 64 != 0) {
        uint4* words = reinterpret_cast<uint4*>(queries);
        const int vectors = count * static_cast<int>(sizeof(Query) / sizeof(uint4));
        for (int i = threadIdx.x; i < vectors; i += blockDim.x) words[i] = make_uint4(0, 0, 0, 0);
    }
}

// Starts the copies of `count` token rows from `first_row` on.
DEVICE void copy_queries(Query* queries, const uint16_t* q, const float* weights, int first_row, int count) {
    constexpr int VECTORS = DIMS / 8;
    q += static_cast<int64_t>(first_row) * (HEADS * DIMS);
    weights += static_cast<int64_t>(first_row) * HEADS;
    for (int i = threadIdx.x; i < count * (HEADS * VECTORS); i += blockDim.x) {
        const int head = i / VECTORS % HEADS, vector = i % VECTORS;
        cp_async_16(&queries[i / (HEADS * VECTORS)].heads[head][Query::place(head, vector)], q + 8 * i);
    }
    for (int i = threadIdx.x; i < count * HEADS; i += blockDim.x) cp_async_4(&queries[i / HEADS].weights[i % HEADS], weights + i);
}

// Brings the dims that the thread has copied into the order of keys that are not IN_ORDER.
DEVICE void permute_queries(Query* queries, int count) {
    constexpr int VECTORS = DIMS / 8;
    for (int i = threadIdx.x; FP8 && i < count * (HEADS * VECTORS); i += blockDim.x) {
        const int head = i / VECTORS % HEADS;
        uint4& v = queries[i / (HEADS * VECTORS)].heads[head][Query::place(head, i % VECTORS)];
        v = make_uint4(__byte_perm(v.x, v.y, 0x5410), __byte_perm(v.x, v.y, 0x7632), __byte_perm(v.z, v.w, 0x5410),
                       __byte_perm(v.z, v.w, 0x7632));
    }
}

// The token rows of one sequence that a launch has to score.
struct Rows {
    int first, count;  // token rows
    int position;      // of the first

    DEVICE int keys() const { return count > 0 ? position + count : 0; }
};

struct Arguments {
    const uint16_t* q;            // [T, HEADS, DIMS]
    const float* weights;         // [T, HEADS]
    const uint8_t* cache;         // [pages, page_size, DIMS], or 8-bit: a page's keys, then its scales
    const int32_t* cu_seqlens;    // [S + 1]
    const int32_t* context_lens;  // [S]
    const int32_t* block_table;   // [S, max_blocks]
    float* logits;                // [rows, columns]
    int seqs, max_blocks, page_size, first_row, end_row;
    int64_t columns;
    float scale;

    DEVICE Rows rows_of(int seq) const {
        if (seq >= seqs) return {0, 0, 0};
        const int end = __ldg(cu_seqlens + seq + 1), first = max(__ldg(cu_seqlens + seq), first_row);
        return {first, max(min(end, end_row) - first, 0), __ldg(context_lens + seq) - end + first};
    }
};

// Work items in the order of sequences, each with its own number of them; 32 sequences lie over the warp.
struct Walk {
    Rows rows;             // of sequence `first_seq + lane`
    int items;             // of it
    int end;               // of it: the items of all sequences up to it
    int first_seq, total;  // `total`: the items before sequence `first_seq + 32`

    template <typename Items>
    DEVICE void start(const Arguments& args, Items items_of) {
        first_seq = -32, total = 0;
        advance(args, items_of);
    }

    template <typename Items>
    DEVICE void advance(const Arguments& args, Items items_of) {
        const int lane = threadIdx.x % 32;
        first_seq += 32;
        rows = args.rows_of(first_seq + lane);
        items = end = items_of(rows);
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int below = __shfl_up_sync(ALL, end, distance);
            if (lane >= distance) end += below;
        }
        end += total;
        total = __shfl_sync(ALL, end, 31);
    }

    // The lane that holds the sequence of `item`, which is not before the item asked for last; -1 when there are fewer items.
    template <typename Items>
    DEVICE int find(const Arguments& args, int item, Items items_of) {
        while (item >= total) {
            if (first_seq + 32 >= args.seqs) return -1;
            advance(args, items_of);
        }
        return __popc(__ballot_sync(ALL, end <= item));
    }

    DEVICE Rows rows_at(int source) const {
        return {__shfl_sync(ALL, rows.first, source), __shfl_sync(ALL, rows.count, source), __shfl_sync(ALL, rows.position, source)};
    }
};

// Where one key lies; the page number is still under way.
struct Lookup {
    int page, row;
};

// The keys of one sequence, 32 at a time: row i of a lane's four is key 8 i + lane / 4 of a group; `key_of_lane` is the key that it
// looks up, and whose score it gets.
struct Keys {
    static constexpr int KEY_BYTES = FP8 ? DIMS : 2 * DIMS;
    const uint8_t* cache;
    const int32_t* pages;
    int page_size, last;

    DEVICE void start(const Arguments& args, int seq, int keys) {
        cache = args.cache;
        pages = args.block_table + static_cast<int64_t>(seq) * args.max_blocks;
        page_size = args.page_size;
        last = keys - 1;
    }

    static DEVICE int key_of_lane() { return 8 * (threadIdx.x % 4) + threadIdx.x % 32 / 4; }

    // Whether the lane's vector `j` of a key is there; the dims beyond count as zero.
    static DEVICE bool inside(int j) { return 64 * j + 16 * static_cast<int>(threadIdx.x % 4) < KEY_BYTES; }

    // Keys after the last stand for the last: mapped, and their scores are not written.
    DEVICE Lookup lookup(int key) const {
        key = min(key, last);
        const int block = static_cast<int>(static_cast<uint32_t>(key) / static_cast<uint32_t>(page_size));
        return {__ldg(pages + block), key - block * page_size};
    }

    DEVICE int64_t page(Lookup at) const {
        constexpr int ROW_BYTES = FP8 ? KEY_BYTES + 4 : KEY_BYTES;
        return static_cast<int64_t>(at.page) * page_size * ROW_BYTES;
    }

    // take(row, vector, address) for what the lane reads of 32 keys.
    template <typename Take>
    DEVICE void vectors(Lookup at, Take take) const {
        const int64_t offset = page(at) + static_cast<int64_t>(at.row) * KEY_BYTES;
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint8_t* key = cache + __shfl_sync(ALL, offset, lane / 4 * 4 + i);
#pragma unroll
            for (int j = 0; j < KEY_VECTORS; ++j) {
                if (inside(j)) take(i, j, key + 64 * j + 16 * (lane % 4));
            }
        }
    }

    // Of the key that the lane looked up.
    DEVICE const float* scale(Lookup at) const {
        return reinterpret_cast<const float*>(cache + page(at) + static_cast<int64_t>(page_size) * DIMS) + at.row;
    }
};

// 32 keys as they come out of the cache.
struct RawKeys {
    uint4 rows[4][KEY_VECTORS] = {};

    DEVICE void load(const Keys& keys, Lookup at) {
        keys.vectors(at, [&](int i, int j, const uint8_t* address) { rows[i][j] = load_once_16(address); });
    }
};

// 32 keys as MMA operands. IN_ORDER: in the order of the dims; otherwise 8-bit keys swap the second and the third of every four. `zero` is
// 0, which the compiler must not know: it would keep bf16 keys in the registers they were loaded to, and copy them before every product.
struct KeyGroup {
    uint32_t steps[4 * DIM_GROUPS][2][4];

    DEVICE void set(int step, int row, uint32_t first, uint32_t second) {
        steps[step][row / 2][row % 2] = first;
        steps[step][row / 2][row % 2 + 2] = second;
    }

    template <bool IN_ORDER>
    DEVICE void expand(const RawKeys& raw, uint32_t zero) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < KEY_VECTORS; ++j) {
                const uint4 vector = raw.rows[i][j];
                if constexpr (FP8) {
                    const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        uint32_t even, odd;
                        e4m3x4_to_bf16(words[k], even, odd);
                        if constexpr (IN_ORDER) {
                            set(4 * j + k, i, __byte_perm(even, odd, 0x5410), __byte_perm(even, odd, 0x7632));
                        } else {
                            set(4 * j + k, i, even, odd);
                        }
                    }
                } else {
                    set(2 * j, i, vector.x | zero, vector.y | zero);
                    set(2 * j + 1, i, vector.z | zero, vector.w | zero);
                }
            }
        }
    }
};

// sum_h weights[h] relu(q[h] . key) for every key: the lane gets those of its `key_of_lane`, one of each group.
template <int GROUPS>
DEVICE void score(const KeyGroup (&keys)[GROUPS], const Query& query, float (&scores)[GROUPS]) {
    constexpr int AT_ONCE = HEAD_TILES % TILE_HEADS_AT_ONCE == 0 ? TILE_HEADS_AT_ONCE : 1;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float sums[GROUPS][4] = {};
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; tile += AT_ONCE) {
        float dots[AT_ONCE][GROUPS][2][4] = {};
#pragma unroll
        for (int j = 0; j < 2 * DIM_GROUPS; ++j) {
            const int vector = FP8 ? 8 * (j / 2) + 2 * t + j % 2 : 4 * j + t;
#pragma unroll
            for (int n = 0; n < AT_ONCE; ++n) {
                const uint4 q = query.heads[8 * (tile + n) + g][Query::place(g, vector)];
                const uint32_t first[2] = {q.x, q.y}, second[2] = {q.z, q.w};
#pragma unroll
                for (int i = 0; i < GROUPS * 2; ++i) mma_bf16(dots[n][i / 2][i % 2], keys[i / 2].steps[2 * j][i % 2], first);
#pragma unroll
                for (int i = 0; i < GROUPS * 2; ++i) mma_bf16(dots[n][i / 2][i % 2], keys[i / 2].steps[2 * j + 1][i % 2], second);
            }
        }
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
            const float2 weight = *reinterpret_cast<const float2*>(&query.weights[8 * (tile + n) + 2 * t]);
#pragma unroll
            for (int i = 0; i < GROUPS * 4; ++i) {
                const float* dot = &dots[n][i / 4][i % 4 / 2][i % 2 * 2];
                sums[i / 4][i % 4] += weight.x * relu(dot[0]);
                sums[i / 4][i % 4] += weight.y * relu(dot[1]);
            }
        }
    }
    // The sum over a quad, and a transpose: lane t keeps row t.
    const bool odd = t % 2 != 0, upper = t / 2 != 0;
#pragma unroll
    for (int i = 0; i < GROUPS; ++i) {
        float low = odd ? sums[i][1] : sums[i][0], high = odd ? sums[i][3] : sums[i][2];
        low += __shfl_xor_sync(ALL, odd ? sums[i][0] : sums[i][1], 1);
        high += __shfl_xor_sync(ALL, odd ? sums[i][2] : sums[i][3], 1);
        scores[i] = (upper ? high : low) + __shfl_xor_sync(ALL, upper ? low : high, 2);
    }
}
