// One workgroup a block of keys of one sequence and a few of its tokens. `fp8.wgsl` and `paged.wgsl` go before it.
//
// Keys and queries are handled in vectors of eight columns, as activations: of 8-bit keys the codes, which bf16 holds exactly; their
// scale, which is positive, comes last. A lane has every eighth key and two heads of thirty-two; what the heads of a key give is added up
// in their order.

// Keys of a block: as many as there is room for, at most 64.
override KEYS: u32 = 64u;
const HEADS: u32 = 32u;
const LANES: u32 = 128u;
// Keys of a lane are so far apart.
const KEY_LANES: u32 = 8u;
const HEAD_LANES: u32 = 16u;
override LANE_KEYS: u32 = KEYS / KEY_LANES;

override FP8: bool = false;
// Vectors of a row, the last one filled up with zeros; and with one more, so that rows lie in different banks.
override ROW_VECTORS: u32 = 1u;
override STRIDE: u32 = ROW_VECTORS + 1u - ROW_VECTORS % 2u;
override TILE_VECTORS: u32 = KEYS * STRIDE;
override QUERY_VECTORS: u32 = HEADS * STRIDE;

struct Params {
    // The chunk: its first row in the step, its rows, the columns of its logits.
    first_row: u32,
    rows: u32,
    columns: u32,
    heads: u32,
    // Pairs of a row of queries, and words of a row of the cache.
    query_pairs: u32,
    row_words: u32,
    scale: f32,
    page_size: u32,
    window_pages: u32,
    max_blocks: u32,
    // Rows of a workgroup, and blocks of keys.
    group_rows: u32,
    blocks: u32,
}

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read> positions: array<u32>;
@group(0) @binding(1) var<storage, read> seq_ids: array<u32>;
@group(0) @binding(2) var<storage, read> block_table: array<u32>;
@group(0) @binding(3) var<storage, read> q: array<ActPair>;
@group(0) @binding(4) var<storage, read> weights: array<f32>;
@group(0) @binding(5) var<storage, read> cache_0: array<u32>;
@group(0) @binding(6) var<storage, read> cache_1: array<u32>;
@group(0) @binding(7) var<storage, read> cache_2: array<u32>;
@group(0) @binding(8) var<storage, read> cache_3: array<u32>;
@group(0) @binding(9) var<storage, read_write> logits: array<f32>;

var<workgroup> keys: array<ActEight, TILE_VECTORS>;
var<workgroup> queries: array<ActEight, QUERY_VECTORS>;
var<workgroup> key_scales: array<f32, KEYS>;
var<workgroup> slots: array<u32, KEYS>;
// Of lanes of heads and keys.
var<workgroup> parts: array<f32, 1024>;

fn cached(window: u32, at: u32) -> u32 {
    switch window {
        case 1u: { return cache_1[at]; }
        case 2u: { return cache_2[at]; }
        case 3u: { return cache_3[at]; }
        default: { return cache_0[at]; }
    }
}

// Where an 8-bit page of the slot begins, in words of its window.
fn page_start(slot: u32) -> u32 {
    return slot / params.page_size * params.page_size * (params.row_words + 1u);
}

// Pair `i` of a key, zeros behind its last.
fn key_pair(slot: u32, i: u32) -> ActPair {
    if i >= params.query_pairs {
        return ActPair();
    }
    let own = in_window(slot);
    if !FP8 {
        let word = own * params.row_words + ACT_WORDS * i;
        let first = cached(window_of(slot), word);
        if ACT_WORDS == 1u {
            return act_of_words(first, first);
        }
        return act_of_words(first, cached(window_of(slot), word + 1u));
    }
    let at = page_start(own) + own % params.page_size * params.row_words + i / 2u;
    let codes = cached(window_of(slot), at) >> (16u * (i % 2u));
    return pack_act(vec2(fp8_decode(codes & 0xffu), fp8_decode((codes >> 8u) & 0xffu)));
}

