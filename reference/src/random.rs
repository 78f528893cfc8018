//! Weights of random numbers: described in a few words and made where they are needed, the same on every backend.
//!
//! A number depends on its place and the seed alone. Word `j` of a seed is [`word`]`(j, seed)`. Element `i` of a tensor takes byte
//! `b = i % 4` (the lowest first) of word `i / 4` and is `centre + spread * (2 b - 255) / 256` in f32, rounded to its type. The words of an
//! INT4 weight, and of its zero points, are words as they are.

use bytemuck::Pod;
use half::{bf16, f16};

use crate::error::{Error, Result};
use crate::host_array::HostArray;
use crate::tensor::{DType, HostData, HostInt4, HostLinear, HostTensor};

/// Word `place` of `seed`.
pub fn word(place: u64, seed: u32) -> u32 {
    let (low, high) = (place as u32, (place >> 32) as u32);
    let x = low.wrapping_mul(0x9e37_79b1) ^ high.wrapping_mul(0x85eb_ca77) ^ seed.wrapping_mul(0xc2b2_ae3d);
    let x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    let x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// A dense weight of random numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct RandomTensor {
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// A weight type.
    pub dtype: DType,
    /// The middle of the numbers.
    pub centre: f32,
    /// How far they are from it at most. Has eight significant bits, so that a fused multiply-add rounds as two operations do.
    spread: f32,
    /// Two tensors of one seed hold the same numbers.
    pub seed: u32,
}

impl RandomTensor {
    /// Numbers within `spread` (rounded to bf16) of `centre`.
    pub fn new(shape: impl Into<Vec<usize>>, dtype: DType, centre: f32, spread: f32, seed: u32) -> Self {
        Self { shape: shape.into(), dtype, centre, spread: bf16::from_f32(spread).to_f32(), seed }
    }

    /// How far the numbers are from the centre at most.
    pub fn spread(&self) -> f32 {
        self.spread
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The numbers.
    pub fn make(&self) -> HostTensor {
        fn all<E: Pod + Default>(tensor: &RandomTensor, convert: impl Fn(f32) -> E) -> HostArray<E> {
            let table: [E; 256] = std::array::from_fn(|b| {
                convert(tensor.centre + tensor.spread * ((2 * b as i32 - 255) as f32 / 256.0))
            });
            let mut elements = vec![E::default(); tensor.len()];
            for (place, chunk) in elements.chunks_mut(4).enumerate() {
                for (element, byte) in chunk.iter_mut().zip(word(place as u64, tensor.seed).to_le_bytes()) {
                    *element = table[usize::from(byte)];
                }
            }
            elements.into()
        }
        let data = match self.dtype {
            DType::Bf16 => HostData::Bf16(all(self, bf16::from_f32)),
            DType::F16 => HostData::F16(all(self, f16::from_f32)),
            _ => HostData::F32(all(self, |x| x)),
        };
        HostTensor { shape: self.shape.clone(), data }
    }
}

/// How the numbers of a [`RandomLinear`] are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RandomFormat {
    /// Unquantised, in a weight type.
    Dense(DType),
    /// Packed: all nibbles are as likely.
    Int4 {
        /// Columns that share a scale; at most the number of columns.
        group_size: usize,
        /// The type of the scales.
        scales: DType,
        /// Whether there are zero points.
        zero_points: bool,
    },
}

/// A linear layer's weight of random numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RandomLinear {
    /// Rows.
    pub out_features: usize,
    /// Columns.
    pub in_features: usize,
    /// How they are stored.
    pub format: RandomFormat,
    /// The standard deviation of the numbers.
    pub deviation: f32,
    /// Two weights of one seed hold the same numbers.
    pub seed: u32,
}

/// The parts of a packed [`RandomLinear`].
#[derive(Debug, Clone, PartialEq)]
pub struct RandomInt4 {
    /// Seeds `[out, ceil(in / 8)]` words.
    pub words_seed: u32,
    /// `[out, groups]`.
    pub scales: RandomTensor,
    /// Seeds `[ceil(out / 8), groups]` words, where there are zero points.
    pub zero_points_seed: Option<u32>,
    /// Columns that share a scale.
    pub group_size: usize,
}

impl RandomLinear {
    /// A dense weight's numbers.
    pub fn tensor(&self, dtype: DType) -> RandomTensor {
        let spread = self.deviation * 3.0_f32.sqrt();
        RandomTensor::new([self.out_features, self.in_features], dtype, 0.0, spread, self.seed)
    }

    /// A packed weight's parts; `None` for a dense one.
    pub fn int4(&self) -> Option<RandomInt4> {
        let RandomFormat::Int4 { group_size, scales, zero_points } = self.format else { return None };
        // The variance of a nibble that is as likely any as another, less 8, and of the difference of two.
        let nibble = if zero_points { 42.5_f32 } else { 21.5 };
        let scale = self.deviation / nibble.sqrt();
        let groups = self.in_features.div_ceil(group_size.max(1));
        let seed = |part: u32| word(u64::from(part), self.seed);
        Some(RandomInt4 {
            words_seed: seed(1),
            scales: RandomTensor::new([self.out_features, groups], scales, scale, 0.2 * scale, seed(2)),
            zero_points_seed: zero_points.then(|| seed(3)),
            group_size,
        })
    }

