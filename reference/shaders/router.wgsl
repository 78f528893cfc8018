// One workgroup a token: the experts. Places come from counting what is better, so ties go to the lower index.

override WEIGHT: u32 = BF16;
// Experts and groups of them.
override EXPERTS: u32 = 1u;
override GROUPS: u32 = 1u;
override NORMALISE: bool = true;

struct Params {
    tokens: u32,
    // Experts and groups that are taken.
    top_k: u32,
    topk_group: u32,
    scale: f32,
}

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read> logits: array<f32>;
@group(0) @binding(1) var<storage, read> bias: array<u32>;
@group(0) @binding(2) var<storage, read_write> topk_ids: array<i32>;
@group(0) @binding(3) var<storage, read_write> topk_weights: array<f32>;

var<workgroup> scores: array<f32, EXPERTS>;
var<workgroup> group_scores: array<f32, GROUPS>;
var<workgroup> kept: array<u32, GROUPS>;
// Of the first of the chosen ones: at most as many as experts.
var<workgroup> chosen: array<f32, EXPERTS>;

fn sigmoid(x: f32) -> f32 {
    // Of a magnitude alone, exp does not overflow.
    let e = exp(-abs(x));
    return select(e, 1.0, x >= 0.0) / (1.0 + e);
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let t = flat(group, groups);
    if t >= params.tokens {
        return;
    }
    for (var e = lane.index; e < EXPERTS; e += WORKGROUP) {
        let of_bias = weight_of(WEIGHT, bias[weight_word(WEIGHT, e)], e);
        scores[e] = sigmoid(logits[t * EXPERTS + e]) + of_bias;
    }
    workgroupBarrier();
    let size = EXPERTS / GROUPS;
    for (var g = lane.index; g < GROUPS; g += WORKGROUP) {
        var best = scores[g * size];
        var second = 0.0;
        for (var j = 1u; j < size; j++) {
            let score = scores[g * size + j];
            // The second of the first two is the lesser of them.
            second = select(max(second, min(score, best)), min(score, best), j == 1u);
            best = max(best, score);
        }
        group_scores[g] = best + second;
    }
    workgroupBarrier();
    for (var g = lane.index; g < GROUPS; g += WORKGROUP) {
        var better = 0u;
        for (var other = 0u; other < GROUPS; other++) {
            let ahead = group_scores[other] > group_scores[g] || (group_scores[other] == group_scores[g] && other < g);
            better += u32(ahead);
        }
        kept[g] = u32(better < params.topk_group);
    }
    workgroupBarrier();
    for (var e = lane.index; e < EXPERTS; e += WORKGROUP) {
        if kept[e / size] == 0u {
            continue;
        }
        var better = 0u;
        for (var other = 0u; other < EXPERTS; other++) {
            let ahead = scores[other] > scores[e] || (scores[other] == scores[e] && other < e);
            better += u32(ahead && kept[other / size] == 1u);
        }
        if better < params.top_k {
            topk_ids[t * params.top_k + better] = i32(e);
            chosen[better] = sigmoid(logits[t * EXPERTS + e]);
        }
    }
    workgroupBarrier();
    var scale = params.scale;
    if NORMALISE {
        var sum = 0.0;
        for (var k = 0u; k < params.top_k; k++) {
            sum += chosen[k];
        }
        scale /= sum + 1e-20;
    }
    for (var k = lane.index; k < params.top_k; k += WORKGROUP) {
        topk_weights[t * params.top_k + k] = chosen[k] * scale;
    }
}
