//! Which bytes of which tensors a rank needs.

use std::ops::Range;

use bytemuck::Pod;

use super::format::{Int4Format, LinearFormat};
use super::layout::LinearSpec;
use super::shard::Shard;
use super::tensors::TensorView;
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

    /// Copies the rectangle out of a tensor with rows of `row_len` elements, contiguously or row by row.
    ///
    /// The tensor's shape has been checked against the spec that the slice was made from, so it lies inside.
    pub(super) fn copy<T: Pod>(&self, tensor: TensorView<'_>, row_len: usize) -> Vec<T> {
        let width = size_of::<T>();
        let mut out = vec![T::zeroed(); self.elements()];
        let bytes = bytemuck::cast_slice_mut::<T, u8>(&mut out);
        if self.columns.len() == row_len {
            bytes.copy_from_slice(
                &tensor.bytes[self.rows.start * row_len * width..self.rows.end * row_len * width],
            );
        } else if !bytes.is_empty() {
            for (row, target) in self.rows.clone().zip(bytes.chunks_exact_mut(self.columns.len() * width)) {
                let start = (row * row_len + self.columns.start) * width;
                target.copy_from_slice(&tensor.bytes[start..start + target.len()]);
            }
        }
        out
    }
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
