// `indexer_logits.wgsl` by matrices of 16 by 16 halves, where subgroups have 32 lanes: one workgroup 64 keys of one sequence and a few of its
// tokens. `paged.wgsl` and `halves.wgsl` go before it.
//
// Halves hold what bf16 has, but not as far: queries of a token, and keys, are brought near 2^13 by a power of two. What underflows is 2^-38 of
// the largest. 8-bit codes are halves as they are. A subgroup keeps 16 keys. All of it is within 24 KiB of memory: a driver that counts 48 for a
// multiprocessor has two workgroups on it.

const KEYS: u32 = 64u;
const HEADS: u32 = 32u;
const LANES: u32 = 128u;
const SUBGROUPS: u32 = 4u;
// Vectors of eight columns of a key and of a query: 128 columns, eight matrices.
const ROW_VECTORS: u32 = 16u;
// Of a query in vectors of four halves, and of a quarter of a key: rows lie in different banks.
const STRIDE: u32 = 34u;
const KEY_STRIDE: u32 = 10u;

override FP8: bool = false;
// Of a key, vectors of 16 bytes.
override KEY_QUADS: u32 = select(16u, 8u, FP8);
// Of a quarter of a key.
override LANE_QUADS: u32 = KEY_QUADS / 4u;

struct Params {
    // The chunk: its first row in the step, its rows, the columns of its logits.
    first_row: u32,
    rows: u32,
    columns: u32,
    heads: u32,
    // Words of a row of queries, and of a row of the cache.
    query_words: u32,
    row_words: u32,
    scale: f32,
    page_size: u32,
    window_pages: u32,
    max_blocks: u32,
    // Rows of a workgroup, and blocks of keys.
    group_rows: u32,
    blocks: u32,
    // Blocks of keys of a workgroup.
    group_blocks: u32,
}

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read> positions: array<u32>;
@group(0) @binding(1) var<storage, read> seq_ids: array<u32>;
@group(0) @binding(2) var<storage, read> block_table: array<u32>;
@group(0) @binding(3) var<storage, read> q: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> weights: array<f32>;
@group(0) @binding(5) var<storage, read> cache_0: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read> cache_1: array<vec4<u32>>;
@group(0) @binding(7) var<storage, read> cache_2: array<vec4<u32>>;
@group(0) @binding(8) var<storage, read> cache_3: array<vec4<u32>>;
@group(0) @binding(9) var<storage, read_write> logits: array<f32>;

// A quarter of the columns.
var<workgroup> keys: array<vec4<f16>, 640>;
var<workgroup> queries: array<vec4<f16>, 1088>;
// Of a subgroup: the products of 32 heads and its 16 keys.
var<workgroup> parts: array<f32, 2048>;
var<workgroup> key_scales: array<f32, KEYS>;
var<workgroup> slots: array<u32, KEYS>;
var<workgroup> head_weights: array<f32, HEADS>;
var<workgroup> exponents: array<u32, SUBGROUPS>;

alias Left = coop_mat16x16<f16, A>;
alias Right = coop_mat16x16<f16, B>;
alias Sums = coop_mat16x16<f32, C>;

fn cached(slot: u32, at: u32) -> vec4<u32> {
    switch window_of(slot) {
        case 1u: { return cache_1[at]; }
        case 2u: { return cache_2[at]; }
        case 3u: { return cache_3[at]; }
        default: { return cache_0[at]; }
    }
}

// Vector `i` of 16 bytes of a key.
fn key_quad(slot: u32, i: u32) -> vec4<u32> {
    let own = in_window(slot);
    if !FP8 {
        return cached(slot, own * KEY_QUADS + i);
    }
    // A page's codes and then its scales: whole vectors, for page_size is a multiple of 4.
    let word = own / params.page_size * params.page_size * (params.row_words + 1u) + own % params.page_size * params.row_words;
    return cached(slot, word / 4u + i);
}

fn key_scale(slot: u32) -> f32 {
    let own = in_window(slot);
    let word = own / params.page_size * params.page_size * (params.row_words + 1u)
        + params.page_size * params.row_words + own % params.page_size;
    return bitcast<f32>(cached(slot, word / 4u)[word % 4u]);
}

// That of all lanes, as a number whose powers are numbers. All lanes call it.
fn largest_of_all(exponent: u32, lane: Lane) -> u32 {
    let own = subgroupMax(exponent);
    if lane.place == 0u {
        exponents[lane.subgroup] = own;
    }
    workgroupBarrier();
    return exponent_of(max(max(exponents[0], exponents[1]), max(exponents[2], exponents[3])));
}

// Vector `v` of a key of the block: zeros where there is none.
fn block_quad(key: u32, v: u32) -> vec4<u32> {
    let slot = slots[key];
    let words = key_quad(select(slot, 0u, slot == HOLE), v);
    return select(words, vec4(0u), slot == HOLE);
}

// What a lane loads of a block, 16 bytes each: of 8-bit keys one of each quarter of the columns, else two, of which the second is 32 keys on.
struct Block {
    a: vec4<u32>,
    b: vec4<u32>,
    c: vec4<u32>,
    d: vec4<u32>,
    a_too: vec4<u32>,
    b_too: vec4<u32>,
    c_too: vec4<u32>,
    d_too: vec4<u32>,
    factor: f32,
}

