// One workgroup a token: RMSNorm of the latent, RoPE of the key beside it, into the token's slot of the cache.

override WEIGHT: u32 = BF16;
// Rows go one below the other, not into their slots.
override STAGED: bool = false;

struct Params {
    tokens: u32,
    // Even, both.
    rank: u32,
    rope: u32,
    // Of the window of the cache that is bound.
    first_slot: u32,
    slots: u32,
    eps: f32,
}

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read> slot_mapping: array<i32>;
@group(0) @binding(1) var<storage, read> x: array<ActPair>;
@group(0) @binding(2) var<storage, read> weight: array<u32>;
@group(0) @binding(3) var<storage, read> cos_sin: array<vec2<f32>>;
@group(0) @binding(4) var<storage, read_write> cache: array<ActPair>;

fn weight_at(i: u32) -> f32 {
    return weight_of(WEIGHT, weight[weight_word(WEIGHT, i)], i);
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let t = flat(group, groups);
    if t >= params.tokens {
        return;
    }
    let mapped = select(slot_mapping[t], i32(t), STAGED);
    let slot = u32(mapped) - params.first_slot;
    if mapped < 0 || slot >= params.slots {
        return;
    }
    let words = (params.rank + params.rope) / 2u;
    let start = t * words;
    let out = slot * words;
    var sum = 0.0;
    for (var word = lane.index; word < params.rank / 2u; word += WORKGROUP) {
        let pair = act_pair(x[start + word]);
        sum += dot(pair, pair);
    }
    let scale = 1.0 / sqrt(workgroup_sum(sum, lane) / f32(params.rank) + params.eps);
    for (var word = lane.index; word < words; word += WORKGROUP) {
        var pair = act_pair(x[start + word]);
        if word < params.rank / 2u {
            pair = vec2(weight_at(2u * word), weight_at(2u * word + 1u)) * (pair * scale);
        } else {
            let turn = cos_sin[t * (params.rope / 2u) + word - params.rank / 2u];
            pair = vec2(pair.x * turn.x - pair.y * turn.y, pair.y * turn.x + pair.x * turn.y);
        }
        cache[out + word] = pack_act(pair);
    }
}
