// Numbers of 8 bits, `e4m3fn`, as the module `fp8` has them.

const LARGEST_FP8: f32 = 448.0;

// The value of a code (exact); NaN's codes are undefined input.
fn fp8_decode(code: u32) -> f32 {
    let fraction = code & 7u;
    let exponent = (code >> 3u) & 15u;
    let normal = bitcast<f32>(((exponent + 120u) << 23u) | (fraction << 20u));
    let magnitude = select(normal, f32(fraction) * 0x1p-9f, exponent == 0u);
    return bitcast<f32>(bitcast<u32>(magnitude) | ((code & 0x80u) << 24u));
}

// The nearest code, ties to even; magnitudes above the largest become the largest.
fn fp8_encode(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    let sign = (bits >> 24u) & 0x80u;
    let magnitude = abs(value);
    if magnitude >= LARGEST_FP8 {
        return sign | 0x7eu;
    }
    // As in the module: counted in steps of 2^-9, and above 2^-6 in eighths of the leading power of two.
    let exponent = max(i32((bits >> 23u) & 0xffu) - 127, -6);
    let steps = u32(round(magnitude * bitcast<f32>(u32(130 - exponent) << 23u)));
    return sign | (u32((exponent + 6) * 8) + steps);
}

// `a / b` rounded to nearest, ties to even, for normal positive numbers whose quotient is one: WGSL's own division may be off by 2.5
// units in the last place. Of quotients below 2^-120, and of an `a` that is subnormal, it makes 0.
fn divided(a: f32, b: f32) -> f32 {
    let a_bits = bitcast<u32>(a);
    let b_bits = bitcast<u32>(b);
    var exponent = i32(a_bits >> 23u) - i32(b_bits >> 23u);
    if a_bits < 0x800000u || exponent < -120 {
        return 0.0;
    }
    var rest = (a_bits & 0x7fffffu) | 0x800000u;
    let divisor = (b_bits & 0x7fffffu) | 0x800000u;
    if rest < divisor {
        rest *= 2u;
        exponent -= 1;
    }
    // 24 bits of quotient and one more; what is left says on which side of a tie it lies.
    var quotient = 0u;
    for (var bit = 0u; bit < 25u; bit++) {
        quotient *= 2u;
        if rest >= divisor {
            rest -= divisor;
            quotient += 1u;
        }
        rest *= 2u;
    }
    let up = (quotient & 1u) == 1u && (rest != 0u || (quotient & 2u) != 0u);
    // A carry out of the fraction belongs into the exponent.
    return bitcast<f32>((u32(exponent + 126) << 23u) + quotient / 2u + select(0u, 1u, up));
}

// The scale of values whose largest magnitude is `largest`.
fn fp8_scale(largest: f32) -> f32 {
    return divided(max(largest, 0x1p-100f), LARGEST_FP8);
}

// The code of a value under `scale`.
fn fp8_quantise(value: f32, scale: f32) -> u32 {
    let sign = (bitcast<u32>(value) >> 24u) & 0x80u;
    return sign | fp8_encode(divided(abs(value), scale));
}
