//! Which bytes of which tensors a rank needs.

use std::ops::Range;

use bytemuck::Pod;
use dsa80_reference::{HostArray, buffers};

use super::format::{Int4Format, LinearFormat};
use super::layout::LinearSpec;
use super::shard::Shard;
use super::tensors::TensorView;
use super::{CheckpointError, parallel};
use crate::config::QuantizationMethod;

/// A rectangle of a tensor seen as a matrix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Slice {
    pub(super) rows: Range<usize>,
    pub(super) columns: Range<usize>,
}

impl Slice {
    pub(super) fn elements(&self) -> usize {
        self.rows.len() * self.columns.len()
    }

    /// Reads the rectangle out of a tensor with rows of `row_len` elements, in parts that `readers` threads share.
    ///
    /// The tensor's shape has been checked against the spec that the slice was made from, so it lies inside.
    pub(super) fn read<T: Pod>(
        &self,
        tensor: TensorView<'_>,
        row_len: usize,
        readers: usize,
    ) -> Result<HostArray<T>, CheckpointError> {
        let width = size_of::<T>();
        let mut out = buffers::take::<T>(self.elements());
        let run = self.columns.len() * width;
        if run == 0 {
            return Ok(out);
        }
        let (pitch, first) = (row_len * width, self.columns.start * width);
        let rows = (PART_BYTES / run).max(1);
        let parts = bytemuck::cast_slice_mut::<T, u8>(&mut out).chunks_mut(rows * run).enumerate();
        let parts: Vec<_> =
            parts.map(|(i, part)| ((self.rows.start + i * rows) * pitch + first, part)).collect();
        parallel::for_each(readers, parts, |(start, part)| read_rows(tensor, start, pitch, run, part))?;
        Ok(out)
    }
}

/// What one thread reads at once, so that all share a large tensor: a disk is as fast as many ask it.
const PART_BYTES: usize = 2 << 20;

/// Bytes between two runs that are cheaper read along than by a call for each run.
const GAP: usize = 8 << 10;

/// What is read at once where gaps are read along.
const SPAN: usize = 1 << 20;

/// Reads runs of `run` bytes, `pitch` apart from `start` on, into `out`.
fn read_rows(
    tensor: TensorView<'_>,
    start: usize,
    pitch: usize,
    run: usize,
    out: &mut [u8],
) -> Result<(), CheckpointError> {
    if run == pitch {
        return tensor.read(start, out);
    }
    if pitch - run > GAP {
        let mut rows = out.chunks_exact_mut(run).enumerate();
        return rows.try_for_each(|(row, out)| tensor.read(start + row * pitch, out));
    }
    let rows = (SPAN / pitch).min(out.len() / run).max(1);
    let mut span = vec![0; rows * pitch];
    for (block, out) in out.chunks_mut(rows * run).enumerate() {
        let used = (out.len() / run - 1) * pitch + run;
        tensor.read(start + block * rows * pitch, &mut span[..used])?;
        for (row, out) in out.chunks_exact_mut(run).enumerate() {
            out.copy_from_slice(&span[row * pitch..row * pitch + run]);
        }
    }
    Ok(())
}

/// A rank's slices of a packed layer, in the orientation of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Int4Slices {
    pub(super) words: Slice,
    pub(super) scales: Slice,
    pub(super) zero_points: Option<Slice>,
    /// Output features of the rank, and how many rows of the first word of zero points (and, for AutoAWQ, of
    /// the weight) come before them.
    pub(super) out_features: usize,
    pub(super) skip: usize,
    pub(super) in_features: usize,
    pub(super) group_size: usize,
}

/// The rows and columns of a dense weight.
pub(super) fn dense(spec: &LinearSpec, shard: Shard) -> Slice {
    let (rows, columns) = spec.split.ranges(shard, spec.out_features, spec.in_features);
    Slice { rows, columns }
}

