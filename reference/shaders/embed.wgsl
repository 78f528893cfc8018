// One workgroup a token: its row of the table, rounded or widened, or zeros for a token of another shard.

override WEIGHT: u32 = BF16;
override FLOATS: bool = false;

struct Params {
    tokens: u32,
    width: u32,
    vocab_start: u32,
    vocab: u32,
    // Rows of the table that are bound.
    first: u32,
    rows: u32,
}

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read> token_ids: array<i32>;
@group(0) @binding(1) var<storage, read> table: array<u32>;
@group(0) @binding(2) var<storage, read_write> out: array<u32>;

fn element(start: u32, column: u32, inside: bool) -> f32 {
    if !inside {
        return 0.0;
    }
    let i = start + column;
    return weight_of(WEIGHT, table[weight_word(WEIGHT, i)], i);
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let t = flat(group, groups);
    if t >= params.tokens {
        return;
    }
    let id = token_ids[t];
    let row = u32(id) - params.vocab_start;
    let known = id >= 0 && u32(id) >= params.vocab_start && row < params.vocab;
    let inside = known && row >= params.first && row - params.first < params.rows;
    // Where the table takes several bindings, the first of them has the tokens of other shards.
    if !inside && (known || params.first > 0u) {
        return;
    }
    let start = select(0u, (row - params.first) * params.width, inside);
    if FLOATS {
        for (var column = lane.index; column < params.width; column += WORKGROUP) {
            out[t * params.width + column] = bitcast<u32>(element(start, column, inside));
        }
    } else {
        for (var column = 2u * lane.index; column < params.width; column += 2u * WORKGROUP) {
            let word = pack_bf16(element(start, column, inside), element(start, column + 1u, inside));
            out[(t * params.width + column) / 2u] = word;
        }
    }
}
