// One workgroup an item, up to eight pairs of one expert, and 64 features: `silu(gate x) * (up x)` of the tokens' rows, or `down` of what
// that gave.
//
// Weights lie in vectors of 16 bytes, their rows filled up to whole ones; four lanes share a feature, and each takes every fourth step of
// 32 columns. Rows of x wait in floats, as many columns at once as CHUNK.

const FEATURES: u32 = 64u;
const SLICES: u32 = 4u;
const LANES: u32 = 256u;
const PAIRS: u32 = 8u;
const CHUNK: u32 = 512u;
// Columns of a step, and its vectors with one more: lanes of a feature then read different banks.
const STEP: u32 = 32u;
const STEP_STRIDE: u32 = STEP / 4u + 1u;
const CHUNK_STEPS: u32 = CHUNK / STEP;
const ROW_STRIDE: u32 = CHUNK_STEPS * STEP_STRIDE;
const INT4: u32 = 3u;
const NO_ZEROS: u32 = 0xffffffffu;
// Words of a projection in `table`: what it is, where its rows begin and how many vectors one has, where scales and zero points begin,
// columns of a group, the type of the scales, groups.
const ENTRY: u32 = 8u;

// Else: down.
override GATE_UP: bool = true;

struct Item {
    expert: u32,
    first: u32,
    count: u32,
}

struct Params {
    items: u32,
    // Columns of x, features of the result; both even.
    columns: u32,
    features: u32,
    blocks: u32,
    top_k: u32,
    // The experts whose weights are bound.
    first_expert: u32,
    experts: u32,
}

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read> sorted: array<u32>;
@group(0) @binding(1) var<storage, read> items: array<Item>;
@group(0) @binding(2) var<storage, read> table: array<u32>;
@group(0) @binding(3) var<storage, read> weights: array<vec4<u32>>;
// Rows of the tokens, or of the pairs.
@group(0) @binding(4) var<storage, read> x: array<ActPair>;
// Of the pairs: activations, or floats.
@group(0) @binding(5) var<storage, read_write> out: array<u32>;

var<workgroup> rows: array<vec4<f32>, 1152>;
// Of slices, pairs and features.
var<workgroup> parts: array<f32, 2048>;

fn word_at(vectors: u32, word: u32) -> u32 {
    return weights[vectors + word / 4u][word % 4u];
}

// The scale of a feature's group, and its zero point.
fn scale_at(entry: u32, feature: u32, column: u32) -> vec2<f32> {
    let groups = table[entry + 7u];
    let group = min(column / table[entry + 5u], groups - 1u);
    let i = feature * groups + group;
    let dtype = table[entry + 6u];
    let scale = weight_of(dtype, word_at(table[entry + 3u], weight_word(dtype, i)), i);
    var zero = 8.0;
    if table[entry + 4u] != NO_ZEROS {
        zero = f32(nibble(word_at(table[entry + 4u], feature / 8u * groups + group), feature % 8u));
    }
    return vec2(scale, zero);
}

// Adds eight columns of a feature, times those of each pair, to `sums`. `at` is where the first pair has them in `rows`.
fn add(low: vec4<f32>, high: vec4<f32>, at: u32, sums: ptr<function, array<f32, 8>>) {
    for (var p = 0u; p < PAIRS; p++) {
        (*sums)[p] += dot(low, rows[at + p * ROW_STRIDE]) + dot(high, rows[at + p * ROW_STRIDE + 1u]);
    }
}

// The columns from `first` on of a feature of one projection, times those of the pairs.
fn add_chunk(entry: u32, feature: u32, first: u32, slice: u32, sums: ptr<function, array<f32, 8>>) {
    let kind = table[entry];
    let row = table[entry + 1u] + feature * table[entry + 2u];
    let row_vectors = table[entry + 2u];
    let group_size = table[entry + 5u];
    for (var step = slice; step < CHUNK_STEPS && first + step * STEP < params.columns; step += SLICES) {
        let column = first + step * STEP;
        let at = step * STEP_STRIDE;
        if kind == INT4 {
            let packed = weights[row + column / STEP];
            var scale = scale_at(entry, feature, column);
            for (var i = 0u; i < 4u; i++) {
                let word = packed[i];
                let q = vec4<f32>(vec4(nibble(word, 0u), nibble(word, 1u), nibble(word, 2u), nibble(word, 3u)));
                let r = vec4<f32>(vec4(nibble(word, 4u), nibble(word, 5u), nibble(word, 6u), nibble(word, 7u)));
                if group_size % STEP == 0u {
                    add((q - scale.y) * scale.x, (r - scale.y) * scale.x, at + 2u * i, sums);
                    continue;
                }
                var values: array<f32, 8>;
                for (var j = 0u; j < 8u; j++) {
                    scale = scale_at(entry, feature, column + 8u * i + j);
                    values[j] = (f32(nibble(word, j)) - scale.y) * scale.x;
                }
                add(
                    vec4(values[0], values[1], values[2], values[3]),
                    vec4(values[4], values[5], values[6], values[7]),
                    at + 2u * i,
                    sums,
                );
            }
        } else {
            for (var i = 0u; i < 4u && column + 8u * i < params.columns; i++) {
                var low: vec4<f32>;
                var high: vec4<f32>;
                if kind == F32 {
                    let vector = row + column / 4u + 2u * i;
                    low = bitcast<vec4<f32>>(weights[vector]);
                    // The row may end between the two.
                    high = bitcast<vec4<f32>>(weights[min(vector + 1u, row + row_vectors - 1u)]);
                } else {
                    let vector = weights[row + column / 8u + i];
                    low = vec4(halves(kind, vector.x), halves(kind, vector.y));
                    high = vec4(halves(kind, vector.z), halves(kind, vector.w));
                }
                add(low, high, at + 2u * i, sums);
            }
        }
    }
}

