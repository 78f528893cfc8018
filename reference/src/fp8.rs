//! Caches in 8 bits: the number format, its scales, and where the bytes of a row lie.
//!
//! Codes are e4m3 as the OCP 8-bit floating point specification has it (`e4m3fn`): bias 7, gradual underflow,
//! 448 the largest, no infinity, NaN in `0x7f` and `0xff`. A group of values shares one f32 scale,
//! `max(largest magnitude, 2^-100) / 448`, and each is stored as the nearest code (ties to even) to
//! `value / scale`, both divisions in f32; a cache's value is `code * scale`. What is quantised has passed the
//! rounding points of its kernel before. A group that holds a value that is not finite has unspecified codes.

use std::ops::Range;

/// The largest value of the format.
pub const LARGEST: f32 = 448.0;

/// Values of an MLA row that share a scale.
pub const MLA_GROUP: usize = 128;

/// The nearest code, ties to even; magnitudes above [`LARGEST`] become [`LARGEST`], NaN stays NaN.
pub fn encode(value: f32) -> u8 {
    let sign = (value.to_bits() >> 24) as u8 & 0x80;
    let magnitude = value.abs();
    if magnitude.is_nan() {
        return sign | 0x7f;
    }
    if magnitude >= LARGEST {
        return sign | 0x7e;
    }
    // Codes are 2^-9 apart up to 2^-6, and then an eighth of the leading power of two: counted in these
    // steps (an exact product), a magnitude has at most 16 of them.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    let steps = (magnitude * power_of_two(3 - exponent)).round_ties_even() as u8;
    // A normal magnitude's first eight steps are the last of the exponent's field.
    sign | (((exponent + 6) * 8) as u8 + steps)
}

