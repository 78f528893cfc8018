// Activations, and caches of them, in bf16: two in a word. `act_f32.wgsl` has the same names for floats.

// Two columns, and eight.
alias ActPair = u32;
alias ActEight = vec4<u32>;

// Words of a pair, and vectors of four words of eight columns.
const ACT_WORDS: u32 = 1u;

// What is rounded wherever the contract rounds activations.
fn round_act(x: f32) -> f32 {
    return bf16_of(bf16_bits(x), 0u);
}

fn act_pair(pair: ActPair) -> vec2<f32> {
    return bf16_pair(pair);
}

// Element `i`, of which `pair` is the one at `i / 2`.
fn act_of(pair: ActPair, i: u32) -> f32 {
    return bf16_of(pair, i);
}

fn act_eight(eight: ActEight) -> Eight {
    return eight_bf16(eight);
}

fn pack_act(pair: vec2<f32>) -> ActPair {
    return pack_bf16(pair.x, pair.y);
}

// The product of eight columns, in the order in which they are unpacked.
fn act_product(a: ActEight, b: ActEight) -> f32 {
    let low = bitcast<vec4<f32>>(a << vec4(16u)) * bitcast<vec4<f32>>(b << vec4(16u));
    let both = fma(bitcast<vec4<f32>>(a & vec4(0xffff0000u)), bitcast<vec4<f32>>(b & vec4(0xffff0000u)), low);
    return (both.x + both.y) + (both.z + both.w);
}

// Of ACT_WORDS words, and of so many vectors: the last is the first.
fn act_of_words(first: u32, last: u32) -> ActPair {
    return first;
}

fn act_of_vectors(first: vec4<u32>, last: vec4<u32>) -> ActEight {
    return first;
}

// From and to bf16, in which 8-bit rows keep their rotary columns.
fn act_from_bf16(words: vec4<u32>) -> ActEight {
    return words;
}

fn act_as_bf16(pair: ActPair) -> u32 {
    return pair;
}
