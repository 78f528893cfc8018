// One workgroup a token and head: the splits of `sparse_mla.wgsl`, in their order.

struct Params {
    rows: u32,
    splits: u32,
    // Of a latent; even.
    columns: u32,
}

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read> parts: array<f32>;
@group(0) @binding(1) var<storage, read_write> out: array<u32>;

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = flat(group, groups);
    if row >= params.rows {
        return;
    }
    let stride = params.columns + 2u;
    let start = row * params.splits * stride;
    var highest = parts[start + params.columns];
    for (var split = 1u; split < params.splits; split++) {
        highest = max(highest, parts[start + split * stride + params.columns]);
    }
    for (var word = lane; word < params.columns / 2u; word += WORKGROUP) {
        var sum = vec2(0.0);
        var total = 0.0;
        for (var split = 0u; split < params.splits; split++) {
            let at = start + split * stride;
            let factor = exp(parts[at + params.columns] - highest);
            sum += factor * vec2(parts[at + 2u * word], parts[at + 2u * word + 1u]);
            total += factor * parts[at + params.columns + 1u];
        }
        sum /= select(total, 1.0, total == 0.0);
        out[row * params.columns / 2u + word] = pack_bf16(sum.x, sum.y);
    }
}
