//! `latent_rope`: MLA's cache row.

use super::checks::Check;
use super::paged::write_rows;
use super::rope::{rotary_dim, rotate};
use super::{Cpu, CpuTensor, Real, vector};
use crate::batch::Batch;
use crate::error::Result;
use crate::kernels::RopeLayout;

pub(super) fn latent_rope<F: Real>(
    cpu: &Cpu<F>,
    batch: &Batch,
    x: &CpuTensor<F>,
    weight: &CpuTensor<F>,
    eps: f64,
    cos_sin: &CpuTensor<F>,
    cache: &mut CpuTensor<F>,
) -> Result<()> {
    let check = Check("latent_rope");
    let [tokens, width] = x.dims(check.0, "x")?;
    let [rank] = weight.dims(check.0, "weight")?;
    let dim = rotary_dim(check, cos_sin, batch.num_tokens())?;
    check.shape("x", x, tokens == batch.num_tokens() && width == rank + dim, || {
        format!("[{}, {rank} + {dim}]", batch.num_tokens())
    })?;
    let x = check.act("x", x)?;
    let cos_sin = check.float("cos_sin", cos_sin)?;
    let weight: Vec<F> = weight.weights(check.0, "weight")?;
    let (columns, eps) = (F::of(rank as f64), F::of(eps));
    write_rows(check, batch, cache, width, |t, out| {
        let (latent, key) = x[t * width..][..width].split_at(rank);
        let (out_latent, out_key) = out.split_at_mut(rank);
        let root = (vector::sum(latent, |x| x * x) / columns + eps).sqrt();
        for ((out, &x), &weight) in out_latent.iter_mut().zip(latent).zip(&weight) {
            *out = cpu.act(weight * (x / root));
        }
        out_key.copy_from_slice(key);
        rotate(cpu, out_key, RopeLayout::Interleaved, &cos_sin[t * dim..][..dim]);
    })
}
