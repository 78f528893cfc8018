//! `latent_rope`: MLA's cache row.

use super::checks::Check;
use super::paged::{RowKind, write_rows};
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
    write_rows(check, batch, cache, RowKind::Mla { rank, rope: dim }, |t, out| {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{assert_close, batch, message, poisoned, randoms, read, tensor};
    use crate::tensor::DType;

    #[test]
    fn by_hand() {
        // The latent's mean square is 12.5, with eps 16: a root of 4. The key part makes a quarter turn.
        let batch = batch(4, 2, &[(2, 1)], 0);
        let x = tensor::<f64>(DType::Act, &[1, 4], &[3.0, 4.0, 1.0, 2.0]);
        let weight = tensor(DType::Float, &[2], &[1.0, 2.0]);
        let cos_sin = tensor(DType::Float, &[1, 1, 2], &[0.0, 1.0]);
        let mut cache = poisoned(DType::Act, &[2, 4, 4]);
        latent_rope(&Cpu::new(), &batch, &x, &weight, 3.5, &cos_sin, &mut cache).unwrap();
        let cache = read(&cache);
        let slot = batch.slot_mapping[0] as usize;
        assert_close(&cache[slot * 4..][..4], &[0.75, 2.0, -2.0, 1.0], 1e-15);
        assert_eq!(cache.iter().filter(|x| !x.is_nan()).count(), 4);
    }

    #[test]
    fn of_two_tokens_with_one_slot_the_later_stays() {
        let mut batch = batch(2, 1, &[(0, 2)], 0);
        batch.slot_mapping = vec![1, 1];
        let x = tensor::<f64>(DType::Act, &[2, 3], &randoms(1, 6));
        let weight = tensor(DType::Float, &[1], &[1.0]);
        let cos_sin = tensor(DType::Float, &[2, 1, 2], &[1.0, 0.0, 1.0, 0.0]);
        let mut cache = poisoned(DType::Act, &[1, 2, 3]);
        latent_rope(&Cpu::new(), &batch, &x, &weight, 0.0, &cos_sin, &mut cache).unwrap();
        assert_eq!(read(&cache)[4..], read(&x)[4..]);
        assert!(read(&cache)[0].is_nan());
    }

    #[test]
    fn rounds_on_writing() {
        let batch = batch(1, 1, &[(0, 1)], 0);
        let x = tensor::<f64>(DType::Act, &[1, 6], &randoms(2, 6));
        let weight = tensor(DType::Float, &[4], &randoms(3, 4));
        let cos_sin = tensor(DType::Float, &[1, 1, 2], &[0.6, 0.8]);
        let [exact, rounded] = [Cpu::new(), Cpu::rounding_to_bf16()].map(|cpu| {
            let mut cache = poisoned(DType::Act, &[1, 1, 6]);
            latent_rope(&cpu, &batch, &x, &weight, 1e-5, &cos_sin, &mut cache).unwrap();
            read(&cache)
        });
        assert_eq!(rounded, exact.iter().map(|x| x.round_bf16()).collect::<Vec<_>>());
    }

    #[test]
    fn misfits_are_named() {
        let batch = batch(2, 1, &[(0, 2)], 0);
        let weight = tensor::<f32>(DType::Float, &[4], &[1.0; 4]);
        let cos_sin = tensor(DType::Float, &[2, 1, 2], &[1.0; 4]);
        let mut cache = poisoned(DType::Act, &[1, 2, 6]);
        let cpu = Cpu::new();
        let x = tensor(DType::Act, &[2, 7], &[0.0; 14]);
        let text = message(latent_rope(&cpu, &batch, &x, &weight, 1e-5, &cos_sin, &mut cache));
        assert!(text.contains("latent_rope: `x` has shape [2, 7], expected [2, 4 + 2]"), "{text}");
        let x = tensor(DType::Act, &[2, 6], &[0.0; 12]);
        let mut missing = poisoned(DType::Act, &[0, 2, 6]);
        let text = message(latent_rope(&cpu, &batch, &x, &weight, 1e-5, &cos_sin, &mut missing));
        assert!(text.contains("`slot_mapping`"), "{text}");
        let x = tensor(DType::Float, &[2, 6], &[0.0; 12]);
        let text = message(latent_rope(&cpu, &batch, &x, &weight, 1e-5, &cos_sin, &mut cache));
        assert!(text.contains("`x` holds floats"), "{text}");
    }
}
