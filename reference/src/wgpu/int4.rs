//! Packed INT4 weights: the checkpoint's own layout, which WGSL reads as it is.

use super::Wgpu;
use super::tensor::WgpuTensor;
use crate::error::{Error, Result};
use crate::tensor::HostInt4;

/// A packed INT4 weight of `Wgpu`, laid out as [`HostInt4`] says.
#[derive(Debug)]
pub struct WgpuInt4 {
    pub(super) out_features: usize,
    pub(super) in_features: usize,
    pub(super) group_size: usize,
    /// `[out, words of a row]` words.
    pub(super) weight_packed: WgpuTensor,
    /// `[out, groups]`, any weight type.
    pub(super) scales: WgpuTensor,
    /// `[ceil(out / 8), groups]` words; `None` is 8 everywhere.
    pub(super) zero_points: Option<WgpuTensor>,
}

impl WgpuInt4 {
    pub(super) fn upload(wgpu: &Wgpu, weight: &HostInt4) -> Result<Self> {
        let &HostInt4 { out_features, in_features, group_size, .. } = weight;
        let refuse = |tensor, expected: String, found: usize| {
            Err(Error::Shape { kernel: "upload_int4", tensor, expected, found: vec![found] })
        };
        if group_size == 0 || in_features == 0 || out_features == 0 {
            return refuse("weight_packed", "at least one row, column and column of a group".into(), 0);
        }
        let (words, groups) = (weight.words_per_row(), weight.groups());
        if weight.weight_packed.len() != out_features * words {
            return refuse(
                "weight_packed",
                format!("{} words", out_features * words),
                weight.weight_packed.len(),
            );
        }
        if weight.scales.len() != out_features * groups {
            return refuse("scales", format!("{} scales", out_features * groups), weight.scales.len());
        }
        let zeros = out_features.div_ceil(8) * groups;
        if let Some(zero_points) = weight.zero_points.as_ref().filter(|found| found.len() != zeros) {
            return refuse("zero_points", format!("{zeros} words"), zero_points.len());
        }
        let zero_points = weight.zero_points.as_ref();
        Ok(Self {
            out_features,
            in_features,
            group_size,
            weight_packed: wgpu.upload_words(&[out_features, words], &weight.weight_packed)?,
            scales: wgpu.upload_host(&weight.scales)?,
            zero_points: zero_points
                .map(|words| wgpu.upload_words(&[out_features.div_ceil(8), groups], words))
                .transpose()?,
        })
    }
}
