// What the experts of every token give, weighted, in the order of `k`, beside the shared expert. Pairs whose expert does not exist give
// nothing.

override SHARED: bool = false;

struct Params {
    // Of the tokens whose pairs are bound; and pairs of columns of a row.
    tokens: u32,
    words: u32,
    top_k: u32,
    experts: u32,
}

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read> topk_ids: array<u32>;
@group(0) @binding(1) var<storage, read> topk_weights: array<f32>;
@group(0) @binding(2) var<storage, read> parts: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read> shared_out: array<ActPair>;
@group(0) @binding(4) var<storage, read_write> out: array<ActPair>;

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = flat(group, groups) * WORKGROUP + lane;
    if i >= params.tokens * params.words {
        return;
    }
    let t = i / params.words;
    var sum = vec2(0.0);
    for (var pair = t * params.top_k; pair < (t + 1u) * params.top_k; pair++) {
        if topk_ids[pair] < params.experts {
            sum += topk_weights[pair] * parts[pair * params.words + i % params.words];
        }
    }
    if SHARED {
        sum += act_pair(shared_out[i]);
    }
    out[i] = pack_act(sum);
}
