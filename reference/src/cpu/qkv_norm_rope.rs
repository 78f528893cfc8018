//! `qkv_norm_rope`: the kernels that it is made of, one after the other.

use super::latent_rope::latent_rope;
use super::layer_norm_rope::layer_norm_rope;
use super::rms_norm::rms_norm;
use super::{Cpu, CpuTensor, Real};
use crate::batch::Batch;
use crate::error::Result;
use crate::kernels::IndexKeys;

pub(super) fn qkv_norm_rope<F: Real>(
    cpu: &Cpu<F>,
    batch: &Batch,
    q_a: &CpuTensor<F>,
    q_weight: &CpuTensor<F>,
    q_latent: &mut CpuTensor<F>,
    kv_a: &CpuTensor<F>,
    kv_weight: &CpuTensor<F>,
    cache: &mut CpuTensor<F>,
    eps: f64,
    cos_sin: &CpuTensor<F>,
    keys: Option<IndexKeys<'_, CpuTensor<F>>>,
) -> Result<()> {
    rms_norm(cpu, q_a, q_weight, eps, q_latent)?;
    latent_rope(cpu, batch, kv_a, kv_weight, eps, cos_sin, cache)?;
    let Some(IndexKeys { x, weight, bias, eps, layout, cache }) = keys else { return Ok(()) };
    layer_norm_rope(cpu, batch, x, weight, bias, eps, layout, cos_sin, cache)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{batch, poisoned, read, tensor};
    use crate::kernels::RopeLayout;
    use crate::tensor::DType;

    #[test]
    fn by_hand() {
        let batch = batch(2, 1, &[(0, 1)], 0);
        let act = |values: &[f64]| tensor::<f64>(DType::Act, &[1, values.len()], values);
        let weight = |values: &[f64]| tensor::<f64>(DType::Float, &[values.len()], values);
        // Roots of 5, and a deviation of 2; the rotary pairs make a quarter turn.
        let (q_a, kv_a, x) = (act(&[5.0, -5.0]), act(&[5.0, 5.0, 1.0, 2.0]), act(&[2.0, -2.0]));
        let cos_sin = tensor(DType::Float, &[1, 1, 2], &[0.0, 1.0]);
        let mut q_latent = poisoned(DType::Act, &[1, 2]);
        let (mut cache, mut keys) = (poisoned(DType::Act, &[1, 2, 4]), poisoned(DType::Act, &[1, 2, 2]));
        let (weights, bias) = (weight(&[1.0, 1.0]), weight(&[0.0, 3.0]));
        let layout = RopeLayout::Half;
        let index = IndexKeys { x: &x, weight: &weights, bias: &bias, eps: 0.0, layout, cache: &mut keys };
        let (q_weight, kv_weight) = (weight(&[2.0, 3.0]), weight(&[4.0, 5.0]));
        qkv_norm_rope(
            &Cpu::new(),
            &batch,
            &q_a,
            &q_weight,
            &mut q_latent,
            &kv_a,
            &kv_weight,
            &mut cache,
            0.0,
            &cos_sin,
            Some(index),
        )
        .unwrap();
        assert_eq!(read(&q_latent), [2.0, -3.0]);
        assert_eq!(read(&cache)[..4], [4.0, 5.0, -2.0, 1.0]);
        assert_eq!(read(&keys)[..2], [-2.0, 1.0]);
    }
}
