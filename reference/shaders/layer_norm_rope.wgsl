// One workgroup a token: LayerNorm, RoPE on the first DIM columns, into the token's slot of the cache.

override WEIGHT: u32 = BF16;
override BIAS: u32 = BF16;
// Columns, an even number, and rotary ones.
override WIDTH: u32 = 2u;
override DIM: u32 = 2u;
override HALF: bool = false;
// Rows go one below the other, not into their slots.
override STAGED: bool = false;

struct Params {
    tokens: u32,
    // Of the window of the cache that is bound.
    first_slot: u32,
    slots: u32,
    eps: f32,
}

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read> slot_mapping: array<i32>;
@group(0) @binding(1) var<storage, read> x: array<ActPair>;
@group(0) @binding(2) var<storage, read> weight: array<u32>;
@group(0) @binding(3) var<storage, read> bias: array<u32>;
@group(0) @binding(4) var<storage, read> cos_sin: array<vec2<f32>>;
@group(0) @binding(5) var<storage, read_write> cache: array<ActPair>;

var<workgroup> columns: array<f32, WIDTH>;

fn rotated(t: u32, column: u32) -> f32 {
    if column >= DIM {
        return columns[column];
    }
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
    let t = flat(group, groups);
    if t >= params.tokens {
        return;
    }
    let mapped = select(slot_mapping[t], i32(t), STAGED);
    let slot = u32(mapped) - params.first_slot;
    if mapped < 0 || slot >= params.slots {
        return;
    }
    let start = t * (WIDTH / 2u);
    var sum = 0.0;
    for (var word = lane.index; word < WIDTH / 2u; word += WORKGROUP) {
        let pair = act_pair(x[start + word]);
        sum += pair.x + pair.y;
    }
    let mean = workgroup_sum(sum, lane) / f32(WIDTH);
    var squares = 0.0;
    for (var word = lane.index; word < WIDTH / 2u; word += WORKGROUP) {
        let off = act_pair(x[start + word]) - mean;
        squares += dot(off, off);
    }
    let scale = 1.0 / sqrt(workgroup_sum(squares, lane) / f32(WIDTH) + params.eps);
    for (var column = lane.index; column < WIDTH; column += WORKGROUP) {
        let off = act_of(x[start + column / 2u], column) - mean;
        let scaled = weight_of(WEIGHT, weight[weight_word(WEIGHT, column)], column) * (off * scale);
        columns[column] = round_act(scaled + weight_of(BIAS, bias[weight_word(BIAS, column)], column));
    }
    workgroupBarrier();
    for (var word = lane.index; word < WIDTH / 2u; word += WORKGROUP) {
        cache[slot * (WIDTH / 2u) + word] = pack_act(vec2(rotated(t, 2u * word), rotated(t, 2u * word + 1u)));
    }
}
