//! `linear_int4`: `out = x weight^T` with a packed INT4 weight,
//! `w[o, i] = (q[o, i] - z[o, g]) * scale[o, g]`.
//!
//! `x` `[T, in]` `Act`, `out` `[T, out]` `Act` (rounded once) or `Float` (not rounded). Any group size, `in`
//! a multiple of nothing: the last word of a row may be part empty and the last group short. With `T = 0`
//! nothing is written.

use super::checks::Check;
use super::matmul::{Weight, matmul};
use super::{Cpu, CpuTensor, Real};
use crate::error::{Error, Result};
use crate::tensor::{DType, DeviceTensor, HostInt4};

/// Nibbles that are unpacked together: a 16-byte vector holds the first half in its low nibbles, the second
/// in its high ones.
const CHUNK: usize = 32;

/// A packed INT4 weight, repacked so that a vector of bytes unpacks with one mask and one shift.
#[derive(Debug, Clone, PartialEq)]
pub struct CpuInt4 {
    out_features: usize,
    in_features: usize,
    group_size: usize,
    /// `[out, ceil(in / 32), 16]`: byte `j` of chunk `c` holds `q[32c + j]` (low) and `q[32c + 16 + j]`
    /// (high).
    packed: Vec<u8>,
    /// `[out, groups]`, widened (exact).
    scales: Vec<f32>,
    /// `[out, groups]`.
    zero_points: Vec<i8>,
}

impl CpuInt4 {
    pub(super) fn from_host(weight: &HostInt4) -> Result<Self> {
        check(weight)?;
        let (out_features, groups) = (weight.out_features, weight.groups());
        let chunks = weight.in_features.div_ceil(CHUNK);
        let mut packed = vec![0; out_features * chunks * CHUNK / 2];
        if chunks > 0 {
            let words = weight.weight_packed.chunks_exact(weight.words_per_row());
            for (words, row) in words.zip(packed.chunks_exact_mut(chunks * CHUNK / 2)) {
                for (words, bytes) in words.chunks(4).zip(row.chunks_exact_mut(CHUNK / 2)) {
                    let nibble =
                        |i: usize| words.get(i / 8).map_or(0, |word| (word >> (4 * (i % 8))) as u8 & 0xf);
                    for (j, byte) in bytes.iter_mut().enumerate() {
                        *byte = nibble(j) | (nibble(j + CHUNK / 2) << 4);
                    }
                }
            }
        }
        let zero_points =
            (0..out_features).flat_map(|o| (0..groups).map(move |g| weight.zero_point(o, g) as i8)).collect();
        Ok(Self {
            out_features,
            in_features: weight.in_features,
            group_size: weight.group_size,
            packed,
            scales: weight.scales.to_f32(),
            zero_points,
        })
    }

    /// `(out_features, in_features)`.
    pub(super) fn dims(&self) -> (usize, usize) {
        (self.out_features, self.in_features)
    }
}

/// Fails unless the arrays have the lengths that the dimensions ask for.
pub(crate) fn check(weight: &HostInt4) -> Result<()> {
    let shape = |tensor, expected: &[usize], found: Vec<usize>| {
        if expected == found {
            return Ok(());
        }
        Err(Error::Shape { kernel: "upload_int4", tensor, expected: format!("{expected:?}"), found })
    };
    if weight.group_size == 0 {
        return Err(Error::Value {
            kernel: "upload_int4",
            name: "group_size",
            expected: "at least 1".into(),
            found: "0".into(),
        });
    }
    let (out, groups) = (weight.out_features, weight.groups());
    shape("weight_packed", &[out * weight.words_per_row()], vec![weight.weight_packed.len()])?;
    shape("scales", &[out, groups], weight.scales.shape.clone())?;
    shape("scales", &[out * groups], vec![weight.scales.len()])?;
    if let Some(zero_points) = &weight.zero_points {
        shape("zero_points", &[out.div_ceil(8) * groups], vec![zero_points.len()])?;
    }
    Ok(())
}

impl<F: Real> Weight<F> for CpuInt4 {
    fn out_features(&self) -> usize {
        self.out_features
    }

    fn in_features(&self) -> usize {
        self.in_features
    }

