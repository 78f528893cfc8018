//! Random INT4 weights, as checkpoints have them.

use dsa80_reference::sampling::uniform;
use dsa80_reference::{DType, HostArray, HostData, HostInt4, HostTensor};
use half::{bf16, f16};

/// What a weight looks like.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Format {
    pub(crate) scales: DType,
    pub(crate) group_size: usize,
    pub(crate) zero_points: bool,
}

/// A weight of random nibbles (those that a padded word does not use too), scales around 0.1 of both signs, and random zero points.
pub(crate) fn int4(out_features: usize, in_features: usize, format: Format, seed: u64) -> HostInt4 {
    let Format { scales, group_size, zero_points } = format;
    let groups = in_features.div_ceil(group_size);
    let words = |stream, count| -> HostArray<u32> {
        let half = |i| (uniform(seed, stream, i) * 65536.0) as u32;
        (0..count as u32).map(|i| half(2 * i) | half(2 * i + 1) << 16).collect()
    };
    let scale = |i: usize| {
        let x = uniform(seed, 1, i as u32);
        if x < 0.1 { x - 0.2 } else { 0.05 + 0.1 * x }
    };
    let values = (0..out_features * groups).map(scale);
    let data = match scales {
        DType::Bf16 => HostData::Bf16(values.map(bf16::from_f32).collect()),
        DType::F16 => HostData::F16(values.map(f16::from_f32).collect()),
        DType::F32 => HostData::F32(values.collect()),
        other => panic!("{other} are no scales"),
    };
    HostInt4 {
        out_features,
        in_features,
        group_size,
        weight_packed: words(2, out_features * in_features.div_ceil(8)),
        scales: HostTensor { shape: vec![out_features, groups], data },
        zero_points: zero_points.then(|| words(3, out_features.div_ceil(8) * groups)),
    }
}
