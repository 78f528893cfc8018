// Reductions over a workgroup, for adapters without subgroups. `reduce_subgroups.wgsl` has the same functions.

struct Lane {
    @builtin(local_invocation_index) index: u32,
}

var<workgroup> reduce_parts: array<f32, WORKGROUP>;
var<workgroup> reduce_fours: array<vec4<f32>, WORKGROUP>;

// The sum of all lanes' values, on every lane. All lanes call it.
fn workgroup_sum(value: f32, lane: Lane) -> f32 {
    reduce_parts[lane.index] = value;
    workgroupBarrier();
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        if lane.index < half {
            reduce_parts[lane.index] += reduce_parts[lane.index + half];
        }
        workgroupBarrier();
    }
    let sum = reduce_parts[0];
    workgroupBarrier();
    return sum;
}

// Four sums.
fn workgroup_sum_of_four(value: vec4<f32>, lane: Lane) -> vec4<f32> {
    reduce_fours[lane.index] = value;
    workgroupBarrier();
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        if lane.index < half {
            reduce_fours[lane.index] += reduce_fours[lane.index + half];
        }
        workgroupBarrier();
    }
    let all = reduce_fours[0];
    workgroupBarrier();
    return all;
}

// The largest of all lanes' values, on every lane. All lanes call it.
fn workgroup_max(value: f32, lane: Lane) -> f32 {
    reduce_parts[lane.index] = value;
    workgroupBarrier();
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        if lane.index < half {
            reduce_parts[lane.index] = max(reduce_parts[lane.index], reduce_parts[lane.index + half]);
        }
        workgroupBarrier();
    }
    let largest = reduce_parts[0];
    workgroupBarrier();
    return largest;
}
