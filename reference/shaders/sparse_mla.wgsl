// One workgroup a token, eight heads and a share of the token's selected rows: online softmax, block after block of rows.
// `fp8.wgsl` and `paged.wgsl` go before it.
//
// A row is handled in vectors of eight columns, as activations: of an 8-bit cache the codes, which bf16 holds exactly, and their scales
// beside them. Scores: a lane has every fourth row, two heads and every eighth vector. Values: a lane has two pairs of columns, and all
// heads.

const HEADS: u32 = 8u;
// Rows at once: as many as there is room for, at most 16.
override KEYS: u32 = 16u;
const LANES: u32 = 128u;
const SLICES: u32 = 8u;
// Of a slice in `parts`: lanes that write together then hit different banks.
override PART_STRIDE: u32 = HEADS * KEYS + 1u;
// Codes that share a scale, in vectors.
const GROUP_VECTORS: u32 = 16u;
const LOWEST: f32 = -0x1p127f;

override FP8: bool = false;
// Queries wait in the workgroup's memory.
override STAGED: bool = true;
// Vectors of a row, and of a latent; scales of a row.
override ROW_VECTORS: u32 = 1u;
override LATENT_VECTORS: u32 = 1u;
override SCALES: u32 = 1u;
override TILE_VECTORS: u32 = KEYS * ROW_VECTORS;
override QUERY_VECTORS: u32 = HEADS * ROW_VECTORS;
override TILE_SCALES: u32 = KEYS * SCALES;

struct Params {
    tokens: u32,
    heads: u32,
    k: u32,
    // Shares of a token's selection, and positions of one: a multiple of KEYS.
    splits: u32,
    split: u32,
    scale: f32,
    page_size: u32,
    window_pages: u32,
    max_blocks: u32,
    // Of a row in the cache, in vectors of 16 bytes.
    row_quads: u32,
}

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read> seq_ids: array<u32>;
@group(0) @binding(1) var<storage, read> block_table: array<u32>;
@group(0) @binding(2) var<storage, read> topk_indices: array<i32>;
@group(0) @binding(3) var<storage, read> q: array<ActEight>;
@group(0) @binding(4) var<storage, read> cache_0: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read> cache_1: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read> cache_2: array<vec4<u32>>;
@group(0) @binding(7) var<storage, read> cache_3: array<vec4<u32>>;
// The result or, of several splits, floats: each head's sums, its highest score, and the sum of its weights.
@group(0) @binding(8) var<storage, read_write> out: array<u32>;

var<workgroup> rows: array<ActEight, TILE_VECTORS>;
var<workgroup> queries: array<ActEight, QUERY_VECTORS>;
var<workgroup> scales: array<f32, TILE_SCALES>;
// Of scores, `SLICES * PART_STRIDE` of them; then the weights.
var<workgroup> parts: array<f32, 1032>;
var<workgroup> scores: array<f32, 128>;
var<workgroup> factors: array<f32, HEADS>;
// Of this block of rows and of the next, in turns.
var<workgroup> slots: array<u32, 32>;

fn cached(slot: u32, i: u32) -> vec4<u32> {
    let at = in_window(slot) * params.row_quads + i;
    switch window_of(slot) {
        case 1u: { return cache_1[at]; }
        case 2u: { return cache_2[at]; }
        case 3u: { return cache_3[at]; }
        default: { return cache_0[at]; }
    }
}

// The codes of a word's lower half, or of its upper one.
fn decoded(codes: u32) -> ActPair {
    return pack_act(vec2(fp8_decode(codes & 0xffu), fp8_decode((codes >> 8u) & 0xffu)));
}

// Vector `i` of a row.
fn row_vector(slot: u32, i: u32) -> ActEight {
    if !FP8 {
        let first = cached(slot, ACT_WORDS * i);
        if ACT_WORDS == 1u {
            return act_of_vectors(first, first);
        }
        return act_of_vectors(first, cached(slot, ACT_WORDS * i + 1u));
    }
    if i < LATENT_VECTORS {
        let codes = cached(slot, i / 2u);
        let low = codes[2u * (i % 2u)];
        let high = codes[2u * (i % 2u) + 1u];
        return ActEight(decoded(low), decoded(low >> 16u), decoded(high), decoded(high >> 16u));
    }
    return act_from_bf16(rotary(slot, i - LATENT_VECTORS));
}

