// One workgroup a token and head: the splits of `sparse_mla.wgsl`, in their order. Every lane looks at all of them: they are few, and nobody waits.

struct Params {
    rows: u32,
    splits: u32,
    // Of a latent; even.
    columns: u32,
}

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read> parts: array<f32>;
@group(0) @binding(1) var<storage, read_write> out: array<ActPair>;

// Where split `i` has its number `column`; of those behind the last, the last has.
fn place(start: u32, i: u32, column: u32) -> u32 {
    return start + min(i, params.splits - 1u) * (params.columns + 2u) + column;
}

fn highest_of(start: u32, i: u32) -> f32 {
    return parts[place(start, i, params.columns)];
}

// What split `i` is multiplied by, which has nothing where there is none.
fn factor(start: u32, i: u32, highest: f32) -> f32 {
    return select(0.0, exp(highest_of(start, i) - highest), i < params.splits);
}

// Of a split: a pair of its sums, and what it is divided by.
fn sums(start: u32, i: u32, word: u32) -> vec3<f32> {
    let at = place(start, i, 2u * word);
    return vec3(parts[at], parts[at + 1u], parts[place(start, i, params.columns + 1u)]);
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let row = flat(group, groups);
    if row >= params.rows {
        return;
    }
    let start = row * params.splits * (params.columns + 2u);
    // Four at a time: what is loaded does not wait for what is added.
    var highest = highest_of(start, 0u);
    for (var i = 0u; i < params.splits; i += 4u) {
        let first = max(highest_of(start, i), highest_of(start, i + 1u));
        let second = max(highest_of(start, i + 2u), highest_of(start, i + 3u));
        highest = max(highest, max(first, second));
    }
    for (var word = lane.index; word < params.columns / 2u; word += WORKGROUP) {
        var sum = vec3(0.0);
        for (var i = 0u; i < params.splits; i += 4u) {
            let a = factor(start, i, highest) * sums(start, i, word);
            let b = factor(start, i + 1u, highest) * sums(start, i + 1u, word);
            let c = factor(start, i + 2u, highest) * sums(start, i + 2u, word);
            let d = factor(start, i + 3u, highest) * sums(start, i + 3u, word);
            sum += (a + b) + (c + d);
        }
        let mean = sum.xy / select(sum.z, 1.0, sum.z == 0.0);
        out[row * params.columns / 2u + word] = pack_act(mean);
    }
}
