// Activations, and caches of them, in f32, unrounded. `act_bf16.wgsl` has the same names for bf16.

// Two columns, and eight.
alias ActPair = vec2<f32>;
alias ActEight = array<vec2<f32>, 4>;

// Words of a pair, and vectors of four words of eight columns.
const ACT_WORDS: u32 = 2u;

// What is rounded wherever the contract rounds activations.
fn round_act(x: f32) -> f32 {
    return x;
}

fn act_pair(pair: ActPair) -> vec2<f32> {
    return pair;
}

// Element `i`, of which `pair` is the one at `i / 2`.
fn act_of(pair: ActPair, i: u32) -> f32 {
    return select(pair.x, pair.y, (i & 1u) == 1u);
}

fn act_eight(eight: ActEight) -> Eight {
    return Eight(vec4(eight[0], eight[1]), vec4(eight[2], eight[3]));
}

fn pack_act(pair: vec2<f32>) -> ActPair {
    return pair;
}

// The product of eight columns.
fn act_product(a: ActEight, b: ActEight) -> f32 {
    return (dot(a[0], b[0]) + dot(a[1], b[1])) + (dot(a[2], b[2]) + dot(a[3], b[3]));
}

// Of ACT_WORDS words, and of so many vectors.
fn act_of_words(first: u32, last: u32) -> ActPair {
    return bitcast<vec2<f32>>(vec2(first, last));
}

fn act_of_vectors(first: vec4<u32>, last: vec4<u32>) -> ActEight {
    let low = bitcast<vec4<f32>>(first);
    let high = bitcast<vec4<f32>>(last);
    return ActEight(low.xy, low.zw, high.xy, high.zw);
}

// From and to bf16, in which 8-bit rows keep their rotary columns.
fn act_from_bf16(words: vec4<u32>) -> ActEight {
    return ActEight(bf16_pair(words.x), bf16_pair(words.y), bf16_pair(words.z), bf16_pair(words.w));
}

fn act_as_bf16(pair: ActPair) -> u32 {
    return pack_bf16(pair.x, pair.y);
}
