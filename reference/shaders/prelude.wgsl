// Goes before every kernel. WGSL has no bf16: two lie in a word, the lower one first.

// Lanes of a workgroup, a power of two.
override WORKGROUP: u32 = 64u;

const BF16: u32 = 0u;
const F16: u32 = 1u;
const F32: u32 = 2u;

// Number `group` of a grid that the launcher folded into three dimensions.
fn flat(group: vec3<u32>, groups: vec3<u32>) -> u32 {
    return group.x + groups.x * (group.y + groups.y * group.z);
}

// Element `i` of bf16 numbers, of which `word` is the one at `i / 2`.
fn bf16_of(word: u32, i: u32) -> f32 {
    return bitcast<f32>(select(word << 16u, word & 0xffff0000u, (i & 1u) == 1u));
}

fn bf16_pair(word: u32) -> vec2<f32> {
    return vec2(bitcast<f32>(word << 16u), bitcast<f32>(word & 0xffff0000u));
}

// The bits of `x` rounded to bf16, ties to even; NaN stays NaN.
fn bf16_bits(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let rounded = (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
    return select(rounded, (bits >> 16u) | 0x40u, (bits & 0x7fffffffu) > 0x7f800000u);
}

fn pack_bf16(low: f32, high: f32) -> u32 {
    return bf16_bits(low) | (bf16_bits(high) << 16u);
}

// A half precision number, subnormal ones too, which a device may flush in its own conversion.
fn f16_of_bits(bits: u32) -> f32 {
    let magnitude = bits & 0x7fffu;
    let normal = bitcast<f32>((magnitude << 13u) + 0x38000000u);
    let infinite = bitcast<f32>((magnitude << 13u) + 0x70000000u);
    var value = select(normal, infinite, magnitude >= 0x7c00u);
    value = select(value, f32(magnitude) * 0x1p-24f, magnitude < 0x400u);
    return bitcast<f32>(bitcast<u32>(value) | ((bits & 0x8000u) << 16u));
}

// Eight columns.
struct Eight {
    low: vec4<f32>,
    high: vec4<f32>,
}

fn eight_bf16(words: vec4<u32>) -> Eight {
    let lower = bitcast<vec4<f32>>(words << vec4(16u));
    let upper = bitcast<vec4<f32>>(words & vec4(0xffff0000u));
    return Eight(vec4(lower.x, upper.x, lower.y, upper.y), vec4(lower.z, upper.z, lower.w, upper.w));
}

fn eight_f16(words: vec4<u32>) -> Eight {
    return Eight(vec4(f16_pair(words.x), f16_pair(words.y)), vec4(f16_pair(words.z), f16_pair(words.w)));
}

fn f16_pair(word: u32) -> vec2<f32> {
    return vec2(f16_of_bits(word & 0xffffu), f16_of_bits(word >> 16u));
}

// Which word holds element `i` of a weight of type `dtype`.
fn weight_word(dtype: u32, i: u32) -> u32 {
    return select(i >> 1u, i, dtype == F32);
}

// Element `i` of a weight, of which `word` is the one at `weight_word`.
fn weight_of(dtype: u32, word: u32, i: u32) -> f32 {
    if dtype == F32 {
        return bitcast<f32>(word);
    }
    if dtype == BF16 {
        return bf16_of(word, i);
    }
    return f16_of_bits((word >> (16u * (i & 1u))) & 0xffffu);
}

// Nibble `j` of a word of INT4.
fn nibble(word: u32, j: u32) -> u32 {
    return (word >> (4u * j)) & 0xfu;
}

// Byte `i` of bytes, of which `word` is the one at `i / 4`.
fn byte_of(word: u32, i: u32) -> u32 {
    return (word >> (8u * (i & 3u))) & 0xffu;
}
