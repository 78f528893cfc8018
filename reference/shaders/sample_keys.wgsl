// What `sample.wgsl` chooses among: logits as keys, one lane each, then what a row changes of them, one lane a changed token.
// `sample_wide.wgsl` goes before it.

// Words of an edit: row, token, what it does, and the number that it does it with, an f64.
const EDIT: u32 = 5u;
const BAN: u32 = 0u;
const ADD: u32 = 1u;
// The repetition penalty.
const SCALE: u32 = 2u;

// Else: the keys.
override EDITS: bool = false;

struct Params {
    // The first row of this launch; its logits, or all edits.
    first: u32,
    count: u32,
    vocab: u32,
    rows: u32,
}

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read> logits: array<u32>;
// In the order of rows and tokens; those of one token in the order in which they are done.
@group(0) @binding(1) var<storage, read> edits: array<u32>;
@group(0) @binding(2) var<storage, read_write> keys: array<vec2<u32>>;

fn edited(key: vec2<u32>, at: u32) -> vec2<u32> {
    if edits[at + 2u] == BAN {
        return NEGATIVE_INFINITY_KEY;
    }
    if same(key, NAN_KEY) || same(key, NEGATIVE_INFINITY_KEY) || same(key, INFINITY_KEY) {
        return key;
    }
    let number = wide_of(vec2(edits[at + 3u], edits[at + 4u]));
    let own = wide_of(bits_of(key));
    if edits[at + 2u] == ADD {
        return key_of(sum_of(own, number));
    }
    if less(ZERO_KEY, key) {
        return key_of(quotient_of(own, number));
    }
    return key_of(times(own, number));
}

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = flat(group, groups) * WORKGROUP + lane;
    if i >= params.count {
        return;
    }
    if !EDITS {
        keys[i] = key_of_float(logits[i]);
        return;
    }
    let row = edits[i * EDIT];
    let token = edits[i * EDIT + 1u];
    if i > 0u && edits[(i - 1u) * EDIT] == row && edits[(i - 1u) * EDIT + 1u] == token {
        return;
    }
    // Rows of the other launches are not bound.
    let place = row - params.first;
    if row < params.first || place >= params.rows {
        return;
    }
    var key = keys[place * params.vocab + token];
    for (var j = i; j < params.count && edits[j * EDIT] == row && edits[j * EDIT + 1u] == token; j++) {
        key = edited(key, j * EDIT);
    }
    keys[place * params.vocab + token] = key;
}
