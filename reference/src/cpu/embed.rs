//! `embed`: token rows of a vocabulary shard.
//!
//! `table` `[V_local, hidden]` bf16, f16 or f32; `out` `[T, hidden]` `Act`, rounded (which changes nothing of a
//! bf16 table), or `Float`, not rounded. A token outside `vocab_start..vocab_start + V_local` gives zeros.

use super::checks::Check;
use super::matmul::Element;
use super::parallel::for_rows;
use super::tensor::Storage;
use super::{Cpu, CpuBatch, CpuTensor, Real};
use crate::error::Result;
use crate::tensor::{DType, DeviceTensor};

pub(super) fn embed<F: Real>(
    cpu: &Cpu<F>,
    batch: &CpuBatch,
    table: &CpuTensor<F>,
    vocab_start: usize,
    out: &mut CpuTensor<F>,
) -> Result<()> {
    let [vocab, hidden] = table.dims("embed", "table")?;
    out.expect_shape("embed", "out", &[batch.num_tokens(), hidden])?;
    let rounds = out.dtype() == DType::Act;
    let check = Check("embed");
    let out = if rounds { check.act_mut("out", out)? } else { check.float_mut("out", out)? };
    let finish = |value| if rounds { cpu.act(value) } else { value };
    let row_of =
        |token: i32| usize::try_from(token).ok()?.checked_sub(vocab_start).filter(|&row| row < vocab);
    match &table.storage {
        Storage::Bf16(table) => copy_rows(finish, table, &batch.token_ids, row_of, hidden, out),
        Storage::F16(table) => copy_rows(finish, table, &batch.token_ids, row_of, hidden, out),
        Storage::F32(table) => copy_rows(finish, table, &batch.token_ids, row_of, hidden, out),
        _ => return Err(table.wrong_dtype("embed", "table", "a weight (bf16, f16 or f32)")),
    }
    Ok(())
}

fn copy_rows<F: Real, E: Element>(
    finish: impl Fn(F) -> F + Sync,
    table: &[E],
    token_ids: &[i32],
    row_of: impl Fn(i32) -> Option<usize> + Sync,
    hidden: usize,
    out: &mut [F],
) {
    for_rows(out, hidden, token_ids.len() * hidden, |t, out| match row_of(token_ids[t]) {
        None => out.fill(F::zero()),
        Some(row) => {
            for (out, element) in out.iter_mut().zip(&table[row * hidden..]) {
                *out = finish(element.widen());
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{Batch, SequenceSlice};
    use crate::cpu::testing::{read, tensor};
    use crate::kernels::Kernels;
    use crate::tensor::HostTensor;

    fn batch(cpu: &Cpu<f32>, token_ids: &[u32]) -> CpuBatch {
        let mut device = cpu.alloc_batch(8, 1, 8).unwrap();
        let slice = SequenceSlice { token_ids, computed_len: 0, pages: &[0] };
        cpu.upload_batch(&Batch::new(8, &[slice]).unwrap(), &mut device).unwrap();
        device
    }

    #[test]
    fn shards_add_up_to_the_embedding() {
        let cpu = Cpu::<f32>::new();
        let batch = batch(&cpu, &[3, 0, 2, u32::MAX]);
        let rows: Vec<f32> = (0..8).map(|x| x as f32).collect();
        let mut parts = Vec::new();
        for start in [0, 2] {
            let table = cpu.upload(HostTensor::f32([2, 2], rows[2 * start..2 * start + 4].to_vec())).unwrap();
            let mut out = tensor(DType::Act, &[4, 2], &[f64::NAN; 8]);
            embed(&cpu, &batch, &table, start, &mut out).unwrap();
            parts.push(read(&out));
        }
        assert_eq!(parts[0], [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(parts[1], [6.0, 7.0, 0.0, 0.0, 4.0, 5.0, 0.0, 0.0]);
    }

    #[test]
    fn rounds_an_f32_table_when_asked_to() {
        let value = 1.0 + 1.0 / 1024.0;
        for (cpu, expected) in [(Cpu::new(), f64::from(value)), (Cpu::rounding_to_bf16(), 1.0)] {
            let table = cpu.upload(HostTensor::f32([1, 1], vec![value])).unwrap();
            let mut out = tensor(DType::Act, &[1, 1], &[f64::NAN]);
            embed(&cpu, &batch(&cpu, &[0]), &table, 0, &mut out).unwrap();
            assert_eq!(read(&out), [expected]);
        }
    }

    #[test]
    fn refuses_an_output_of_another_width_and_a_table_of_activations() {
        let cpu = Cpu::<f32>::new();
        let table = cpu.upload(HostTensor::f32([2, 2], vec![0.0; 4])).unwrap();
        let error = embed(&cpu, &batch(&cpu, &[0]), &table, 0, &mut tensor(DType::Act, &[1, 3], &[0.0; 3]))
            .unwrap_err();
        assert_eq!(error.to_string(), "embed: `out` has shape [1, 3], expected [1, 2]");
        let table = tensor(DType::Act, &[2, 2], &[0.0; 4]);
        let error = embed(&cpu, &batch(&cpu, &[0]), &table, 0, &mut tensor(DType::Act, &[1, 2], &[0.0; 2]))
            .unwrap_err();
        assert!(error.to_string().contains("`table` holds activations"), "{error}");
    }
}
