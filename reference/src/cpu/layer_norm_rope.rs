//! `layer_norm_rope`: the indexer's keys.

use super::checks::Check;
use super::paged::{RowKind, write_rows};
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
    write_rows(check, batch, cache, RowKind::Indexer { width }, |t, out| {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{assert_close, batch, message, poisoned, randoms, read, tensor};
    use crate::tensor::DType;

    const LAYOUT: RopeLayout = RopeLayout::Interleaved;

    #[test]
    fn by_hand() {
        // Mean 2.5, variance 1.25 + 1.0 of eps: a deviation of 1.5. The first pair makes a quarter turn.
        let batch = batch(2, 3, &[(0, 1)], 0);
        let x = tensor::<f64>(DType::Act, &[1, 4], &[1.0, 2.0, 3.0, 4.0]);
        let weight = tensor(DType::Float, &[4], &[1.0, 1.0, 2.0, 2.0]);
        let bias = tensor(DType::Float, &[4], &[0.0, 1.0, 0.0, 1.0]);
        let cos_sin = tensor(DType::Float, &[1, 1, 2], &[0.0, 1.0]);
        let mut cache = poisoned(DType::Act, &[3, 2, 4]);
        let cpu = Cpu::new();
        layer_norm_rope(&cpu, &batch, &x, &weight, &bias, 1.0, LAYOUT, &cos_sin, &mut cache).unwrap();
        let slot = batch.slot_mapping[0] as usize;
        let row = &read(&cache)[slot * 4..][..4];
        assert_close(row, &[-(1.0 - 0.5 / 1.5), -1.0, 2.0 * 0.5 / 1.5, 3.0], 1e-15);
    }

    #[test]
    fn writes_the_slots_of_its_tokens_alone() {
        let batch = batch(3, 8, &[(4, 3), (0, 2)], 7);
        let x = tensor::<f32>(DType::Act, &[5, 8], &randoms(1, 40));
        let weight = tensor(DType::Float, &[8], &randoms(2, 8));
        let bias = tensor(DType::Float, &[8], &randoms(3, 8));
        let cos_sin = tensor(DType::Float, &[5, 2, 2], &randoms(4, 20));
        let mut cache = poisoned(DType::Act, &[8, 3, 8]);
        let cpu = Cpu::new();
        layer_norm_rope(&cpu, &batch, &x, &weight, &bias, 1e-6, LAYOUT, &cos_sin, &mut cache).unwrap();
        for (slot, row) in read(&cache).chunks(8).enumerate() {
            let written = batch.slot_mapping.contains(&(slot as i64));
            assert!(row.iter().all(|x| x.is_nan() != written), "slot {slot}: {row:?}");
        }
    }

    #[test]
    fn rounds_after_the_norm_and_after_the_rotation() {
        let batch = batch(1, 1, &[(0, 1)], 0);
        let (weight, bias) = (randoms(2, 4), randoms(3, 4));
        let x = tensor::<f64>(DType::Act, &[1, 4], &[0.1, -0.7, 0.9, 0.3]);
        let (weight, bias) = (tensor(DType::Float, &[4], &weight), tensor(DType::Float, &[4], &bias));
        let run = |cpu: Cpu<f64>, cos_sin: &[f64]| {
            let cos_sin = tensor(DType::Float, &[1, 2, 2], cos_sin);
            let mut cache = poisoned(DType::Act, &[1, 1, 4]);
            layer_norm_rope(&cpu, &batch, &x, &weight, &bias, 1e-6, LAYOUT, &cos_sin, &mut cache).unwrap();
            read(&cache)
        };
        let normed: Vec<f64> =
            run(Cpu::new(), &[1.0, 0.0, 1.0, 0.0]).iter().map(|x| x.round_bf16()).collect();
        let (cos, sin) = (0.6, 0.8);
        let expected = [
            (normed[0] * cos - normed[1] * sin).round_bf16(),
            (normed[1] * cos + normed[0] * sin).round_bf16(),
            normed[2],
            normed[3],
        ];
        assert_eq!(run(Cpu::rounding_to_bf16(), &[cos, sin, 1.0, 0.0]), expected);
    }

    #[test]
    fn bad_slots_pages_and_shapes_are_errors_and_nothing_is_written() {
        let good = batch(2, 4, &[(0, 3)], 0);
        let x = tensor::<f32>(DType::Act, &[3, 4], &randoms(1, 12));
        let weight = tensor(DType::Float, &[4], &[1.0; 4]);
        let cos_sin = tensor(DType::Float, &[3, 1, 2], &[1.0; 6]);
        let mut cache = poisoned(DType::Act, &[4, 2, 4]);
        let cpu = Cpu::new();
        for slot in [-1, 8, i64::MAX] {
            let mut bad = good.clone();
            bad.slot_mapping[2] = slot;
            let result =
                layer_norm_rope(&cpu, &bad, &x, &weight, &weight, 1e-6, LAYOUT, &cos_sin, &mut cache);
            let text = message(result);
            assert!(text.contains("layer_norm_rope: `slot_mapping`") && text.contains("below 8"), "{text}");
        }
        assert!(read(&cache).iter().all(|x| x.is_nan()));
        let mut narrow = poisoned(DType::Act, &[4, 2, 3]);
        let result = layer_norm_rope(&cpu, &good, &x, &weight, &weight, 1e-6, LAYOUT, &cos_sin, &mut narrow);
        assert!(message(result).contains("`cache`"));
        let mut other_pages = poisoned(DType::Act, &[2, 4, 4]);
        let result =
            layer_norm_rope(&cpu, &good, &x, &weight, &weight, 1e-6, LAYOUT, &cos_sin, &mut other_pages);
        assert!(message(result).contains("[pages, 2, 4]"));
        let wide = tensor(DType::Float, &[3, 3, 2], &[1.0; 18]);
        let result = layer_norm_rope(&cpu, &good, &x, &weight, &weight, 1e-6, LAYOUT, &wide, &mut cache);
        assert!(message(result).contains("`cos_sin`"));
    }
}
