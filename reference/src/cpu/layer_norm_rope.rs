//! `layer_norm_rope`: the indexer's keys.

use super::checks::Check;
use super::paged::write_rows;
use super::rope::{rotary_dim, rotate};
use super::{Cpu, CpuTensor, Real, vector};
use crate::batch::Batch;
use crate::error::Result;
use crate::kernels::RopeLayout;

pub(super) fn layer_norm_rope<F: Real>(
    cpu: &Cpu<F>,
    batch: &Batch,
    x: &CpuTensor<F>,
    weight: &CpuTensor<F>,
    bias: &CpuTensor<F>,
    eps: f64,
    layout: RopeLayout,
    cos_sin: &CpuTensor<F>,
    cache: &mut CpuTensor<F>,
) -> Result<()> {
    let check = Check("layer_norm_rope");
    let [tokens, width] = x.dims(check.0, "x")?;
    check.shape("x", x, tokens == batch.num_tokens(), || format!("[{}, D]", batch.num_tokens()))?;
    weight.expect_shape(check.0, "weight", &[width])?;
    bias.expect_shape(check.0, "bias", &[width])?;
    let dim = rotary_dim(check, cos_sin, tokens)?;
    check.shape("cos_sin", cos_sin, dim <= width, || format!("at most {width} rotary columns"))?;
    let x = check.act("x", x)?;
    let cos_sin = check.float("cos_sin", cos_sin)?;
    let weight: Vec<F> = weight.weights(check.0, "weight")?;
    let bias: Vec<F> = bias.weights(check.0, "bias")?;
    let (columns, eps) = (F::of(width as f64), F::of(eps));
    write_rows(check, batch, cache, width, |t, out| {
        let x = &x[t * width..][..width];
        let mean = vector::sum(x, |x| x) / columns;
        let variance = vector::sum(x, |x| (x - mean) * (x - mean)) / columns;
        let deviation = (variance + eps).sqrt();
        for (((out, &x), &weight), &bias) in out.iter_mut().zip(x).zip(&weight).zip(&bias) {
            *out = cpu.act(weight * ((x - mean) / deviation) + bias);
        }
        rotate(cpu, &mut out[..dim], layout, &cos_sin[t * dim..][..dim]);
    })
}
