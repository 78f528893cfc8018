//! `absorb_query` and `absorb_output`: MLA's key and value up-projections, moved from the cache to the query
//! and the output.

use multiversion::multiversion;

use super::checks::Check;
use super::parallel::for_rows;
use super::rope::{rotary_dim, rotate};
use super::tensor::Storage;
use super::vector::{add_rows, dot};
use super::{Cpu, CpuTensor, Real};
use crate::error::{Error, Result};
use crate::kernels::RopeLayout;
use crate::tensor::DeviceTensor;

/// Calls `$body` with the elements of `$kv_b` as `$weights` and their exact conversion to `F` as `$widen`:
/// the weight stays in the checkpoint's type and is widened where it is multiplied.
macro_rules! with_weights {
    ($check:expr, $kv_b:expr, |$weights:ident, $widen:ident| $body:expr) => {
        match &$kv_b.storage {
            Storage::Bf16($weights) => {
                let $widen = F::of_bf16;
                $body
            }
            Storage::F16($weights) => {
                let $widen = F::of_f16;
                $body
            }
            Storage::F32($weights) => {
                let $widen = F::of_f32;
                $body
            }
            Storage::Real(..) | Storage::Index(_) | Storage::Fp8(_) => {
                return Err(Error::DType {
                    kernel: $check.0,
                    tensor: "kv_b",
                    expected: "dense weights",
                    found: $kv_b.dtype(),
                });
            }
        }
    };
}

pub(super) fn absorb_query<F: Real>(
    cpu: &Cpu<F>,
    q: &CpuTensor<F>,
    kv_b: &CpuTensor<F>,
    cos_sin: &CpuTensor<F>,
    out: &mut CpuTensor<F>,
) -> Result<()> {
    let check = Check("absorb_query");
    let [tokens, heads, q_width] = q.dims(check.0, "q")?;
    let [kv_heads, rows, rank] = kv_b.dims(check.0, "kv_b")?;
    let [out_tokens, out_heads, width] = out.dims(check.0, "out")?;
    check.shape("kv_b", kv_b, kv_heads == heads, || format!("[{heads}, nope + v, kv_lora_rank]"))?;
    let rope = rotary_dim(check, cos_sin, tokens)?;
    check.shape("out", out, (out_tokens, out_heads, width) == (tokens, heads, rank + rope), || {
        format!("[{tokens}, {heads}, {rank} + {rope}]")
    })?;
    check.shape("q", q, rope <= q_width && q_width - rope <= rows, || {
        format!("[T, H, nope + {rope}] with nope at most the {rows} rows of a head of `kv_b`")
    })?;
    let nope = q_width - rope;
    let q = check.act("q", q)?;
    let cos_sin = check.float("cos_sin", cos_sin)?;
    let out = check.act_mut("out", out)?;
    with_weights!(check, kv_b, |weights, widen| {
        for_rows(out, width, tokens * heads * nope * rank, |i, out| {
            let (q_nope, q_rope) = q[i * q_width..][..q_width].split_at(nope);
            let head = &weights[(i % heads) * rows * rank..][..rows * rank];
            let (latent, rotary) = out.split_at_mut(rank);
            combine(latent, q_nope, head, widen);
            latent.iter_mut().for_each(|x| *x = cpu.act(*x));
            rotary.copy_from_slice(q_rope);
            rotate(cpu, rotary, RopeLayout::Interleaved, &cos_sin[i / heads * rope..][..rope]);
        });
    });
    Ok(())
}

