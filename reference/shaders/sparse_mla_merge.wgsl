// One workgroup a token and head: the splits of `sparse_mla.wgsl`, in their order.

struct Params {
    rows: u32,
    splits: u32,
    // Of a latent; even.
    columns: u32,
}

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read> parts: array<f32>;
@group(0) @binding(1) var<storage, read_write> out: array<ActPair>;

// What split `i` is multiplied by, which has nothing where there is none.
fn factor(start: u32, stride: u32, i: u32, highest: f32) -> f32 {
    let at = start + min(i, params.splits - 1u) * stride + params.columns;
    return select(0.0, exp(parts[at] - highest), i < params.splits);
}

fn pair(start: u32, stride: u32, i: u32, word: u32) -> vec2<f32> {
    let at = start + min(i, params.splits - 1u) * stride + 2u * word;
    return vec2(parts[at], parts[at + 1u]);
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let row = flat(group, groups);
    if row >= params.rows {
        return;
    }
    let stride = params.columns + 2u;
    let start = row * params.splits * stride;
    var highest = parts[start + params.columns];
    for (var i = lane.index; i < params.splits; i += WORKGROUP) {
        highest = max(highest, parts[start + i * stride + params.columns]);
    }
    highest = workgroup_max(highest, lane);
    var total = 0.0;
    for (var i = lane.index; i < params.splits; i += WORKGROUP) {
        total += factor(start, stride, i, highest) * parts[start + i * stride + params.columns + 1u];
    }
    total = workgroup_sum(total, lane);
    for (var word = lane.index; word < params.columns / 2u; word += WORKGROUP) {
        var sum = vec2(0.0);
        // Four at a time: what is loaded does not wait for what is added.
        for (var i = 0u; i < params.splits; i += 4u) {
            let a = factor(start, stride, i, highest) * pair(start, stride, i, word);
            let b = factor(start, stride, i + 1u, highest) * pair(start, stride, i + 1u, word);
            let c = factor(start, stride, i + 2u, highest) * pair(start, stride, i + 2u, word);
            let d = factor(start, stride, i + 3u, highest) * pair(start, stride, i + 3u, word);
            sum += (a + b) + (c + d);
        }
        sum /= select(total, 1.0, total == 0.0);
        out[row * params.columns / 2u + word] = pack_act(sum);
    }
}