// The keys of a block that the last of its rows sees, and their scales.
fn load_keys(seq: u32, first: u32, last: u32, lane: u32) {
    workgroupBarrier();
    if lane < KEYS {
        let position = first + lane;
        var slot = HOLE;
        if position <= last {
            let page = block_table[seq * params.max_blocks + position / params.page_size];
            slot = slot_of(page, position % params.page_size, params.page_size, params.window_pages);
        }
        slots[lane] = slot;
        var scale = params.scale;
        if FP8 && slot != HOLE {
            let own = in_window(slot);
            let at = page_start(own) + params.page_size * params.row_words + own % params.page_size;
            scale *= bitcast<f32>(cached(window_of(slot), at));
        }
        key_scales[lane] = scale;
    }
    workgroupBarrier();
    for (var i = lane; i < KEYS * ROW_VECTORS; i += LANES) {
        let slot = slots[i / ROW_VECTORS];
        let v = i % ROW_VECTORS;
        var vector = ActEight();
        if slot != HOLE {
            vector = ActEight(
                key_pair(slot, 4u * v),
                key_pair(slot, 4u * v + 1u),
                key_pair(slot, 4u * v + 2u),
                key_pair(slot, 4u * v + 3u),
            );
        }
        keys[i / ROW_VECTORS * STRIDE + v] = vector;
    }
}

fn query_pair(row: u32, head: u32, i: u32) -> ActPair {
    if i >= params.query_pairs || head >= params.heads {
        return ActPair();
    }
    return q[(row * params.heads + head) * params.query_pairs + i];
}

// `max(x, 0)` that keeps NaN.
fn relu(x: f32) -> f32 {
    return select(x, 0.0, x < 0.0);
}

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let number = flat(group, groups);
    let row_group = number / params.blocks;
    if row_group * params.group_rows >= params.rows {
        return;
    }
    let first_key = number % params.blocks * KEYS;
    let first_row = row_group * params.group_rows;
    let end_row = min(first_row + params.group_rows, params.rows);
    let key = lane % KEY_LANES;
    let head = lane / KEY_LANES * 2u;
    var loaded = HOLE;
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
            load_keys(seq, first_key, positions[last], lane);
            loaded = seq;
        }
        var sums: array<f32, 8>;
        for (var j = 0u; j < LANE_KEYS; j++) {
            sums[j] = 0.0;
        }
        for (var first_head = 0u; first_head < params.heads; first_head += HEADS) {
            workgroupBarrier();
            for (var i = lane; i < HEADS * ROW_VECTORS; i += LANES) {
                let h = first_head + i / ROW_VECTORS;
                let v = i % ROW_VECTORS;
                queries[i / ROW_VECTORS * STRIDE + v] = ActEight(
                    query_pair(t, h, 4u * v),
                    query_pair(t, h, 4u * v + 1u),
                    query_pair(t, h, 4u * v + 2u),
                    query_pair(t, h, 4u * v + 3u),
                );
            }
            workgroupBarrier();
            var dots: array<vec2<f32>, 8>;
            for (var j = 0u; j < LANE_KEYS; j++) {
                dots[j] = vec2(0.0);
            }
            for (var v = 0u; v < ROW_VECTORS; v++) {
                let a = act_eight(queries[head * STRIDE + v]);
                let b = act_eight(queries[(head + 1u) * STRIDE + v]);
                for (var j = 0u; j < LANE_KEYS; j++) {
                    let k = act_eight(keys[(key + KEY_LANES * j) * STRIDE + v]);
                    dots[j] += vec2(dot(a.low, k.low) + dot(a.high, k.high), dot(b.low, k.low) + dot(b.high, k.high));
                }
            }
            var weight = vec2(0.0);
            let of_row = t * params.heads;
            if first_head + head < params.heads {
                weight.x = weights[of_row + first_head + head];
            }
            if first_head + head + 1u < params.heads {
                weight.y = weights[of_row + first_head + head + 1u];
            }
            for (var j = 0u; j < LANE_KEYS; j++) {
                sums[j] += weight.x * relu(dots[j].x) + weight.y * relu(dots[j].y);
            }
        }
        for (var j = 0u; j < LANE_KEYS; j++) {
            parts[head / 2u * KEYS + key + KEY_LANES * j] = sums[j];
        }
        workgroupBarrier();
        if lane < KEYS && first_key + lane <= position {
            var sum = 0.0;
            for (var i = 0u; i < HEAD_LANES; i++) {
                sum += parts[i * KEYS + lane];
            }
            logits[row * params.columns + first_key + lane] = sum * key_scales[lane];
        }
    }
}
