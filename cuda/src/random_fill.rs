//! `random_fill`: weights of random numbers, made on the device; what they are stands in [`dsa80_reference::random`].

use dsa80_reference::random::{not_packed, stacked_shape};
use dsa80_reference::{DType, Error, RandomLinear, RandomTensor, Result};

use crate::device::{Arg, Device, Launch, Program};
use crate::int4::{Int4Shape, PackedInt4};
use crate::repack_int4::{CanonicalInt4, RepackInt4Tile, repack_int4};
use crate::rows::weight_type;
use crate::tensor::CudaTensor;

const KERNEL: &str = "random_fill";
const WORDS: &str = "random_words";
const THREADS: usize = 256;
/// Elements of a word.
const ELEMENTS: usize = 4;

/// Where the rows of a matrix go: `together` of them side by side, the next as many `stride` rows further on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    /// Rows that lie together.
    pub together: usize,
    /// From the first of them to the first of the next.
    pub stride: usize,
    /// The place of row 0.
    pub first: usize,
}

fn program(dtype: DType) -> Program {
    Program { source: "random_fill.cu", defines: vec![("ELEMENT", weight_type(dtype))] }
}

/// Writes the rows of `from`, a matrix or more of one width, to their places in `out`.
///
/// # Errors
/// An element type, a width or a place that does not fit; the device.
pub fn random_fill<D: Device>(
    device: &D,
    from: &RandomTensor,
    rows: Rows,
    out: &mut CudaTensor<D>,
) -> Result<()> {
    out.expect_dtype(KERNEL, "out", &[from.dtype], "the type of the random numbers")?;
    let (columns, last) = (columns(from), rows.last(from.shape.first().copied().unwrap_or(1)));
    let fits = last.is_none_or(|last| (last + 1) * columns <= out.len());
    out.expect(KERNEL, "out", fits, || format!("{:?} rows of {columns}", last.map(|last| last + 1)))?;
    fill(device, from, rows, out.buffer())
}

impl Rows {
    /// The place of the last of `height` rows.
    fn last(self, height: usize) -> Option<usize> {
        let last = height.checked_sub(1)?;
        let together = self.together.max(1);
        Some(last / together * self.stride + self.first + last % together)
    }
}

fn columns(tensor: &RandomTensor) -> usize {
    tensor.shape.get(1..).unwrap_or_default().iter().product()
}

/// [`random_fill`] to memory that is large enough.
fn fill<D: Device>(device: &D, from: &RandomTensor, rows: Rows, out: &D::Buffer) -> Result<()> {
    if !from.dtype.is_weight() || rows.together == 0 {
        return Err(refuse("tensor", "a weight, rows together", format!("{}, {rows:?}", from.dtype)));
    }
    let count = from.len();
    if count == 0 {
        return Ok(());
    }
    let narrow = |name: &'static str, value: usize| {
        i32::try_from(value).map_err(|_| refuse(name, "below 2^31", value.to_string()))
    };
    device.launch(&Launch {
        program: &program(from.dtype),
        entry: KERNEL,
        grid: [blocks(count.div_ceil(ELEMENTS))?, 1, 1],
        threads: THREADS as u32,
        shared_bytes: 0,
        shape: format!("{:?}", from.shape),
        args: &[
            Arg::Buffer(out),
            Arg::I64(count as i64),
            Arg::I32(narrow("columns", columns(from))?),
            Arg::I32(narrow("together", rows.together)?),
            Arg::I32(narrow("stride", rows.stride)?),
            Arg::I32(narrow("first", rows.first)?),
            Arg::I32(from.seed.cast_signed()),
            Arg::F32(from.centre),
            Arg::F32(from.spread()),
        ],
    })
}

