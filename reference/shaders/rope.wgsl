// One workgroup a head of a token: RoPE in place on columns `offset..offset + DIM`.

// Rotary columns.
override DIM: u32 = 2u;
override HALF: bool = false;

struct Params {
    heads_of_all: u32,
    heads: u32,
    // Even.
    width: u32,
    offset: u32,
}

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read_write> x: array<ActPair>;
@group(0) @binding(1) var<storage, read> cos_sin: array<vec2<f32>>;

var<workgroup> columns: array<f32, DIM>;

fn rotated(t: u32, column: u32) -> f32 {
    let pair = select(column / 2u, column % (DIM / 2u), HALF);
    let first = select(2u * pair, pair, HALF);
    let second = select(2u * pair + 1u, pair + DIM / 2u, HALF);
    let turn = cos_sin[t * (DIM / 2u) + pair];
    if column == first {
        return columns[first] * turn.x - columns[second] * turn.y;
    }
    return columns[second] * turn.x + columns[first] * turn.y;
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let head = flat(group, groups);
    if head >= params.heads_of_all {
        return;
    }
    let t = head / params.heads;
    let start = head * params.width + params.offset;
    for (var column = lane.index; column < DIM; column += WORKGROUP) {
        columns[column] = act_of(x[(start + column) / 2u], start + column);
    }
    workgroupBarrier();
    // Pairs, which are words of bf16, that have a rotary column; the head has whole ones.
    let words = (start + DIM + 1u) / 2u - start / 2u;
    for (var word = lane.index; word < words; word += WORKGROUP) {
        let i = start / 2u + word;
        var pair = act_pair(x[i]);
        // Wraps below `start`.
        let column = 2u * i - start;
        if column < DIM {
            pair.x = rotated(t, column);
        }
        if column + 1u < DIM {
            pair.y = rotated(t, column + 1u);
        }
        x[i] = pack_act(pair);
    }
}