// The keys of a block that the last of its rows sees, and their scales. All lanes call it.
fn load_block(seq: u32, first: u32, last: u32, lane: Lane) -> Block {
    workgroupBarrier();
    if lane.index < KEYS {
        let position = first + lane.index;
        var slot = HOLE;
        if position <= last {
            let page = block_table[seq * params.max_blocks + position / params.page_size];
            slot = slot_of(page, position % params.page_size, params.page_size, params.window_pages);
        }
        slots[lane.index] = slot;
        var scale = params.scale;
        if FP8 && slot != HOLE {
            scale *= CODE * key_scale(slot);
        }
        key_scales[lane.index] = scale;
    }
    workgroupBarrier();
    // All of a lane's vectors are on their way at once.
    let key = lane.index / LANE_QUADS;
    let v = lane.index % LANE_QUADS;
    var block: Block;
    block.a = block_quad(key, v);
    block.b = block_quad(key, v + LANE_QUADS);
    block.c = block_quad(key, v + 2u * LANE_QUADS);
    block.d = block_quad(key, v + 3u * LANE_QUADS);
    if !FP8 {
        block.a_too = block_quad(key + 32u, v);
        block.b_too = block_quad(key + 32u, v + LANE_QUADS);
        block.c_too = block_quad(key + 32u, v + 2u * LANE_QUADS);
        block.d_too = block_quad(key + 32u, v + 3u * LANE_QUADS);
        let of_first = max(max(largest(block.a), largest(block.b)), max(largest(block.c), largest(block.d)));
        let of_second =
            max(max(largest(block.a_too), largest(block.b_too)), max(largest(block.c_too), largest(block.d_too)));
        let exponent = largest_of_all(max(of_first, of_second), lane);
        block.factor = power(exponent);
        if lane.index < KEYS {
            key_scales[lane.index] *= power(2u * TARGET - exponent);
        }
    }
    return block;
}

// Puts a quarter of a block's columns in their place, of `first` and `second` those that the lane has. All lanes call it.
fn put_quarter(first: vec4<u32>, second: vec4<u32>, factor: f32, lane: Lane) {
    workgroupBarrier();
    let at = lane.index / LANE_QUADS * KEY_STRIDE;
    let v = lane.index % LANE_QUADS;
    if FP8 {
        keys[at + 4u * v] = four_codes(first.x);
        keys[at + 4u * v + 1u] = four_codes(first.y);
        keys[at + 4u * v + 2u] = four_codes(first.z);
        keys[at + 4u * v + 3u] = four_codes(first.w);
    } else {
        put_key(at + 2u * v, first, factor);
        put_key(at + 32u * KEY_STRIDE + 2u * v, second, factor);
    }
    workgroupBarrier();
}

fn put_key(at: u32, words: vec4<u32>, factor: f32) {
    let values = eight_bf16(words);
    keys[at] = vec4<f16>(values.low * factor);
    keys[at + 1u] = vec4<f16>(values.high * factor);
}

fn query_words(t: u32, head: u32, v: u32) -> vec4<u32> {
    if head >= params.heads {
        return vec4(0u);
    }
    return q[(t * params.heads + head) * ROW_VECTORS + v];
}

fn put_query(i: u32, words: vec4<u32>, factor: f32) {
    let at = i / ROW_VECTORS * STRIDE + 2u * (i % ROW_VECTORS);
    let values = eight_bf16(words);
    queries[at] = vec4<f16>(values.low * factor);
    queries[at + 1u] = vec4<f16>(values.high * factor);
}

// What a lane loads of a token's queries, and a head's weight.
struct Queries {
    a: vec4<u32>,
    b: vec4<u32>,
    c: vec4<u32>,
    d: vec4<u32>,
    weight: f32,
}

// Of queries `first_head..first_head + HEADS` of a token.
fn load_queries(t: u32, first_head: u32, lane: Lane) -> Queries {
    let head = first_head + lane.index / ROW_VECTORS;
    let v = lane.index % ROW_VECTORS;
    var weight = 0.0;
    if lane.index < HEADS && first_head + lane.index < params.heads {
        weight = weights[t * params.heads + first_head + lane.index];
    }
    return Queries(
        query_words(t, head, v),
        query_words(t, head + 8u, v),
        query_words(t, head + 16u, v),
        query_words(t, head + 24u, v),
        weight,
    );
}

// Returns what their products are to be multiplied by. All lanes call it.
fn put_queries(own: Queries, lane: Lane) -> f32 {
    let exponent = largest_of_all(max(max(largest(own.a), largest(own.b)), max(largest(own.c), largest(own.d))), lane);
    put_query(lane.index, own.a, power(exponent));
    put_query(lane.index + LANES, own.b, power(exponent));
    put_query(lane.index + 2u * LANES, own.c, power(exponent));
    put_query(lane.index + 3u * LANES, own.d, power(exponent));
    if lane.index < HEADS {
        head_weights[lane.index] = own.weight;
    }
    workgroupBarrier();
    return power(2u * TARGET - exponent);
}

