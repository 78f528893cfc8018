// `out[t, f] = sum_c x[t, c] weight[f, c]`, for every head by itself where there are heads. After this comes `weights_dense.wgsl` or
// `weights_int4.wgsl`, which has `weights`: eight columns of a row of the weight, zeros after its end.

override FLOATS: bool = false;
// Tokens are `rows` of x.
override GATHER: bool = false;
// Of `few`: lanes of a feature, a power of two; tokens of a workgroup, at most 8; their product with the workgroup.
override LANES: u32 = 32u;
override TOKENS: u32 = 8u;
override PARTS: u32 = 512u;
// Of `one`: the vectors of a lane, and whether all lanes have as many.
override STEPS: u32 = 1u;
override EVEN: bool = false;
// Of `tiles`: the root of the workgroup, and nine times its fourfold.
override SIDE: u32 = 8u;
override TILE: u32 = 288u;

struct Params {
    tokens: u32,
    columns: u32,
    // Features of the launch, the first of them in the output, and the first row of the weight in a head.
    features: u32,
    first: u32,
    row: u32,
    rows_of_head: u32,
    // Elements from token to token and from head to head.
    x_token: u32,
    x_head: u32,
    out_token: u32,
    out_head: u32,
    // Rows of x, and packed weights: columns of a group, groups of a row, the row of the scales that the first row of the weight has.
    x_rows: u32,
    group_size: u32,
    groups: u32,
    scale_row: u32,
    // Of packed weights: the bits of INTEGER, twice.
    integer: array<u32, 2>,
}

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read> x: array<ActEight>;
@group(0) @binding(1) var<storage, read> rows: array<i32>;
@group(0) @binding(2) var<storage, read_write> out: array<u32>;
@group(0) @binding(3) var<storage, read> weight: array<vec4<u32>>;

var<workgroup> parts: array<f32, PARTS>;
var<workgroup> x_tile: array<vec4<f32>, TILE>;
var<workgroup> weight_tile: array<vec4<f32>, TILE>;

fn x_at(i: u32) -> f32 {
    return act_of(x[i / 8u][(i / 2u) & 3u], i);
}

// Where a token begins.
fn start_of(token: u32, head: u32) -> u32 {
    var t = min(token, params.tokens - 1u);
    if GATHER {
        t = min(u32(rows[t]), params.x_rows - 1u);
    }
    return t * params.x_token + head * params.x_head;
}

// Columns `8 * chunk..8 * chunk + 8` of a token, zeros after the last.
fn inputs(token: u32, head: u32, chunk: u32) -> Eight {
    let start = start_of(token, head) + 8u * chunk;
    let left = params.columns - min(8u * chunk, params.columns);
    if left >= 8u && (start & 7u) == 0u {
        return act_eight(x[start / 8u]);
    }
    var eight = Eight(vec4(0.0), vec4(0.0));
    for (var j = 0u; j < min(left, 4u); j++) {
        eight.low[j] = x_at(start + j);
    }
    for (var j = 4u; j < min(left, 8u); j++) {
        eight.high[j - 4u] = x_at(start + j);
    }
    return eight;
}

// Features `feature`, an even one, and the next, of a token. Whole words: where outputs are rounded there is an even number of them.
fn store(token: u32, head: u32, feature: u32, pair: vec2<f32>) {
    if token >= params.tokens || feature >= params.features {
        return;
    }
    let i = token * params.out_token + head * params.out_head + params.first + feature;
    if FLOATS {
        out[i] = bitcast<u32>(pair.x);
        if feature + 1u < params.features {
            out[i + 1u] = bitcast<u32>(pair.y);
        }
    } else {
        out[i / 2u] = pack_bf16(pair.x, pair.y);
    }
}

// Few tokens: LANES lanes go over the columns of a feature.
@compute @workgroup_size(WORKGROUP)
fn few(@builtin(workgroup_id) group: vec3<u32>, lane: Lane) {
    let features = WORKGROUP / LANES;
    let place = lane.index % LANES;
    let feature = group.x * features + lane.index / LANES;
    let token = group.y * TOKENS;
    let row = min(feature, params.features - 1u) + group.z * params.rows_of_head + params.row;
    var sums = array<f32, 8>();
    for (var chunk = place; 8u * chunk < params.columns; chunk += LANES) {
        let w = weights(row, chunk);
        for (var t = 0u; t < TOKENS; t++) {
            let v = inputs(token + t, group.z, chunk);
            sums[t] += dot(v.low, w.low) + dot(v.high, w.high);
        }
    }
    for (var t = 0u; t < TOKENS; t++) {
        parts[t * WORKGROUP + lane.index] = sums[t];
    }
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        if place < half {
            for (var t = 0u; t < TOKENS; t++) {
                parts[t * WORKGROUP + lane.index] += parts[t * WORKGROUP + lane.index + half];
            }
        }
        workgroupBarrier();
    }
    for (var i = lane.index; i < TOKENS * features / 2u; i += WORKGROUP) {
        let t = i / (features / 2u);
        let pair = 2u * (i % (features / 2u));
        let at = t * WORKGROUP + pair * LANES;
        store(token + t, group.z, group.x * features + pair, vec2(parts[at], parts[at + LANES]));
    }
}

// Many tokens: tiles of 4 * SIDE tokens by as many features, 32 columns at a time; a lane has four by four.
@compute @workgroup_size(WORKGROUP)
fn tiles(@builtin(workgroup_id) group: vec3<u32>, lane: Lane) {
    let side = 4u * SIDE;
    let first_feature = group.x * side;
    let first_token = group.y * side;
    let of_lane = vec2(lane.index % SIDE, lane.index / SIDE);
    var sums = array<vec4<f32>, 4>();
    for (var column = 0u; column < params.columns; column += 32u) {
        for (var i = lane.index; i < 4u * side; i += WORKGROUP) {
            let line = i / 4u;
            let chunk = column / 8u + i % 4u;
            let at = line * 9u + 2u * (i % 4u);
            let v = inputs(first_token + line, group.z, chunk);
            x_tile[at] = v.low;
            x_tile[at + 1u] = v.high;
            let feature = min(first_feature + line, params.features - 1u);
            let w = weights(feature + group.z * params.rows_of_head + params.row, chunk);
            weight_tile[at] = w.low;
            weight_tile[at + 1u] = w.high;
        }
        workgroupBarrier();
        for (var k = 0u; k < 8u; k++) {
            let at = 36u * of_lane.x + k;
            let w = array(weight_tile[at], weight_tile[at + 9u], weight_tile[at + 18u], weight_tile[at + 27u]);
            for (var t = 0u; t < 4u; t++) {
                let v = x_tile[36u * of_lane.y + 9u * t + k];
                sums[t] += vec4(dot(v, w[0]), dot(v, w[1]), dot(v, w[2]), dot(v, w[3]));
            }
        }
        workgroupBarrier();
    }
    for (var t = 0u; t < 4u; t++) {
        let token = first_token + 4u * of_lane.y + t;
        let feature = first_feature + 4u * of_lane.x;
        store(token, group.z, feature, sums[t].xy);
        store(token, group.z, feature + 2u, sums[t].zw);
    }
}
