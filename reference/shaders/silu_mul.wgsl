// `out = silu(gate) * up`, of activations or of floats; a lane has two columns of the output.

override FLOATS: bool = false;

struct Params {
    // Pairs of columns of the output.
    words: u32,
}

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read> gate: array<u32>;
@group(0) @binding(1) var<storage, read> up: array<u32>;
@group(0) @binding(2) var<storage, read_write> out: array<ActPair>;

fn silu(x: vec2<f32>) -> vec2<f32> {
    return x / (1.0 + exp(-x));
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let word = flat(group, groups) * WORKGROUP + lane.index;
    if word >= params.words {
        return;
    }
    var product: vec2<f32>;
    if FLOATS {
        let gates = vec2(bitcast<f32>(gate[2u * word]), bitcast<f32>(gate[2u * word + 1u]));
        product = silu(gates) * vec2(bitcast<f32>(up[2u * word]), bitcast<f32>(up[2u * word + 1u]));
    } else {
        product = silu(bf16_pair(gate[word])) * bf16_pair(up[word]);
    }
    out[word] = pack_act(product);
}