fn halves(kind: u32, word: u32) -> vec2<f32> {
    return vec2(weight_of(kind, word, 0u), weight_of(kind, word, 1u));
}

// Leaves the sums of the slices of a feature, for two features and a pair of every lane.
fn over_slices(sums: ptr<function, array<f32, 8>>, lane: u32) -> vec2<f32> {
    workgroupBarrier();
    for (var p = 0u; p < PAIRS; p++) {
        parts[(lane % SLICES * PAIRS + p) * FEATURES + lane / SLICES] = (*sums)[p];
    }
    workgroupBarrier();
    var both = vec2(0.0);
    for (var slice = 0u; slice < SLICES; slice++) {
        let at = (slice * PAIRS + lane / (FEATURES / 2u)) * FEATURES + lane % (FEATURES / 2u) * 2u;
        both += vec2(parts[at], parts[at + 1u]);
    }
    return both;
}

fn silu(x: f32) -> f32 {
    return x / (1.0 + exp(-x));
}

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let number = flat(group, groups);
    if number / params.blocks >= params.items {
        return;
    }
    let item = items[number / params.blocks];
    let expert = item.expert - params.first_expert;
    if item.count == 0u || expert >= params.experts {
        return;
    }
    let first_feature = number % params.blocks * FEATURES;
    // What is beyond the last feature is computed like it and dropped.
    let feature = min(first_feature + lane / SLICES, params.features - 1u);
    var sums: array<f32, 8>;
    var others: array<f32, 8>;
    for (var p = 0u; p < PAIRS; p++) {
        sums[p] = 0.0;
        others[p] = 0.0;
    }
    for (var first = 0u; first < params.columns; first += CHUNK) {
        workgroupBarrier();
        for (var i = lane; i < PAIRS * CHUNK / 4u; i += LANES) {
            let p = i / (CHUNK / 4u);
            let column = first + i % (CHUNK / 4u) * 4u;
            var values = vec4(0.0);
            if p < item.count {
                let pair = sorted[item.first + p];
                let row = select(pair, pair / params.top_k, GATE_UP) * (params.columns / 2u);
                if column < params.columns {
                    values = vec4(act_pair(x[row + column / 2u]), values.zw);
                }
                if column + 2u < params.columns {
                    values = vec4(values.xy, act_pair(x[row + column / 2u + 1u]));
                }
            }
            let within = i % (CHUNK / 4u);
            rows[p * ROW_STRIDE + within / (STEP / 4u) * STEP_STRIDE + within % (STEP / 4u)] = values;
        }
        workgroupBarrier();
        if GATE_UP {
            add_chunk(expert * 3u * ENTRY, feature, first, lane % SLICES, &sums);
            add_chunk((expert * 3u + 1u) * ENTRY, feature, first, lane % SLICES, &others);
        } else {
            add_chunk((expert * 3u + 2u) * ENTRY, feature, first, lane % SLICES, &sums);
        }
    }
    var both = over_slices(&sums, lane);
    if GATE_UP {
        let up = over_slices(&others, lane);
        both = vec2(silu(both.x) * up.x, silu(both.y) * up.y);
    }
    let p = lane / (FEATURES / 2u);
    let column = first_feature + lane % (FEATURES / 2u) * 2u;
    if p >= item.count || column >= params.features {
        return;
    }
    let at = sorted[item.first + p] * params.features + column;
    if !GATE_UP || ACT_WORDS == 2u {
        out[at] = bitcast<u32>(both.x);
        out[at + 1u] = bitcast<u32>(both.y);
    } else {
        out[at / 2u] = pack_bf16(both.x, both.y);
    }
}