/// The parts of a packed one. `check_tp` has ensured that columns are cut at whole words and groups.
pub(super) fn int4(spec: &LinearSpec, format: Int4Format, shard: Shard) -> Int4Slices {
    let (rows, columns) = spec.split.ranges(shard, spec.out_features, spec.in_features);
    let words = columns.start / 8..columns.end.div_ceil(8);
    let row_words = rows.start / 8..rows.end.div_ceil(8);
    let one_group = format.group_size >= spec.in_features;
    let groups = if one_group {
        0..1
    } else {
        columns.start / format.group_size..columns.end.div_ceil(format.group_size)
    };
    let group_size = if one_group { columns.len() } else { format.group_size };
    let (out_features, in_features, skip) = (rows.len(), columns.len(), rows.start % 8);
    let asymmetric = !format.symmetric;
    match format.method {
        QuantizationMethod::CompressedTensors => Int4Slices {
            words: Slice { rows: rows.clone(), columns: words },
            scales: Slice { rows, columns: groups.clone() },
            zero_points: asymmetric.then_some(Slice { rows: row_words, columns: groups }),
            out_features,
            skip,
            in_features,
            group_size,
        },
        QuantizationMethod::AutoAwq => Int4Slices {
            words: Slice { rows: columns, columns: row_words.clone() },
            scales: Slice { rows: groups.clone(), columns: rows },
            zero_points: asymmetric.then_some(Slice { rows: groups, columns: row_words }),
            out_features,
            skip,
            in_features,
            group_size,
        },
    }
}

/// Bytes that a rank copies out of the file for `spec`.
pub(super) fn linear_bytes(spec: &LinearSpec, format: LinearFormat, shard: Shard) -> u64 {
    let bytes = match format {
        LinearFormat::Dense(dtype) => dense(spec, shard).elements() * width(dtype),
        LinearFormat::Int4(format) => {
            let slices = int4(spec, format, shard);
            let words = slices.words.elements() + slices.zero_points.as_ref().map_or(0, Slice::elements);
            words * size_of::<u32>() + slices.scales.elements() * width(format.scale)
        }
    };
    bytes as u64
}

/// Bytes of a stored float.
pub(crate) fn width(dtype: dsa80_reference::DType) -> usize {
    use dsa80_reference::DType;
    match dtype {
        DType::Fp8 => 1,
        DType::Bf16 | DType::F16 => 2,
        DType::F32 | DType::Act | DType::Float | DType::Index => 4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::files::Files;

    /// Every way of reading, with more than a part of each: whole rows, runs with small gaps, runs with large ones.
    #[test]
    fn a_rectangle_is_what_lies_there() {
        const START: usize = 24;
        let dir = tempfile::tempdir().unwrap();
        let words: Vec<u32> = (0..10_u32 << 20).map(|i| i.wrapping_mul(0x9e37_79b1)).collect();
        let mut bytes = vec![0xff; START];
        bytes.extend_from_slice(bytemuck::cast_slice(&words));
        std::fs::write(dir.path().join("file"), bytes).unwrap();
        let contents = Files::Directory(dir.path().to_owned()).map("file").unwrap().unwrap();
        let tensor = TensorView::of_file(&contents, START);
        for (row_len, rows, columns) in [
            (1024, 1..10_000, 0..1024),
            (256, 5..40_960, 64..96),
            (256, 0..40_960, 1..256),
            (8192, 3..1280, 2048..4096),
            (5 << 20, 1..2, 7..5 << 20),
            (16, 2..2, 0..16),
            (16, 2..9, 3..3),
        ] {
            let slice = Slice { rows: rows.clone(), columns: columns.clone() };
            let expected: Vec<u32> =
                rows.flat_map(|row| words[row * row_len..][columns.clone()].iter().copied()).collect();
            for readers in [1, 5] {
                let found: HostArray<u32> = slice.read(tensor, row_len, readers).unwrap();
                assert!(*found == expected, "{slice:?} of rows of {row_len} by {readers}");
            }
        }
        let beyond = Slice { rows: 0..(10 << 20) + 1, columns: 0..1 };
        assert!(beyond.read::<u32>(tensor, 1, 2).unwrap_err().to_string().contains("cut off"));
    }
}