    #[inline(always)]
    fn widen(&self, row: usize, out: &mut [F]) {
        let groups = self.in_features.div_ceil(self.group_size);
        let bytes = self.in_features.div_ceil(CHUNK) * (CHUNK / 2);
        let packed = &self.packed[row * bytes..][..bytes];
        let scales = &self.scales[row * groups..][..groups];
        let zero_points = &self.zero_points[row * groups..][..groups];
        let (packed, _) = packed.as_chunks::<{ CHUNK / 2 }>();
        let (whole, rest) = out.as_chunks_mut::<CHUNK>();
        if self.group_size.is_multiple_of(CHUNK) {
            // Every chunk lies in one group.
            let group_chunks = self.group_size / CHUNK;
            for (group, out) in whole.chunks_mut(group_chunks).enumerate() {
                let (scale, zero) = (F::of_f32(scales[group]), zero_points[group]);
                let packed = &packed[group * group_chunks..][..out.len()];
                for (out, bytes) in out.iter_mut().zip(packed) {
                    unpack(bytes, zero, scale, out);
                }
            }
        } else {
            for (chunk, (out, bytes)) in whole.iter_mut().zip(packed).enumerate() {
                for (j, out) in out.iter_mut().enumerate() {
                    *out = value(bytes, j, (chunk * CHUNK + j) / self.group_size, scales, zero_points);
                }
            }
        }
        if let Some(bytes) = packed.get(whole.len()) {
            for (j, out) in rest.iter_mut().enumerate() {
                let group = (whole.len() * CHUNK + j) / self.group_size;
                *out = value(bytes, j, group, scales, zero_points);
            }
        }
    }
}

/// A chunk of one group; every loop of it is one or two vector instructions.
#[inline(always)]
fn unpack<F: Real>(bytes: &[u8; CHUNK / 2], zero: i8, scale: F, out: &mut [F; CHUNK]) {
    let (mut low, mut high) = ([0_i8; CHUNK / 2], [0_i8; CHUNK / 2]);
    for (low, byte) in low.iter_mut().zip(bytes) {
        *low = (byte & 0xf) as i8 - zero;
    }
    for (high, byte) in high.iter_mut().zip(bytes) {
        *high = (byte >> 4) as i8 - zero;
    }
    let (first, second) = out.split_at_mut(CHUNK / 2);
    for (out, q) in first.iter_mut().zip(low) {
        *out = F::of_i8(q) * scale;
    }
    for (out, q) in second.iter_mut().zip(high) {
        *out = F::of_i8(q) * scale;
    }
}

/// Weight `j` of a chunk, which lies in group `group`.
#[inline(always)]
fn value<F: Real>(bytes: &[u8; CHUNK / 2], j: usize, group: usize, scales: &[f32], zero_points: &[i8]) -> F {
    let q = (bytes[j % (CHUNK / 2)] >> (4 * (j / (CHUNK / 2)))) & 0xf;
    F::of_i8(q as i8 - zero_points[group]) * F::of_f32(scales[group])
}

