// One workgroup a token: a row of activations into the token's slot of an 8-bit cache. `fp8.wgsl` goes before it.

// MLA's rows: columns that share scales in groups, then rotary ones in bf16. Else the indexer's: one scale, behind the page's codes.
override MLA: bool = true;

// Pairs of columns that share a scale.
const GROUP_PAIRS: u32 = 64u;

struct Params {
    tokens: u32,
    // Columns that become codes, a multiple of 4; columns that stay, even.
    columns: u32,
    rope: u32,
    // Of the window of the cache that is bound.
    first_slot: u32,
    slots: u32,
    // Words of a row with its padding, MLA's alone; rows of a page, the indexer's alone.
    row_words: u32,
    page_size: u32,
}

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read> slot_mapping: array<i32>;
@group(0) @binding(1) var<storage, read> rows: array<ActPair>;
@group(0) @binding(2) var<storage, read_write> cache: array<u32>;

// The largest magnitude of pairs; NaN is above all.
fn largest_of(first: u32, end: u32) -> f32 {
    var largest = 0u;
    for (var i = first; i < end; i++) {
        let pair = bitcast<vec2<u32>>(act_pair(rows[i])) & vec2(0x7fffffffu);
        largest = max(largest, max(pair.x, pair.y));
    }
    return bitcast<f32>(largest);
}

// The codes of the four columns of two pairs from `i` on.
fn codes_of(i: u32, scale: f32) -> u32 {
    let low = act_pair(rows[i]);
    let high = act_pair(rows[i + 1u]);
    return fp8_quantise(low.x, scale) | fp8_quantise(low.y, scale) << 8u
        | fp8_quantise(high.x, scale) << 16u | fp8_quantise(high.y, scale) << 24u;
}

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let t = flat(group, groups);
    if t >= params.tokens {
        return;
    }
    let mapped = slot_mapping[t];
    let slot = u32(mapped) - params.first_slot;
    if mapped < 0 || slot >= params.slots {
        return;
    }
    let pairs = params.columns / 2u;
    let code_words = params.columns / 4u;
    let start = t * (pairs + params.rope / 2u);
    let group_pairs = select(pairs, GROUP_PAIRS, MLA);
    var out = slot * params.row_words;
    var scales = out + code_words;
    if !MLA {
        let page = slot / params.page_size * params.page_size * (code_words + 1u);
        out = page + slot % params.page_size * code_words;
        scales = page + params.page_size * code_words + slot % params.page_size;
    }
    for (var i = lane; i < code_words; i += WORKGROUP) {
        let first = 2u * i / group_pairs * group_pairs;
        let scale = fp8_scale(largest_of(start + first, start + min(first + group_pairs, pairs)));
        cache[out + i] = codes_of(start + 2u * i, scale);
        if 2u * i == first {
            cache[scales + first / group_pairs] = bitcast<u32>(scale);
        }
    }
    if !MLA {
        return;
    }
    let rotary = scales + (pairs + GROUP_PAIRS - 1u) / GROUP_PAIRS;
    for (var i = rotary + lane; i < out + params.row_words; i += WORKGROUP) {
        var word = 0u;
        if i - rotary < params.rope / 2u {
            word = act_as_bf16(rows[start + pairs + i - rotary]);
        }
        cache[i] = word;
    }
}
