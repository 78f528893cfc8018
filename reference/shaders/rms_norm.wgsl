// One workgroup a row: `out = weight * x / sqrt(mean(x^2) + eps)`, of activations, of floats, or of the residual stream once
// activations are added to it.

// Vectors of eight columns that a lane keeps of a row.
const KEPT: u32 = 4u;

override WEIGHT: u32 = BF16;
override FLOATS: bool = false;
override RESIDUAL: bool = false;
// Rows are whole vectors of eight columns, KEPT for each lane at most.
override WIDE: bool = false;

struct Params {
    rows: u32,
    // Even.
    width: u32,
    eps: f32,
}

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> residual: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> weight: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read_write> out: array<ActEight>;

fn x_word(i: u32) -> u32 {
    return x[i / 4u][i % 4u];
}

fn weight_at(i: u32) -> f32 {
    let word = weight_word(WEIGHT, i);
    return weight_of(WEIGHT, weight[word / 4u][word % 4u], i);
}

// Elements `i` and `i + 1`, `i` even.
fn pair(i: u32) -> vec2<f32> {
    if FLOATS {
        return bitcast<vec2<f32>>(vec2(x_word(i), x_word(i + 1u)));
    }
    return bf16_pair(x_word(i / 2u));
}

fn residual_pair(i: u32) -> vec2<f32> {
    return vec2(residual[i / 4u][i % 4u], residual[i / 4u][i % 4u + 1u]);
}

// Vector `v` of x, or of the residual stream once x is added to it.
fn eight(v: u32) -> Eight {
    var values: Eight;
    if FLOATS {
        values = Eight(bitcast<vec4<f32>>(x[2u * v]), bitcast<vec4<f32>>(x[2u * v + 1u]));
    } else {
        values = eight_bf16(x[v]);
    }
    if RESIDUAL {
        values = Eight(residual[2u * v] + values.low, residual[2u * v + 1u] + values.high);
        residual[2u * v] = values.low;
        residual[2u * v + 1u] = values.high;
    }
    return values;
}

fn weights(v: u32) -> Eight {
    if WEIGHT == F32 {
        return Eight(bitcast<vec4<f32>>(weight[2u * v]), bitcast<vec4<f32>>(weight[2u * v + 1u]));
    }
    if WEIGHT == F16 {
        return eight_f16(weight[v]);
    }
    return eight_bf16(weight[v]);
}

// What a row is multiplied by, of each lane's part of the sum of its squares.
fn scale_of(sum: f32, lane: Lane) -> f32 {
    return 1.0 / sqrt(workgroup_sum(sum, lane) / f32(params.width) + params.eps);
}

fn wide(row: u32, lane: Lane) {
    let vectors = params.width / 8u;
    var kept: array<Eight, KEPT>;
    var sum = 0.0;
    for (var k = 0u; k < KEPT; k++) {
        let v = lane.index + k * WORKGROUP;
        if v < vectors {
            let values = eight(row * vectors + v);
            sum += dot(values.low, values.low) + dot(values.high, values.high);
            kept[k] = values;
        }
    }
    let scale = scale_of(sum, lane);
    for (var k = 0u; k < KEPT; k++) {
        let v = lane.index + k * WORKGROUP;
        if v < vectors {
            let w = weights(v);
            let low = w.low * (kept[k].low * scale);
            let high = w.high * (kept[k].high * scale);
            out[row * vectors + v] = ActEight(pack_act(low.xy), pack_act(low.zw), pack_act(high.xy), pack_act(high.zw));
        }
    }
}

fn narrow(row: u32, lane: Lane) {
    let start = row * params.width;
    var sum = 0.0;
    for (var column = 2u * lane.index; column < params.width; column += 2u * WORKGROUP) {
        let i = start + column;
        var values = pair(i);
        if RESIDUAL {
            values += residual_pair(i);
            residual[i / 4u][i % 4u] = values.x;
            residual[i / 4u][i % 4u + 1u] = values.y;
        }
        sum += dot(values, values);
    }
    let scale = scale_of(sum, lane);
    // A lane reads back what it has written itself.
    for (var column = 2u * lane.index; column < params.width; column += 2u * WORKGROUP) {
        let i = start + column;
        var values = pair(i);
        if RESIDUAL {
            values = residual_pair(i);
        }
        values *= scale;
        out[i / 8u][i / 2u % 4u] = pack_act(vec2(weight_at(column) * values.x, weight_at(column + 1u) * values.y));
    }
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let row = flat(group, groups);
    if row >= params.rows {
        return;
    }
    if WIDE {
        wide(row, lane);
    } else {
        narrow(row, lane);
    }
}
