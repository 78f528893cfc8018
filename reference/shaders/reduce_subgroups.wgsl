// Reductions over a workgroup, by subgroups of any size. `reduce_plain.wgsl` has the same functions.

struct Lane {
    @builtin(local_invocation_index) index: u32,
    @builtin(subgroup_invocation_id) place: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
}

var<workgroup> reduce_parts: array<f32, WORKGROUP>;
var<workgroup> reduce_fours: array<vec4<f32>, WORKGROUP>;

// The sum of all lanes' values, on every lane. All lanes call it.
fn workgroup_sum(value: f32, lane: Lane) -> f32 {
    let part = subgroupAdd(value);
    if lane.place == 0u {
        reduce_parts[lane.subgroup] = part;
    }
    workgroupBarrier();
    var sum = 0.0;
    for (var i = 0u; i < lane.subgroups; i++) {
        sum += reduce_parts[i];
    }
    workgroupBarrier();
    return sum;
}

// Four sums.
fn workgroup_sum_of_four(value: vec4<f32>, lane: Lane) -> vec4<f32> {
    let part = subgroupAdd(value);
    if lane.place == 0u {
        reduce_fours[lane.subgroup] = part;
    }
    workgroupBarrier();
    var all = vec4(0.0);
    for (var i = 0u; i < lane.subgroups; i++) {
        all += reduce_fours[i];
    }
    workgroupBarrier();
    return all;
}

// The largest of all lanes' values, on every lane. All lanes call it.
fn workgroup_max(value: f32, lane: Lane) -> f32 {
    let part = subgroupMax(value);
    if lane.place == 0u {
        reduce_parts[lane.subgroup] = part;
    }
    workgroupBarrier();
    var largest = reduce_parts[0];
    for (var i = 1u; i < lane.subgroups; i++) {
        largest = max(largest, reduce_parts[i]);
    }
    workgroupBarrier();
    return largest;
}
