// `cos_sin[t, j] = (cos a, sin a)`, `a = positions[t] * theta^(-2j / dim)`. Turns are counted in 64 bits of a whole one, which
// wrap by themselves; a device's own sine may be off by 2^-11.

struct Params {
    tokens: u32,
    pairs: u32,
}

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read> positions: array<i32>;
// For every pair, the turn of one position in units of 2^-64: upper and lower word.
@group(0) @binding(1) var<storage, read> turns: array<vec2<u32>>;
@group(0) @binding(2) var<storage, read_write> cos_sin: array<vec2<f32>>;

fn upper_product(a: u32, b: u32) -> u32 {
    let low = (a & 0xffffu) * (b & 0xffffu);
    let first = (a >> 16u) * (b & 0xffffu) + (low >> 16u);
    let second = (a & 0xffffu) * (b >> 16u) + (first & 0xffffu);
    return (a >> 16u) * (b >> 16u) + (first >> 16u) + (second >> 16u);
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let i = flat(group, groups) * WORKGROUP + lane.index;
    if i >= params.tokens * params.pairs {
        return;
    }
    let position = u32(positions[i / params.pairs]);
    let turn = turns[i % params.pairs];
    let angle = position * turn.x + upper_product(position, turn.y);
    // The nearest quarter, and what is left: at most an eighth of a turn.
    let quarter = (angle + 0x20000000u) >> 30u;
    let rest = bitcast<i32>(angle - (quarter << 30u));
    let x = f32(rest) * (6.283185307179586 / 4294967296.0);
    let y = x * x;
    let sine = x + x * y * (-1.0 / 6.0 + y * (1.0 / 120.0 + y * (-1.0 / 5040.0 + y * (1.0 / 362880.0))));
    let cosine = 1.0 + y * (-0.5 + y * (1.0 / 24.0 + y * (-1.0 / 720.0 + y * (1.0 / 40320.0 + y * (-1.0 / 3628800.0)))));
    var turned = vec2(cosine, sine);
    switch quarter {
        case 1u: { turned = vec2(-sine, cosine); }
        case 2u: { turned = vec2(-cosine, -sine); }
        case 3u: { turned = vec2(sine, -cosine); }
        default: {}
    }
    cos_sin[i] = turned;
}