/// `2^n`, for an `n` whose power is a normal number.
fn power_of_two(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

/// The value of a code (exact).
pub fn decode(code: u8) -> f32 {
    let (exponent, fraction) = (i32::from(code >> 3 & 0xf), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => fraction * power_of_two(-9),
        _ => (8.0 + fraction) * power_of_two(exponent - 10),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The scale of a group of values whose largest magnitude is `largest`.
pub fn scale(largest: f32) -> f32 {
    largest.max(power_of_two(-100)) / LARGEST
}

/// Writes the codes of a group of values and returns its scale.
pub fn quantise(values: &[f32], codes: &mut [u8]) -> f32 {
    let scale = scale(values.iter().fold(0.0, |largest, value| value.abs().max(largest)));
    for (code, value) in codes.iter_mut().zip(values) {
        *code = encode(value / scale);
    }
    scale
}

/// A page of the indexer's cache: `page_size` rows of `width` codes, then `page_size` f32 scales.
///
/// The cache is `[pages, page_size, width + 4]` bytes; `page_size` is a multiple of 4, so that a page's bytes
/// are a multiple of 16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexerPage {
    /// Rows.
    pub page_size: usize,
    /// Codes of a row.
    pub width: usize,
}

impl IndexerPage {
    /// Bytes of a row with its scale: the cache's last dimension.
    pub fn row_bytes(&self) -> usize {
        self.width + 4
    }

    /// Where in the cache the codes of slot `slot` lie.
    pub fn codes(&self, slot: usize) -> Range<usize> {
        let start = self.page(slot) + slot % self.page_size * self.width;
        start..start + self.width
    }

    /// Where in the cache the scale of slot `slot` lies.
    pub fn scale(&self, slot: usize) -> Range<usize> {
        let start = self.page(slot) + self.page_size * self.width + slot % self.page_size * 4;
        start..start + 4
    }

    fn page(&self, slot: usize) -> usize {
        slot / self.page_size * self.page_size * self.row_bytes()
    }
}

/// A row of the MLA cache: `kv_lora_rank` codes, one f32 scale for every [`MLA_GROUP`] of them (the last
/// group may be short), `rope` bf16, and zeros up to a multiple of 16 bytes.
///
/// The cache is `[pages, page_size, row_bytes]` bytes; for GLM-5.2 a row has 512 + 16 + 128 = 656.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MlaRow {
    /// Columns of the latent part.
    pub kv_lora_rank: usize,
    /// Columns of the rotary key part.
    pub rope: usize,
}

impl MlaRow {
    /// Scales of a row.
    pub fn groups(&self) -> usize {
        self.kv_lora_rank.div_ceil(MLA_GROUP)
    }

    /// Where in a row the scales lie.
    pub fn scales(&self) -> Range<usize> {
        self.kv_lora_rank..self.kv_lora_rank + 4 * self.groups()
    }

    /// Where in a row the rotary part lies.
    pub fn rotary(&self) -> Range<usize> {
        let start = self.scales().end;
        start..start + 2 * self.rope
    }

    /// Bytes of a row: the cache's last dimension.
    pub fn row_bytes(&self) -> usize {
        self.rotary().end.next_multiple_of(16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers() -> impl Iterator<Item = u8> {
        (0..=u8::MAX).filter(|code| code & 0x7f != 0x7f)
    }

    #[test]
    fn codes_decode_as_the_format_says() {
        // Sign, four bits of exponent, three of fraction, spelled with powers in f64.
        for code in numbers() {
            let (exponent, fraction) = (i32::from(code >> 3 & 15), f64::from(code & 7) / 8.0);
            let magnitude = match exponent {
                0 => fraction * 2.0_f64.powi(-6),
                _ => (1.0 + fraction) * 2.0_f64.powi(exponent - 7),
            };
            let value = if code < 0x80 { magnitude } else { -magnitude };
            assert_eq!(f64::from(decode(code)).to_bits(), value.to_bits(), "{code:#x}");
        }
        assert!(decode(0x7f).is_nan() && decode(0xff).is_nan());
        assert_eq!([decode(0x7e), decode(0x01), decode(0x08)], [448.0, 1.0 / 512.0, 1.0 / 64.0]);
    }

    #[test]
    fn every_code_comes_back() {
        for code in numbers() {
            assert_eq!(encode(decode(code)), code, "{code:#x}");
        }
        assert_eq!([encode(f32::NAN) & 0x7f, encode(-f32::NAN) & 0x7f], [0x7f; 2]);
    }

    #[test]
    fn the_nearest_code_wins_and_of_two_the_even_one() {
        for code in 0..0x7e_u8 {
            let (below, above) = (decode(code), decode(code + 1));
            let middle = (below + above) / 2.0;
            assert_eq!(encode(middle), code + (code & 1), "the middle above {code:#x}");
            assert_eq!(encode(middle.next_down()), code);
            assert_eq!(encode(middle.next_up()), code + 1);
            assert_eq!(encode(-middle), 0x80 | (code + (code & 1)));
            assert_eq!(encode(-middle.next_up()), 0x80 | (code + 1));
        }
        assert_eq!([encode(f32::MIN_POSITIVE), encode(-f32::from_bits(1))], [0, 0x80]);
    }

    #[test]
    fn magnitudes_beyond_the_largest_saturate() {
        for value in [448.0_f32.next_up(), 464.0, 480.0, 1e30, f32::INFINITY] {
            assert_eq!([encode(value), encode(-value)], [0x7e, 0xfe], "{value}");
        }
        assert_eq!(encode(448.0_f32.next_down()), 0x7e);
    }

    #[test]
    fn the_largest_of_a_group_becomes_448_and_zeros_stay_zeros() {
        let mut codes = [0xff; 4];
        let scale = quantise(&[0.0, -7.0, 3.5, 1.0 / 64.0], &mut codes);
        assert_eq!((scale, codes), (7.0 / 448.0, [0, 0xfe, 0x76, encode(1.0)]));
        for (zero, minus_zero) in [(0.0, -0.0), (f32::from_bits(1), -f32::from_bits(3))] {
            assert_eq!(quantise(&[zero, minus_zero], &mut codes), power_of_two(-100) / 448.0);
            assert_eq!(codes[..2], [0, 0x80]);
        }
        for largest in [f32::MAX, 1e30, 0.1, 3e-29, 1e-30] {
            quantise(&[largest, -largest], &mut codes);
            assert_eq!(codes[..2], [0x7e, 0xfe], "{largest}");
        }
    }

    #[test]
    fn bytes_lie_where_the_layouts_say() {
        let page = IndexerPage { page_size: 4, width: 16 };
        assert_eq!((page.row_bytes(), page.codes(0), page.scale(0)), (20, 0..16, 64..68));
        assert_eq!((page.codes(3), page.scale(3)), (48..64, 76..80));
        assert_eq!((page.codes(6), page.scale(6)), (80 + 32..80 + 48, 80 + 64 + 8..80 + 64 + 12));
        let glm = MlaRow { kv_lora_rank: 512, rope: 64 };
        assert_eq!((glm.scales(), glm.rotary(), glm.row_bytes()), (512..528, 528..656, 656));
        let small = MlaRow { kv_lora_rank: 144, rope: 16 };
        assert_eq!((small.scales(), small.rotary(), small.row_bytes()), (144..152, 152..184, 192));
    }
}
