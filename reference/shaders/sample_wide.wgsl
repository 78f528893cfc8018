// Numbers of 64 bits for `sample.wgsl`: what decides a draw may not depend on how an adapter rounds, and none has f64 everywhere. A pair of
// words is the higher and the lower one.

// A number: `magnitude / 2^63 * 2^exponent`, the magnitude's highest bit set; zero has none. What does not fit is cut off.
struct Wide {
    magnitude: vec2<u32>,
    exponent: i32,
    negative: bool,
}

// An f64's bits as an integer of its order: -0.0 as +0.0, NaN below all.
const NAN_KEY: vec2<u32> = vec2(0u, 0u);
const NEGATIVE_INFINITY_KEY: vec2<u32> = vec2(0x000fffffu, 0xffffffffu);
const ZERO_KEY: vec2<u32> = vec2(0x80000000u, 0u);
const INFINITY_KEY: vec2<u32> = vec2(0xfff00000u, 0u);

// Whether `a` is below `b`.
fn less(a: vec2<u32>, b: vec2<u32>) -> bool {
    return a.x < b.x || (a.x == b.x && a.y < b.y);
}

fn same(a: vec2<u32>, b: vec2<u32>) -> bool {
    return all(a == b);
}

fn plus(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let low = a.y + b.y;
    return vec2(a.x + b.x + select(0u, 1u, low < a.y), low);
}

fn minus(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    return vec2(a.x - b.x - select(0u, 1u, a.y < b.y), a.y - b.y);
}

fn shifted_left(a: vec2<u32>, by: u32) -> vec2<u32> {
    if by == 0u {
        return a;
    }
    if by >= 32u {
        return vec2(select(0u, a.y << (by & 31u), by < 64u), 0u);
    }
    return vec2(a.x << by | a.y >> (32u - by), a.y << by);
}

fn shifted_right(a: vec2<u32>, by: u32) -> vec2<u32> {
    if by == 0u {
        return a;
    }
    if by >= 32u {
        return vec2(0u, select(0u, a.x >> (by & 31u), by < 64u));
    }
    return vec2(a.x >> by, a.y >> by | a.x << (32u - by));
}

fn leading_zeros(a: vec2<u32>) -> u32 {
    return select(countLeadingZeros(a.x), 32u + countLeadingZeros(a.y), a.x == 0u);
}

// The product of two words.
fn product(a: u32, b: u32) -> vec2<u32> {
    let low = (a & 0xffffu) * (b & 0xffffu);
    let middle = (a >> 16u) * (b & 0xffffu) + (low >> 16u);
    let other = (a & 0xffffu) * (b >> 16u) + (middle & 0xffffu);
    return vec2((a >> 16u) * (b >> 16u) + (middle >> 16u) + (other >> 16u), other << 16u | (low & 0xffffu));
}

// The upper half of the product of two pairs.
fn upper_product(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let cross = plus(product(a.x, b.y), vec2(0u, product(a.y, b.y).x));
    let other = plus(product(a.y, b.x), vec2(0u, cross.y));
    return plus(product(a.x, b.x), plus(vec2(0u, cross.x), vec2(0u, other.x)));
}

// The number of an f64's bits, which are those of one that is finite and not subnormal.
fn wide_of(bits: vec2<u32>) -> Wide {
    let field = (bits.x >> 20u) & 0x7ffu;
    let magnitude = shifted_left(vec2((bits.x & 0xfffffu) | 0x100000u, bits.y), 11u);
    return Wide(select(magnitude, vec2(0u), field == 0u), i32(field) - 1023, bits.x >> 31u == 1u);
}

// Of a key, the bits.
fn bits_of(key: vec2<u32>) -> vec2<u32> {
    return select(~key, vec2(key.x & 0x7fffffffu, key.y), key.x >> 31u == 1u);
}