    /// The numbers: dense or INT4.
    pub fn make(&self) -> HostLinear {
        let Some(RandomInt4 { words_seed, scales, zero_points_seed, group_size }) = self.int4() else {
            let (RandomFormat::Dense(dtype) | RandomFormat::Int4 { scales: dtype, .. }) = self.format;
            return HostLinear::Dense(self.tensor(dtype).make());
        };
        let words = |count: usize, seed: u32| (0..count as u64).map(|place| word(place, seed)).collect();
        let groups = self.in_features.div_ceil(group_size.max(1));
        HostLinear::Int4(HostInt4 {
            out_features: self.out_features,
            in_features: self.in_features,
            group_size,
            weight_packed: words(self.out_features * self.in_features.div_ceil(8), words_seed),
            scales: scales.make(),
            zero_points: zero_points_seed.map(|seed| words(self.out_features.div_ceil(8) * groups, seed)),
        })
    }
}

/// The shape of `tensors` one below the other.
///
/// # Errors
/// There are none; element types, or dimensions but the first, that differ; a type that is no weight's.
pub fn stacked_shape(tensors: &[RandomTensor]) -> Result<Vec<usize>> {
    let refuse = |expected: &str, found: String| Error::Value {
        kernel: "random",
        name: "tensors",
        expected: expected.into(),
        found,
    };
    let first = tensors.first().ok_or_else(|| refuse("at least one", "none".into()))?;
    let inner = |tensor: &RandomTensor| tensor.shape.get(1..).map(<[usize]>::to_vec);
    if !first.dtype.is_weight() || inner(first).is_none() {
        return Err(refuse(
            "a weight of at least one dimension",
            format!("{} {:?}", first.dtype, first.shape),
        ));
    }
    for tensor in tensors {
        if tensor.dtype != first.dtype || inner(tensor) != inner(first) {
            let expected = format!("{} with rows of {:?}", first.dtype, &first.shape[1..]);
            return Err(refuse(&expected, format!("{} {:?}", tensor.dtype, tensor.shape)));
        }
    }
    let rows = tensors.iter().map(|tensor| tensor.shape[0]).sum();
    Ok(std::iter::once(rows).chain(first.shape[1..].iter().copied()).collect())
}

/// The numbers of `tensors`, one below the other.
pub(crate) fn stacked(tensors: &[RandomTensor]) -> Result<HostTensor> {
    let shape = stacked_shape(tensors)?;
    let mut parts = tensors.iter().map(|tensor| tensor.make().data);
    let data = parts.next().map(|first| {
        parts.fold(first, |mut all, part| {
            match (&mut all, part) {
                (HostData::Bf16(all), HostData::Bf16(part)) => append(all, &part),
                (HostData::F16(all), HostData::F16(part)) => append(all, &part),
                (HostData::F32(all), HostData::F32(part)) => append(all, &part),
                // `stacked_shape` refuses two types.
                _ => {}
            }
            all
        })
    });
    Ok(HostTensor { shape, data: data.unwrap_or(HostData::F32(Vec::new().into())) })
}

fn append<T: Pod>(all: &mut HostArray<T>, part: &[T]) {
    *all = [&**all, part].concat().into();
}

/// What `random_int4` says of a dense weight.
pub fn not_packed() -> Error {
    Error::Value {
        kernel: "random_int4",
        name: "weight",
        expected: "INT4".into(),
        found: "unquantised".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(values: &[f32]) -> (f64, f64) {
        let count = values.len() as f64;
        let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
        let variance = values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / count;
        (mean, variance.sqrt())
    }

    #[test]
    fn numbers_are_those_of_the_definition() {
        let tensor = RandomTensor::new([3, 3], DType::F32, 1.0, 0.25, 7);
        let HostData::F32(values) = tensor.make().data else { panic!("f32 was asked for") };
        for (i, value) in values.iter().enumerate() {
            let byte = word(i as u64 / 4, 7) >> (8 * (i % 4)) & 0xff;
            assert_eq!(*value, 1.0 + 0.25 * (2.0 * byte as f32 - 255.0) / 256.0);
        }
        assert_eq!((word(0, 0), word(1, 0), word(1 << 32, 0) == word(1, 0)), (0, word(1, 0), false));
    }

    #[test]
    fn weights_have_the_deviation_that_was_asked_for() {
        let formats = [
            RandomFormat::Dense(DType::Bf16),
            RandomFormat::Dense(DType::F16),
            RandomFormat::Int4 { group_size: 32, scales: DType::Bf16, zero_points: true },
            RandomFormat::Int4 { group_size: 128, scales: DType::F16, zero_points: false },
        ];
        for format in formats {
            let weight =
                RandomLinear { out_features: 256, in_features: 256, format, deviation: 0.02, seed: 5 };
            let values = match weight.make() {
                HostLinear::Dense(tensor) => tensor.to_f32(),
                HostLinear::Int4(packed) => packed.dequantise().to_f32(),
                HostLinear::Random(_) => panic!("not made"),
            };
            let (mean, deviation) = moments(&values);
            // Nibbles without zero points are half a step off the middle.
            assert!(mean.abs() < 0.003, "{format:?}: {mean}");
            assert!((deviation / 0.02 - 1.0).abs() < 0.05, "{format:?}: {deviation}");
            assert_eq!(weight.make(), weight.make());
            assert_ne!(weight.make(), RandomLinear { seed: 6, ..weight }.make());
        }
    }
}