// Sixteen columns of a quarter.
fn key_matrix(column: u32, lane: Lane) -> Right {
    return coopLoad<Right>(&keys[16u * lane.subgroup * KEY_STRIDE + column / 4u], KEY_STRIDE);
}

fn query_matrix(head: u32, column: u32) -> Left {
    return coopLoadT<Left>(&queries[head * STRIDE + column / 4u], STRIDE);
}

// `max(x, 0)` that keeps NaN.
fn relu(x: f32) -> f32 {
    return select(x, 0.0, x < 0.0);
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    // What is more than there are does the last one's work again: matrices want no lane to have left.
    let row_groups = (params.rows + params.group_rows - 1u) / params.group_rows;
    let number = min(flat(group, groups), row_groups * params.blocks - 1u);
    let first_row = number / params.blocks * params.group_rows;
    let end_row = min(first_row + params.group_rows, params.rows);
    // Of the sums over heads: two lanes of a subgroup have a key of it, and every second head each.
    let own_key = lane.place % 16u;
    let own_half = lane.place / 16u;
    let key = 16u * lane.subgroup + own_key;
    var loaded = HOLE;
    var key_0 = Right();
    var key_1 = Right();
    var key_2 = Right();
    var key_3 = Right();
    var key_4 = Right();
    var key_5 = Right();
    var key_6 = Right();
    var key_7 = Right();
    // Queries that come while others are worked on, and those that are there: their places, and what their products are multiplied by.
    var ahead = Queries();
    var ahead_at = HOLE;
    var put_at = HOLE;
    var unit = 0.0;
    for (var block = 0u; block < params.group_blocks; block++) {
        let first_key = (number % params.blocks * params.group_blocks + block) * KEYS;
        loaded = HOLE;
        for (var row = first_row; row < end_row; row++) {
            let t = params.first_row + row;
            let position = positions[t];
            if position < first_key {
                continue;
            }
            let seq = seq_ids[t];
            if seq != loaded {
                // The last row of a sequence in this group sees most.
                var last = t;
                for (var next = row + 1u; next < end_row && seq_ids[params.first_row + next] == seq; next++) {
                    last = params.first_row + next;
                }
                let own = load_block(seq, first_key, positions[last], lane);
                loaded = seq;
                put_quarter(own.a, own.a_too, own.factor, lane);
                key_0 = key_matrix(0u, lane);
                key_1 = key_matrix(16u, lane);
                put_quarter(own.b, own.b_too, own.factor, lane);
                key_2 = key_matrix(0u, lane);
                key_3 = key_matrix(16u, lane);
                put_quarter(own.c, own.c_too, own.factor, lane);
                key_4 = key_matrix(0u, lane);
                key_5 = key_matrix(16u, lane);
                put_quarter(own.d, own.d_too, own.factor, lane);
                key_6 = key_matrix(0u, lane);
                key_7 = key_matrix(16u, lane);
            }
            var sum = 0.0;
            for (var first_head = 0u; first_head < params.heads; first_head += HEADS) {
                let at = t * params.heads + first_head;
                if at != put_at {
                    if at != ahead_at {
                        ahead = load_queries(t, first_head, lane);
                    }
                    unit = put_queries(ahead, lane);
                    put_at = at;
                    let of_token = first_head + HEADS < params.heads;
                    if of_token || row + 1u < end_row {
                        let next_head = select(0u, first_head + HEADS, of_token);
                        let next = select(t + 1u, t, of_token);
                        ahead = load_queries(next, next_head, lane);
                        ahead_at = next * params.heads + next_head;
                    }
                }
                for (var half = 0u; half < HEADS; half += 16u) {
                    var dots = coopMultiplyAdd(query_matrix(half, 0u), key_0, Sums());
                    dots = coopMultiplyAdd(query_matrix(half, 16u), key_1, dots);
                    dots = coopMultiplyAdd(query_matrix(half, 32u), key_2, dots);
                    dots = coopMultiplyAdd(query_matrix(half, 48u), key_3, dots);
                    dots = coopMultiplyAdd(query_matrix(half, 64u), key_4, dots);
                    dots = coopMultiplyAdd(query_matrix(half, 80u), key_5, dots);
                    dots = coopMultiplyAdd(query_matrix(half, 96u), key_6, dots);
                    dots = coopMultiplyAdd(query_matrix(half, 112u), key_7, dots);
                    coopStoreT(dots, &parts[512u * lane.subgroup + 16u * half], 16u);
                }
                workgroupBarrier();
                var of_heads = 0.0;
                for (var i = 0u; i < HEADS; i += 2u) {
                    let head = i + own_half;
                    of_heads += head_weights[head] * relu(parts[512u * lane.subgroup + 16u * head + own_key]);
                }
                sum += unit * of_heads;
            }
            sum += subgroupShuffleXor(sum, 16u);
            if own_half == 0u && first_key + key <= position {
                logits[row * params.columns + first_key + key] = sum * key_scales[key];
            }
        }
    }
}
