// `to = from`, a vector of four words a lane.

struct Params {
    vectors: u32,
}

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read> from_words: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> to_words: array<vec4<u32>>;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let vector = flat(group, groups) * WORKGROUP + lane.index;
    if vector < params.vectors {
        to_words[vector] = from_words[vector];
    }
}
