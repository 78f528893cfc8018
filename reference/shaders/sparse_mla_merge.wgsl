// One workgroup a token and head: the splits of `sparse_mla.wgsl`, in their order. Every lane looks at all of them: they are few, and nobody waits.

struct Params {
    rows: u32,
    splits: u32,
    // Of a latent; even.
    columns: u32,
}

// Below any score.
const LOWEST: f32 = -0x1p127f;

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

// Of a split: a pair of its sums, and what it is divided by, relative to `highest`; nothing where there is none.
fn sums(start: u32, i: u32, word: u32, highest: f32) -> vec3<f32> {
    let at = place(start, i, 2u * word);
    let own = vec3(parts[at], parts[at + 1u], parts[place(start, i, params.columns + 1u)]);
    return select(0.0, exp(highest_of(start, i) - highest), i < params.splits) * own;
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let row = flat(group, groups);
    if row >= params.rows {
        return;
    }
    let start = row * params.splits * (params.columns + 2u);
    for (var word = lane.index; word < params.columns / 2u; word += WORKGROUP) {
        var highest = LOWEST;
        var sum = vec3(0.0);
        // Eight at a time: what is loaded does not wait for what is added.
        for (var i = 0u; i < params.splits; i += 8u) {
            let low = max(max(highest_of(start, i), highest_of(start, i + 1u)), max(highest_of(start, i + 2u), highest_of(start, i + 3u)));
            let high = max(max(highest_of(start, i + 4u), highest_of(start, i + 5u)), max(highest_of(start, i + 6u), highest_of(start, i + 7u)));
            let now = max(highest, max(low, high));
            let first = (sums(start, i, word, now) + sums(start, i + 1u, word, now)) + (sums(start, i + 2u, word, now) + sums(start, i + 3u, word, now));
            let second = (sums(start, i + 4u, word, now) + sums(start, i + 5u, word, now)) + (sums(start, i + 6u, word, now) + sums(start, i + 7u, word, now));
            sum = exp(highest - now) * sum + (first + second);
            highest = now;
        }
        let mean = sum.xy / select(sum.z, 1.0, sum.z == 0.0);
        out[row * params.columns / 2u + word] = pack_act(mean);
    }
}