pub(super) fn linear_int4<F: Real>(
    cpu: &Cpu<F>,
    x: &CpuTensor<F>,
    weight: &CpuInt4,
    out: &mut CpuTensor<F>,
) -> Result<()> {
    let (out_features, in_features) = weight.dims();
    let [rows, _] = x.dims("linear_int4", "x")?;
    x.expect_shape("linear_int4", "x", &[rows, in_features])?;
    out.expect_shape("linear_int4", "out", &[rows, out_features])?;
    let rounds = out.dtype() == DType::Act;
    let x = Check("linear_int4").act("x", x)?;
    let out = out.reals_mut("linear_int4", "out")?;
    matmul(x, weight, out, |value| if rounds { cpu.act(value) } else { value });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{int4, on_one_and_four_threads, poisoned, randoms, read, tensor};
    use crate::kernels::Kernels;
    use crate::tensor::{DType, HostTensor};

    /// (out, in, group size): whole chunks; a padded last word; groups that no chunk or word is a multiple
    /// of; a short last group; one group a row; less than a word.
    const SHAPES: [(usize, usize, usize); 8] = [
        (16, 64, 32),
        (9, 128, 128),
        (5, 37, 32),
        (17, 90, 30),
        (4, 50, 7),
        (3, 100, 64),
        (6, 45, 45),
        (1, 3, 2),
    ];

    #[test]
    fn matches_linear_on_the_dequantised_weight_bit_for_bit() {
        for (out, inner, group_size) in SHAPES {
            for asymmetric in [false, true] {
                let host = int4(out, inner, group_size, asymmetric, 7);
                same_as_dense::<f32>(&host);
                same_as_dense::<f64>(&host);
            }
        }
    }

    fn same_as_dense<F: Real>(host: &HostInt4) {
        let cpu = Cpu::<F>::new();
        let packed = cpu.upload_int4(host.clone()).unwrap();
        let dense = cpu.upload(host.dequantise()).unwrap();
        for rows in [0, 1, 3, 6] {
            let x = tensor(DType::Act, &[rows, host.in_features], &randoms(5, rows * host.in_features));
            let shape = [rows, host.out_features];
            let mut found = tensor(DType::Float, &shape, &vec![f64::NAN; rows * host.out_features]);
            let mut expected = found.clone();
            cpu.linear_int4(&x, &packed, &mut found).unwrap();
            cpu.linear(&x, &dense, &mut expected).unwrap();
            assert_eq!(read(&found), read(&expected), "{host:?} {rows} rows");
        }
    }

    #[test]
    fn a_row_alone_has_the_bits_that_it_has_in_any_batch_on_any_number_of_threads() {
        let cpu = Cpu::<f32>::new();
        // Large enough to be shared out, and no multiple of any block.
        let (rows, out_features, inner) = (6, 203, 519);
        let weight = cpu.upload_int4(int4(out_features, inner, 32, true, 1)).unwrap();
        let x = randoms(2, rows * inner);
        let run = |x: &[f64]| {
            let rows = x.len() / inner;
            let mut out = poisoned(DType::Act, &[rows, out_features]);
            linear_int4(&cpu, &tensor(DType::Act, &[rows, inner], x), &weight, &mut out).unwrap();
            read(&out)
        };
        let [together, on_four] = on_one_and_four_threads(|| run(&x));
        assert_eq!(together, on_four);
        for t in 0..rows {
            assert_eq!(
                run(&x[t * inner..][..inner]),
                together[t * out_features..][..out_features],
                "row {t}"
            );
        }
    }

    #[test]
    fn matches_a_row_worked_by_hand() {
        let cpu = Cpu::<f64>::new();
        let weight = HostInt4 {
            out_features: 1,
            in_features: 3,
            group_size: 2,
            // Nibbles 1, 15, 4; the padding would be seen.
            weight_packed: vec![0xffff_f4f1].into(),
            scales: HostTensor::f32([1, 2], vec![0.5, 2.0]),
            // Row 0 of the groups' zero points: 3 and 6.
            zero_points: Some(vec![0x3, 0x6].into()),
        };
        let weight = cpu.upload_int4(weight).unwrap();
        let x = tensor(DType::Act, &[1, 3], &[1.0, 10.0, 100.0]);
        let mut out = tensor(DType::Act, &[1, 1], &[f64::NAN]);
        linear_int4(&cpu, &x, &weight, &mut out).unwrap();
        // (1 - 3) / 2 * 1 + (15 - 3) / 2 * 10 + (4 - 6) * 2 * 100
        assert_eq!(read(&out), [-1.0 + 60.0 - 400.0]);
    }

    #[test]
    fn activations_are_rounded_and_floats_are_not() {
        let cpu = Cpu::<f32>::rounding_to_bf16();
        let weight = HostInt4 {
            out_features: 1,
            in_features: 1,
            group_size: 1,
            weight_packed: vec![9].into(),
            scales: HostTensor::f32([1, 1], vec![1.0 + 1.0 / 1024.0]),
            zero_points: None,
        };
        let weight = cpu.upload_int4(weight).unwrap();
        let x = tensor(DType::Act, &[1, 1], &[1.0]);
        let (mut rounded, mut kept) =
            (tensor(DType::Act, &[1, 1], &[0.0]), tensor(DType::Float, &[1, 1], &[0.0]));
        linear_int4(&cpu, &x, &weight, &mut rounded).unwrap();
        linear_int4(&cpu, &x, &weight, &mut kept).unwrap();
        assert_eq!((read(&rounded), read(&kept)), (vec![1.0], vec![1.0 + 1.0 / 1024.0]));
    }

    #[test]
    fn uploads_name_the_array_that_does_not_fit() {
        let cpu = Cpu::<f32>::new();
        let good = int4(9, 20, 8, true, 1);
        let refused = |weight: HostInt4| cpu.upload_int4(weight).unwrap_err().to_string();
        assert_eq!(
            refused(HostInt4 { weight_packed: vec![0; 26].into(), ..good.clone() }),
            "upload_int4: `weight_packed` has shape [26], expected [27]"
        );
        assert_eq!(
            refused(HostInt4 { scales: HostTensor::f32([9, 2], vec![0.0; 18]), ..good.clone() }),
            "upload_int4: `scales` has shape [9, 2], expected [9, 3]"
        );
        assert_eq!(
            refused(HostInt4 { zero_points: Some(vec![0; 3].into()), ..good.clone() }),
            "upload_int4: `zero_points` has shape [3], expected [6]"
        );
        assert_eq!(
            refused(HostInt4 { group_size: 0, ..good }),
            "upload_int4: `group_size` is 0, expected at least 1"
        );
    }

    #[test]
    fn refuses_another_input_width() {
        let cpu = Cpu::<f32>::new();
        let weight = cpu.upload_int4(int4(2, 16, 8, false, 1)).unwrap();
        let mut out = tensor(DType::Act, &[1, 2], &[0.0; 2]);
        let error =
            linear_int4(&cpu, &tensor(DType::Act, &[1, 8], &[0.0; 8]), &weight, &mut out).unwrap_err();
        assert_eq!(error.to_string(), "linear_int4: `x` has shape [1, 8], expected [1, 16]");
    }
}