// Vector `i` of the rotary columns of an 8-bit row: they begin behind the scales, at any word.
fn rotary(slot: u32, i: u32) -> vec4<u32> {
    let word = 2u * LATENT_VECTORS + SCALES + 4u * i;
    let low = cached(slot, word / 4u);
    let shift = word % 4u;
    if shift == 0u {
        return low;
    }
    let high = cached(slot, word / 4u + 1u);
    if shift == 1u {
        return vec4(low.yzw, high.x);
    }
    if shift == 2u {
        return vec4(low.zw, high.xy);
    }
    return vec4(low.w, high.xyz);
}

// Where the row at `place` of the token's selection lies.
fn selected(t: u32, place: u32) -> u32 {
    var position = -1;
    if place < params.k {
        position = topk_indices[t * params.k + place];
    }
    if position < 0 {
        return HOLE;
    }
    let page = block_table[seq_ids[t] * params.max_blocks + u32(position) / params.page_size];
    return slot_of(page, u32(position) % params.page_size, params.page_size, params.window_pages);
}

// Vector `v` of a query of this workgroup, the last one in place of those behind it; `row` is where the first is in `q`.
fn query(row: u32, head: u32, heads: u32, v: u32) -> ActEight {
    if STAGED {
        return queries[head * ROW_VECTORS + v];
    }
    return q[(row + min(head, heads - 1u)) * ROW_VECTORS + v];
}

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let head_groups = (params.heads + HEADS - 1u) / HEADS;
    let number = flat(group, groups);
    if number >= params.tokens * head_groups * params.splits {
        return;
    }
    let split = number % params.splits;
    let t = number / params.splits / head_groups;
    let first_head = number / params.splits % head_groups * HEADS;
    let heads = min(HEADS, params.heads - first_head);

    let first_row = t * params.heads + first_head;
    if STAGED {
        for (var i = lane; i < heads * ROW_VECTORS; i += LANES) {
            queries[i] = q[first_row * ROW_VECTORS + i];
        }
        for (var i = heads * ROW_VECTORS + lane; i < QUERY_VECTORS; i += LANES) {
            queries[i] = ActEight();
        }
    }

    // Of scores: this lane's slice, rows and heads.
    let slice = lane % SLICES;
    let key = lane / SLICES % 4u;
    let head = lane / SLICES / 4u * 2u;
    // Of the softmax: one row, one head, if there are as many rows.
    let own_head = lane % HEADS;
    let own_key = lane / HEADS;
    var highest = LOWEST;
    var total = 0.0;
    var sums: array<vec4<f32>, 8>;
    for (var h = 0u; h < HEADS; h++) {
        sums[h] = vec4(0.0);
    }

    let end = min(params.k, (split + 1u) * params.split);
    var turn = 0u;
    if lane < KEYS {
        slots[lane] = selected(t, split * params.split + lane);
    }
    for (var first = split * params.split; first < end; first += KEYS) {
        workgroupBarrier();
        for (var i = lane; i < TILE_VECTORS; i += LANES) {
            let slot = slots[turn + i / ROW_VECTORS];
            var vector = ActEight();
            if slot != HOLE {
                vector = row_vector(slot, i % ROW_VECTORS);
            }
            rows[i] = vector;
        }
        if FP8 {
            for (var i = lane; i < TILE_SCALES; i += LANES) {
                let slot = slots[turn + i / SCALES];
                var scale = 0.0;
                if slot != HOLE {
                    let word = 2u * LATENT_VECTORS + i % SCALES;
                    scale = bitcast<f32>(cached(slot, word / 4u)[word % 4u]);
                }
                scales[i] = scale;
            }
        }
        if lane < KEYS {
            slots[(turn ^ KEYS) + lane] = selected(t, first + KEYS + lane);
        }
        let there = own_key < KEYS && slots[turn + own_key] != HOLE;
        turn ^= KEYS;
        workgroupBarrier();
        var dots: array<vec2<f32>, 4>;
        for (var j = 0u; j < KEYS / 4u; j++) {
            dots[j] = vec2(0.0);
        }
        for (var v = slice; v < ROW_VECTORS; v += SLICES) {
            let a = query(first_row, head, heads, v);
            let b = query(first_row, head + 1u, heads, v);
            for (var j = 0u; j < KEYS / 4u; j++) {
                let row = rows[(key + 4u * j) * ROW_VECTORS + v];
                var factor = 1.0;
                if FP8 && v < LATENT_VECTORS {
                    factor = scales[(key + 4u * j) * SCALES + v / GROUP_VECTORS];
                }
                dots[j] += factor * vec2(act_product(a, row), act_product(b, row));
            }
        }
        for (var j = 0u; j < KEYS / 4u; j++) {
            let at = slice * PART_STRIDE + (key + 4u * j) * HEADS + head;
            parts[at] = dots[j].x;
            parts[at + 1u] = dots[j].y;
        }
        workgroupBarrier();
        var score = 0.0;
        for (var i = 0u; i < SLICES; i++) {
            score += parts[i * PART_STRIDE + lane];
        }
        score = select(LOWEST, score * params.scale, there);
        scores[lane] = score;
        workgroupBarrier();
        var higher = highest;
        for (var i = 0u; i < KEYS; i++) {
            higher = max(higher, scores[i * HEADS + own_head]);
        }
        let weight = select(0.0, exp(score - higher), there);
        let factor = exp(highest - higher);
        total = total * factor + weight;
        highest = higher;
        parts[lane] = weight;
        if own_key == 0u {
            factors[own_head] = factor;
        }
        workgroupBarrier();
        for (var h = 0u; h < HEADS; h++) {
            sums[h] *= factors[h];
        }
        for (var s = 0u; s < KEYS; s++) {
            var values = vec4(0.0);
            for (var half = 0u; half < 2u; half++) {
                let word = lane + half * LANES;
                if word < 4u * LATENT_VECTORS {
                    var pair = act_pair(rows[s * ROW_VECTORS + word / 4u][word % 4u]);
                    if FP8 {
                        pair *= scales[s * SCALES + word / 4u / GROUP_VECTORS];
                    }
                    if half == 0u {
                        values = vec4(pair, values.zw);
                    } else {
                        values = vec4(values.xy, pair);
                    }
                }
            }
            for (var h = 0u; h < HEADS; h++) {
                sums[h] += parts[s * HEADS + h] * values;
            }
        }
    }

    // The sums of the weights, over the lanes of a head.
    workgroupBarrier();
    parts[lane] = total;
    scores[lane] = highest;
    workgroupBarrier();
    for (var h = 0u; h < heads; h++) {
        var all = 0.0;
        for (var i = 0u; i < KEYS; i++) {
            all += parts[i * HEADS + h];
        }
        let row = first_row + h;
        for (var half = 0u; half < 2u; half++) {
            let word = lane + half * LANES;
            if word >= 4u * LATENT_VECTORS {
                continue;
            }
            var pair = sums[h].xy;
            if half == 1u {
                pair = sums[h].zw;
            }
            if params.splits == 1u {
                // Nothing selected gives zeros.
                pair /= select(all, 1.0, all == 0.0);
                if ACT_WORDS == 2u {
                    out[2u * (row * 4u * LATENT_VECTORS + word)] = bitcast<u32>(pair.x);
                    out[2u * (row * 4u * LATENT_VECTORS + word) + 1u] = bitcast<u32>(pair.y);
                } else {
                    out[row * 4u * LATENT_VECTORS + word] = pack_bf16(pair.x, pair.y);
                }
            } else {
                let at = (row * params.splits + split) * (8u * LATENT_VECTORS + 2u);
                out[at + 2u * word] = bitcast<u32>(pair.x);
                out[at + 2u * word + 1u] = bitcast<u32>(pair.y);
                if word == 0u {
                    out[at + 8u * LATENT_VECTORS] = bitcast<u32>(scores[h]);
                    out[at + 8u * LATENT_VECTORS + 1u] = bitcast<u32>(all);
                }
            }
        }
    }
}