// Rounded to an f64, ties to even.
fn key_of(a: Wide) -> vec2<u32> {
    if a.magnitude.x == 0u {
        return ZERO_KEY;
    }
    let cut = a.magnitude.y & 0x7ffu;
    let up = cut > 0x400u || (cut == 0x400u && (a.magnitude.y & 0x800u) != 0u);
    let fraction = plus(shifted_right(a.magnitude, 11u), vec2(0u, select(0u, 1u, up)));
    // The leading bit, and a carry, count for the exponent.
    let bits = vec2((u32(a.exponent + 1022) << 20u) + fraction.x, fraction.y);
    return select(vec2(bits.x | 0x80000000u, bits.y), ~vec2(bits.x | 0x80000000u, bits.y), a.negative);
}

// The key of an f32's bits.
fn key_of_float(bits: u32) -> vec2<u32> {
    let magnitude = bits & 0x7fffffffu;
    if magnitude > 0x7f800000u {
        return NAN_KEY;
    }
    if magnitude == 0x7f800000u {
        return select(INFINITY_KEY, NEGATIVE_INFINITY_KEY, bits >> 31u == 1u);
    }
    // A subnormal one has no leading bit.
    let leading = select(0x800000u, 0u, magnitude < 0x800000u);
    let word = (magnitude & 0x7fffffu) | leading;
    let zeros = countLeadingZeros(word);
    let exponent = max(i32(magnitude >> 23u), 1) - 127 + 8 - i32(zeros);
    return key_of(Wide(vec2(word << (zeros & 31u), 0u), exponent, bits >> 31u == 1u));
}

fn normalised(magnitude: vec2<u32>, exponent: i32, negative: bool) -> Wide {
    let zeros = leading_zeros(magnitude);
    return Wide(shifted_left(magnitude, zeros), exponent - i32(zeros), negative);
}

fn sum_of(a: Wide, b: Wide) -> Wide {
    if a.magnitude.x == 0u {
        return b;
    }
    if b.magnitude.x == 0u {
        return a;
    }
    var large = a;
    var small = b;
    if a.exponent < b.exponent || (a.exponent == b.exponent && less(a.magnitude, b.magnitude)) {
        large = b;
        small = a;
    }
    let by = u32(large.exponent - small.exponent);
    // One bit of room for a carry.
    let first = shifted_right(large.magnitude, 1u);
    let second = shifted_right(small.magnitude, min(by + 1u, 64u));
    if large.negative == small.negative {
        return normalised(plus(first, second), large.exponent + 1, large.negative);
    }
    // What a shift by one would cut off of both.
    let exact = minus(large.magnitude, shifted_right(small.magnitude, min(by, 64u)));
    return normalised(exact, large.exponent, large.negative);
}

fn times(a: Wide, b: Wide) -> Wide {
    let magnitude = upper_product(a.magnitude, b.magnitude);
    return normalised(magnitude, a.exponent + b.exponent + 1, a.negative != b.negative);
}

// Of a `b` that is not zero.
fn quotient_of(a: Wide, b: Wide) -> Wide {
    var rest = a.magnitude;
    var quotient = vec2(0u);
    for (var bit = 0u; bit < 64u; bit++) {
        quotient = shifted_left(quotient, 1u);
        // What was shifted out makes `rest` larger than any divisor.
        let beyond = bit > 0u && rest.x >> 31u == 1u;
        if bit > 0u {
            rest = shifted_left(rest, 1u);
        }
        if beyond || !less(rest, b.magnitude) {
            rest = minus(rest, b.magnitude);
            quotient.y |= 1u;
        }
    }
    return normalised(quotient, a.exponent - b.exponent, a.negative != b.negative);
}

// A number that is not negative, in units of 2^-56; 2^64 - 1 of what is 64 or more.
fn fixed_of(a: Wide) -> vec2<u32> {
    if a.exponent >= 6 {
        return vec2(0xffffffffu);
    }
    return shifted_right(a.magnitude, u32(min(7 - a.exponent, 64)));
}