/// Writes `count` words of `seed`.
fn random_words<D: Device>(device: &D, buffer: &D::Buffer, count: usize, seed: u32) -> Result<()> {
    if count == 0 {
        return Ok(());
    }
    device.launch(&Launch {
        program: &program(DType::Bf16),
        entry: WORDS,
        grid: [blocks(count)?, 1, 1],
        threads: THREADS as u32,
        shared_bytes: 0,
        shape: format!("{count} words"),
        args: &[Arg::Buffer(buffer), Arg::I64(count as i64), Arg::I32(seed.cast_signed())],
    })
}

fn blocks(threads: usize) -> Result<u32> {
    let blocks = threads.div_ceil(THREADS);
    // What a grid may have in its first dimension.
    u32::try_from(blocks)
        .ok()
        .filter(|&blocks| blocks <= i32::MAX.unsigned_abs())
        .ok_or_else(|| refuse("tensor", "fewer than 2^31 blocks", blocks.to_string()))
}

fn refuse(name: &'static str, expected: &str, found: String) -> Error {
    Error::Value { kernel: KERNEL, name, expected: expected.to_owned(), found }
}

/// The contract's [`random`](dsa80_reference::Kernels::random).
///
/// # Errors
/// Element types, or dimensions but the first, that differ; memory; the device.
pub fn random<D: Device>(device: &D, tensors: &[RandomTensor]) -> Result<CudaTensor<D>> {
    let shape = stacked_shape(tensors)?;
    let Some(RandomTensor { dtype, .. }) = tensors.first() else {
        return Err(refuse("tensors", "at least one", "none".into()));
    };
    let mut out = crate::cuda::alloc(device, *dtype, &shape)?;
    let mut first = 0;
    for tensor in tensors {
        let height = tensor.shape[0];
        let together = height.max(1);
        random_fill(device, tensor, Rows { together, stride: together, first }, &mut out)?;
        first += height;
    }
    Ok(out)
}

impl<D: Device> PackedInt4<D> {
    /// One weight of random numbers, or a gate and its up projection.
    ///
    /// # Errors
    /// As for [`Int4Shape::of_random`]; memory; the device.
    pub fn random(device: &D, tile: &RepackInt4Tile, weights: &[&RandomLinear]) -> Result<Self> {
        let shape = Int4Shape::of_random(weights)?;
        let mut packed = Self::alloc(device, "int4", shape, 1)?;
        let staging: Result<Vec<_>> = weights.iter().map(|_| CanonicalInt4::alloc(device, shape)).collect();
        packed.random_at(device, tile, &mut staging?, 0, weights)?;
        Ok(packed)
    }

    /// Makes one weight, or a gate and its up projection, at place `index` through the memory of `staging`, one for each.
    ///
    /// # Errors
    /// Weights of another shape; there is no such place; the device.
    pub fn random_at(
        &mut self,
        device: &D,
        tile: &RepackInt4Tile,
        staging: &mut [CanonicalInt4<D>],
        index: usize,
        weights: &[&RandomLinear],
    ) -> Result<()> {
        let found = Int4Shape::of_random(weights)?;
        if found != *self.shape() || staging.len() != weights.len() {
            return Err(refuse("weights", &format!("{:?}", self.shape()), format!("{found:?}")));
        }
        for (staging, weight) in staging.iter_mut().zip(weights) {
            canonical(device, weight, staging)?;
        }
        repack_int4(device, tile, staging, self, index)
    }
}

/// Makes a weight's arrays.
fn canonical<D: Device>(device: &D, weight: &RandomLinear, out: &mut CanonicalInt4<D>) -> Result<()> {
    let parts = weight.int4().ok_or_else(not_packed)?;
    random_words(
        device,
        &out.weight,
        weight.out_features * weight.in_features.div_ceil(8),
        parts.words_seed,
    )?;
    let together = weight.out_features.max(1);
    fill(device, &parts.scales, Rows { together, stride: together, first: 0 }, &out.scales)?;
    if let (Some(zeros), Some(seed)) = (&out.zeros, parts.zero_points_seed) {
        random_words(device, zeros, weight.out_features.div_ceil(8) * parts.scales.shape[1], seed)?;
    }
    out.has_zeros = parts.zero_points_seed.is_some();
    Ok(())
}
