// One workgroup a row: `out = weight * x / sqrt(mean(x^2) + eps)`, of activations, of floats, or of the residual stream once
// activations are added to it.

override WEIGHT: u32 = BF16;
override FLOATS: bool = false;
override RESIDUAL: bool = false;

struct Params {
    rows: u32,
    // Even.
    width: u32,
    eps: f32,
}

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read> x: array<u32>;
@group(0) @binding(1) var<storage, read_write> residual: array<f32>;
@group(0) @binding(2) var<storage, read> weight: array<u32>;
@group(0) @binding(3) var<storage, read_write> out: array<u32>;

fn weight_at(i: u32) -> f32 {
    return weight_of(WEIGHT, weight[weight_word(WEIGHT, i)], i);
}

// Elements `i` and `i + 1`, `i` even.
fn pair(i: u32) -> vec2<f32> {
    if RESIDUAL {
        return vec2(residual[i], residual[i + 1u]);
    }
    if FLOATS {
        return vec2(bitcast<f32>(x[i]), bitcast<f32>(x[i + 1u]));
    }
    return bf16_pair(x[i / 2u]);
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let row = flat(group, groups);
    if row >= params.rows {
        return;
    }
    let start = row * params.width;
    var sum = 0.0;
    for (var column = 2u * lane.index; column < params.width; column += 2u * WORKGROUP) {
        let i = start + column;
        if RESIDUAL {
            let added = bf16_pair(x[i / 2u]);
            residual[i] += added.x;
            residual[i + 1u] += added.y;
        }
        let values = pair(i);
        sum += dot(values, values);
    }
    let scale = 1.0 / sqrt(workgroup_sum(sum, lane) / f32(params.width) + params.eps);
    // A lane reads back what it has written itself.
    for (var column = 2u * lane.index; column < params.width; column += 2u * WORKGROUP) {
        let values = pair(start + column) * scale;
        out[(start + column) / 2u] = pack_bf16(weight_at(column) * values.x, weight_at(column + 1u) * values.y);
    }
}