const LN_2: vec2<u32> = vec2(0xb17217f7u, 0xd1cf79acu);
const HALF: vec2<u32> = vec2(0x80000000u, 0u);
const THIRD: vec2<u32> = vec2(0x55555555u, 0x55555555u);
const QUARTER: vec2<u32> = vec2(0x40000000u, 0u);
const FIFTH: vec2<u32> = vec2(0x33333333u, 0x33333333u);
// `-log2(ln 2)` in units of 2^-56.
const LOG_LN_2: vec2<u32> = vec2(0x00875d3bu, 0xa705db1au);
const ONE: vec2<u32> = vec2(0x80000000u, 0u);

// `2^(-j / 16)`, in units of 2^-63.
var<private> powers: array<vec2<u32>, 16> = array<vec2<u32>, 16>(
    vec2(0x80000000u, 0x00000000u),
    vec2(0x7a92be8au, 0x92436616u),
    vec2(0x75606373u, 0xee921c97u),
    vec2(0x70666f76u, 0x154a7089u),
    vec2(0x6ba27e65u, 0x6b4eb57au),
    vec2(0x6712460au, 0x8fc24072u),
    vec2(0x62b39508u, 0xaa836d6fu),
    vec2(0x5e8451cfu, 0xac061b5fu),
    vec2(0x5a827999u, 0xfcef3242u),
    vec2(0x56ac1f75u, 0x2150a563u),
    vec2(0x52ff6b54u, 0xd8a89c75u),
    vec2(0x4f7a9930u, 0x48d088d7u),
    vec2(0x4c1bf828u, 0xc6dc54b8u),
    vec2(0x48e1e9b9u, 0xd588e19bu),
    vec2(0x45cae0f1u, 0xf545eb73u),
    vec2(0x42d561b3u, 0xe6243d8au),
);

// `2^-y` in units of 2^-45, to eleven digits; `y` in units of 2^-56.
fn power_of(y: vec2<u32>) -> vec2<u32> {
    let whole = y.x >> 24u;
    if whole > 46u {
        return vec2(0u);
    }
    // What is left of a sixteenth, times ln 2: the terms of its exponential fall off quickly.
    let left = shifted_left(vec2(y.x & 0xfffffu, y.y), 8u);
    let t = upper_product(left, LN_2);
    var sum = minus(ONE, upper_product(upper_product(t, FIFTH), ONE));
    sum = minus(ONE, upper_product(upper_product(t, QUARTER), sum));
    sum = minus(ONE, upper_product(upper_product(t, THIRD), sum));
    sum = minus(ONE, upper_product(upper_product(t, HALF), sum));
    sum = minus(ONE, upper_product(t, sum));
    let power = shifted_left(upper_product(sum, powers[(y.x >> 20u) & 15u]), 1u);
    // To the nearest unit.
    return shifted_right(plus(shifted_right(power, 17u + whole), vec2(0u, 1u)), 1u);
}

// `log2` of `magnitude / 2^63`, the highest bit set, in units of 2^-58: a square has twice the logarithm.
fn log_of(magnitude: vec2<u32>) -> vec2<u32> {
    var square = magnitude;
    var log = vec2(0u);
    for (var bit = 0u; bit < 58u; bit++) {
        square = upper_product(square, square);
        log = shifted_left(log, 1u);
        if square.x >> 31u == 1u {
            log.y |= 1u;
        } else {
            square = shifted_left(square, 1u);
        }
    }
    return log;
}

// `log2(-ln u) + 32` of the random number `u = (2n + 1) / 2^24`, in units of 2^-56.
fn log_log_of(n: u32) -> vec2<u32> {
    let word = 2u * n + 1u;
    let zeros = countLeadingZeros(word);
    // `-log2 u` in units of 2^-58: what the highest bit of `word` is short of 24, without the rest.
    let below = minus(vec2((zeros - 7u) << 26u, 0u), log_of(vec2(word << zeros, 0u)));
    let places = leading_zeros(below);
    let log = shifted_right(log_of(shifted_left(below, places)), 2u);
    // 63 - places - 58 + 32 whole ones.
    return minus(plus(vec2((37u - places) << 24u, 0u), log), LOG_LN_2);
}
