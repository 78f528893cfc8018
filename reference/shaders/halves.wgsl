// Numbers as halves for matrices. Halves hold what bf16 has, but not as far: numbers are brought near 2^13 by a power of two.

// What the largest of them has as its exponent then, biased as in f32.
const TARGET: u32 = 140u;
// Exponents from here to MOST_EXPONENT have powers that are numbers.
const LEAST_EXPONENT: u32 = TARGET - 120u;
const MOST_EXPONENT: u32 = 254u;
// What the half of an 8-bit code is to be multiplied by.
const CODE: f32 = 256.0;

// The largest exponent of eight columns, in its place in a word.
fn largest(words: vec4<u32>) -> u32 {
    let both = max(words & vec4(0x7f800000u), (words << vec4(16u)) & vec4(0x7f800000u));
    return max(max(both.x, both.y), max(both.z, both.w));
}

// The exponent that `largest` gives, as one that has powers.
fn exponent_of(word: u32) -> u32 {
    return clamp(word >> 23u, LEAST_EXPONENT, MOST_EXPONENT);
}

// The power of two that brings `exponent` to TARGET; its inverse is that of `2 * TARGET - exponent`.
fn power(exponent: u32) -> f32 {
    return bitcast<f32>((127u + TARGET - exponent) << 23u);
}

// `2^(before - now)`, `now` at least `before`.
fn falls(before: u32, now: u32) -> f32 {
    return bitcast<f32>((127u - min(now - before, 126u)) << 23u);
}

// Codes of bytes 0 and 2 as halves, exactly: those of 2^-8 of their values, which have the same fraction and the lower exponent bits.
fn two_codes(codes: u32) -> u32 {
    return ((codes << 7u) & 0x3f803f80u) | ((codes << 8u) & 0x80008000u);
}

// Four codes in their order.
fn four_codes(codes: u32) -> vec4<f16> {
    let even = two_codes(codes);
    let odd = two_codes(codes >> 8u);
    let low = unpack2x16float((even & 0xffffu) | (odd << 16u));
    let high = unpack2x16float((even >> 16u) | (odd & 0xffff0000u));
    return vec4<f16>(vec4(low, high));
}
