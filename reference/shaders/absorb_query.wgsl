// The query into the latent space: a workgroup has TOKENS tokens of a head and a stretch of the latent columns, a lane two columns.

override WEIGHT: u32 = BF16;
// Columns of a head that are not rotary; with the tokens of a workgroup, the queries that it keeps.
override NOPE: u32 = 1u;
override QUERIES: u32 = 8u;

const TOKENS: u32 = 8u;

struct Params {
    tokens: u32,
    heads: u32,
    // Of a head of kv_b.
    rows: u32,
    // Even.
    rank: u32,
    rope: u32,
}

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read> q: array<ActPair>;
@group(0) @binding(1) var<storage, read> kv_b: array<u32>;
@group(0) @binding(2) var<storage, read> cos_sin: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read_write> out: array<ActPair>;

var<workgroup> queries: array<f32, QUERIES>;

fn q_at(i: u32) -> f32 {
    return act_of(q[i / 2u], i);
}

fn kv_b_at(i: u32) -> f32 {
    return weight_of(WEIGHT, kv_b[weight_word(WEIGHT, i)], i);
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, lane: Lane) {
    let head = group.z;
    let first = group.y * TOKENS;
    let width = NOPE + params.rope;
    for (var i = lane.index; i < QUERIES; i += WORKGROUP) {
        let t = min(first + i / NOPE, params.tokens - 1u);
        queries[i] = q_at((t * params.heads + head) * width + i % NOPE);
    }
    workgroupBarrier();
    let column = 2u * (group.x * WORKGROUP + lane.index);
    let out_words = (params.rank + params.rope) / 2u;
    if column < params.rank {
        var sums = array<vec2<f32>, TOKENS>();
        for (var n = 0u; n < NOPE; n++) {
            let i = (head * params.rows + n) * params.rank + column;
            let keys = vec2(kv_b_at(i), kv_b_at(i + 1u));
            for (var t = 0u; t < TOKENS; t++) {
                sums[t] += queries[t * NOPE + n] * keys;
            }
        }
        for (var t = 0u; t < min(TOKENS, params.tokens - first); t++) {
            let row = (first + t) * params.heads + head;
            out[row * out_words + column / 2u] = pack_act(sums[t]);
        }
    } else if column < params.rank + params.rope {
        let pair = (column - params.rank) / 2u;
        for (var t = first; t < min(first + TOKENS, params.tokens); t++) {
            let row = t * params.heads + head;
            let i = row * width + NOPE + 2u * pair;
            let a = q_at(i);
            let b = q_at(i + 1u);
            let turn = cos_sin[t * (params.rope / 2u) + pair];
            out[row * out_words + column / 2u] = pack_act(vec2(a * turn.x - b * turn.y, b * turn.x + a * turn.y));
        }
    }
}