pub(super) fn absorb_output<F: Real>(
    cpu: &Cpu<F>,
    o: &CpuTensor<F>,
    kv_b: &CpuTensor<F>,
    out: &mut CpuTensor<F>,
) -> Result<()> {
    let check = Check("absorb_output");
    let [tokens, heads, rank] = o.dims(check.0, "o")?;
    let [kv_heads, rows, kv_rank] = kv_b.dims(check.0, "kv_b")?;
    let [out_tokens, out_heads, v] = out.dims(check.0, "out")?;
    check.shape("kv_b", kv_b, (kv_heads, kv_rank) == (heads, rank), || {
        format!("[{heads}, nope + v, {rank}]")
    })?;
    check.shape("out", out, (out_tokens, out_heads) == (tokens, heads) && v <= rows, || {
        format!("[{tokens}, {heads}, v] with v at most the {rows} rows of a head of `kv_b`")
    })?;
    let nope = rows - v;
    let o = check.act("o", o)?;
    let out = check.act_mut("out", out)?;
    with_weights!(check, kv_b, |weights, widen| {
        for_rows(out, v, tokens * heads * v * rank, |i, out| {
            let o = &o[i * rank..][..rank];
            let head = &weights[((i % heads) * rows + nope) * rank..][..v * rank];
            project(out, o, head, widen);
            out.iter_mut().for_each(|x| *x = cpu.act(*x));
        });
    });
    Ok(())
}

/// `out = sum_n a[n] * rows[n]`; `rows` has at least as many rows, each as long as `out`.
#[multiversion(targets("x86_64+avx2"))]
fn combine<F: Real, W: Copy>(out: &mut [F], a: &[F], rows: &[W], widen: impl Fn(W) -> F) {
    let width = out.len();
    out.fill(F::zero());
    add_rows(out, a, |n| &rows[n * width..][..width], widen);
}

/// `out[j] = rows[j] . x`, each row as long as `x`.
#[multiversion(targets("x86_64+avx2"))]
fn project<F: Real, W: Copy>(out: &mut [F], x: &[F], rows: &[W], widen: impl Fn(W) -> F) {
    let width = x.len();
    for (j, out) in out.iter_mut().enumerate() {
        *out = dot(x, &rows[j * width..][..width], &widen);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{
        assert_close, bf16_weight, message, on_one_and_four_threads, poisoned, randoms, read, tensor,
    };
    use crate::kernels::Kernels;
    use crate::tensor::{DType, HostTensor};

    #[test]
    fn by_hand() {
        // One head, nope 2, v 1, latent 2: K = [[1, 2], [3, 4]], V = [[5, 6]].
        let kv_b = HostTensor::f32([1, 3, 2], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let cpu = Cpu::<f64>::new();
        let kv_b = cpu.upload(kv_b).unwrap();
        let q = tensor(DType::Act, &[1, 1, 4], &[10.0, 1.0, 7.0, -3.0]);
        // The rotary columns make a quarter turn.
        let cos_sin = tensor(DType::Float, &[1, 1, 2], &[0.0, 1.0]);
        let mut out = poisoned(DType::Act, &[1, 1, 4]);
        absorb_query(&cpu, &q, &kv_b, &cos_sin, &mut out).unwrap();
        assert_eq!(read(&out), [13.0, 24.0, 3.0, 7.0]);
        let o = tensor(DType::Act, &[1, 1, 2], &[2.0, -1.0]);
        let mut out = poisoned(DType::Act, &[1, 1, 1]);
        absorb_output(&cpu, &o, &kv_b, &mut out).unwrap();
        assert_eq!(read(&out), [4.0]);
    }

    #[test]
    fn matches_plain_loops_for_every_weight_type() {
        let (tokens, heads, nope, v, rope, rank) = (3, 2, 7, 5, 4, 19);
        let cpu = Cpu::<f64>::new();
        let (kv_b, weights) = bf16_weight(1, &[heads, nope + v, rank]);
        let exact: Vec<f32> = weights.iter().map(|&x| x as f32).collect();
        let f16 = exact.iter().map(|&x| half::f16::from_f32(x)).collect::<Vec<_>>();
        let f16_values: Vec<f64> = f16.iter().map(|x| x.to_f64()).collect();
        let shape = vec![heads, nope + v, rank];
        let f16 = HostTensor { shape: shape.clone(), data: crate::tensor::HostData::F16(f16.into()) };
        let f32 = HostTensor::f32(shape, exact);
        let q = randoms(2, tokens * heads * (nope + rope));
        let o = randoms(3, tokens * heads * rank);
        let q_tensor = tensor(DType::Act, &[tokens, heads, nope + rope], &q);
        let o_tensor = tensor(DType::Act, &[tokens, heads, rank], &o);
        let turns = randoms(4, tokens * rope);
        let cos_sin = tensor(DType::Float, &[tokens, rope / 2, 2], &turns);
        for (kv_b, w) in
            [(kv_b, &weights), (cpu.upload(f16).unwrap(), &f16_values), (cpu.upload(f32).unwrap(), &weights)]
        {
            let (mut expected_q, mut expected_o) = (Vec::new(), Vec::new());
            for i in 0..tokens * heads {
                let w = &w[(i % heads) * (nope + v) * rank..][..(nope + v) * rank];
                for c in 0..rank {
                    expected_q.push((0..nope).map(|n| q[i * (nope + rope) + n] * w[n * rank + c]).sum());
                }
                let pairs = q[i * (nope + rope) + nope..][..rope].chunks(2);
                for (pair, turn) in pairs.zip(turns[i / heads * rope..].chunks(2)) {
                    expected_q.push(pair[0] * turn[0] - pair[1] * turn[1]);
                    expected_q.push(pair[1] * turn[0] + pair[0] * turn[1]);
                }
                for j in nope..nope + v {
                    expected_o.push((0..rank).map(|c| o[i * rank + c] * w[j * rank + c]).sum());
                }
            }
            let mut out = poisoned(DType::Act, &[tokens, heads, rank + rope]);
            absorb_query(&cpu, &q_tensor, &kv_b, &cos_sin, &mut out).unwrap();
            assert_close(&read(&out), &expected_q, 1e-13);
            let mut out = poisoned(DType::Act, &[tokens, heads, v]);
            absorb_output(&cpu, &o_tensor, &kv_b, &mut out).unwrap();
            assert_close(&read(&out), &expected_o, 1e-13);
        }
    }

    #[test]
    fn bits_depend_on_neither_neighbours_nor_threads() {
        // Enough work to reach the pool.
        let (tokens, heads, nope, v, rope, rank) = (9, 3, 64, 48, 8, 256);
        let (kv_b, _) = bf16_weight::<f32>(1, &[heads, nope + v, rank]);
        let q = randoms(2, tokens * heads * (nope + rope));
        let run = |tokens: usize, q: &[f64]| {
            let cpu = Cpu::new();
            let q = tensor(DType::Act, &[tokens, heads, nope + rope], q);
            let cos_sin = tensor(DType::Float, &[tokens, rope / 2, 2], &vec![0.5; tokens * rope]);
            let mut latent = poisoned(DType::Act, &[tokens, heads, rank + rope]);
            absorb_query(&cpu, &q, &kv_b, &cos_sin, &mut latent).unwrap();
            let o: Vec<f64> =
                read(&latent).chunks(rank + rope).flat_map(|row| row[..rank].to_vec()).collect();
            let o = tensor(DType::Act, &[tokens, heads, rank], &o);
            let mut out = poisoned(DType::Act, &[tokens, heads, v]);
            absorb_output(&cpu, &o, &kv_b, &mut out).unwrap();
            read(&out)
        };
        let [one, four] = on_one_and_four_threads(|| run(tokens, &q));
        assert_eq!(one, four);
        for t in 0..tokens {
            let width = heads * (nope + rope);
            assert_eq!(run(1, &q[t * width..][..width]), one[t * heads * v..][..heads * v]);
        }
    }

    #[test]
    fn rounds_once_at_the_end() {
        let (kv_b, _) = bf16_weight::<f64>(1, &[1, 12, 16]);
        let q = tensor(DType::Act, &[1, 1, 12], &randoms(2, 12));
        let o = tensor(DType::Act, &[1, 1, 16], &randoms(3, 16));
        let cos_sin = tensor(DType::Float, &[1, 2, 2], &randoms(4, 4));
        let run = |cpu: Cpu<f64>| {
            let mut query = poisoned(DType::Act, &[1, 1, 20]);
            absorb_query(&cpu, &q, &kv_b, &cos_sin, &mut query).unwrap();
            let mut output = poisoned(DType::Act, &[1, 1, 4]);
            absorb_output(&cpu, &o, &kv_b, &mut output).unwrap();
            [read(&query), read(&output)].concat()
        };
        let expected: Vec<f64> = run(Cpu::new()).iter().map(|x| x.round_bf16()).collect();
        assert_eq!(run(Cpu::rounding_to_bf16()), expected);
    }

    #[test]
    fn rotary_columns_are_those_of_rope() {
        let (tokens, heads, nope, rope, rank) = (3, 2, 5, 6, 7);
        let (kv_b, _) = bf16_weight::<f32>(1, &[heads, nope + 1, rank]);
        let mut q = tensor(DType::Act, &[tokens, heads, nope + rope], &randoms(2, 66));
        let cos_sin = tensor(DType::Float, &[tokens, rope / 2, 2], &randoms(3, tokens * rope));
        for cpu in [Cpu::new(), Cpu::rounding_to_bf16()] {
            let mut out = poisoned(DType::Act, &[tokens, heads, rank + rope]);
            absorb_query(&cpu, &q, &kv_b, &cos_sin, &mut out).unwrap();
            cpu.rope(&mut q, nope, RopeLayout::Interleaved, &cos_sin).unwrap();
            let (out, q) = (read(&out), read(&q));
            let rotary = |row: &[f64]| row[row.len() - rope..].to_vec();
            let found: Vec<f64> = out.chunks(rank + rope).flat_map(rotary).collect();
            assert_eq!(found, q.chunks(nope + rope).flat_map(rotary).collect::<Vec<_>>());
        }
    }

    #[test]
    fn misfits_are_named() {
        let cpu = Cpu::<f32>::new();
        let (kv_b, _) = bf16_weight(1, &[2, 6, 8]);
        let q = tensor(DType::Act, &[1, 2, 6], &[0.0; 12]);
        let turns = |pairs: usize| tensor(DType::Float, &[1, pairs, 2], &vec![0.0; 2 * pairs]);
        let mut out = poisoned(DType::Act, &[1, 2, 7]);
        assert!(message(absorb_query(&cpu, &q, &kv_b, &turns(1), &mut out)).contains("absorb_query: `out`"));
        let mut out = poisoned(DType::Act, &[1, 2, 20]);
        assert!(message(absorb_query(&cpu, &q, &kv_b, &turns(6), &mut out)).contains("absorb_query: `q`"));
        let act = tensor(DType::Act, &[2, 6, 8], &[0.0; 96]);
        let mut out = poisoned(DType::Act, &[1, 2, 10]);
        assert!(
            message(absorb_query(&cpu, &q, &act, &turns(1), &mut out)).contains("`kv_b` holds activations")
        );
        assert!(message(absorb_query(&cpu, &q, &kv_b, &out.clone(), &mut out)).contains("`cos_sin`"));
        let o = tensor(DType::Act, &[1, 2, 8], &[0.0; 16]);
        let mut out = poisoned(DType::Act, &[1, 2, 7]);
        assert!(message(absorb_output(&cpu, &o, &kv_b, &mut out)).contains("absorb_output: `out`"));
        let o = tensor(DType::Act, &[1, 2, 9], &[0.0; 18]);
        assert!(message(absorb_output(&cpu, &o, &kv_b, &mut out)).contains("absorb_output: `kv_b`"));
    }
}
