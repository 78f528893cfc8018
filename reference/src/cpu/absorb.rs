//! `absorb_query` and `absorb_output`: MLA's key and value up-projections, moved from the cache to the query and the output.

use super::checks::Check;
use super::parallel::for_rows;
use super::tensor::Storage;
use super::vector::{add_rows, dot};
use super::{Cpu, CpuTensor, Real};
use crate::error::{Error, Result};
use crate::tensor::DeviceTensor;

/// Calls `$body` with the elements of `$kv_b` as `$weights` and their exact conversion to `F` as `$widen`: the weight stays in
/// the checkpoint's type and is widened where it is multiplied.
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
            Storage::Real(..) | Storage::Index(_) => {
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
    out: &mut CpuTensor<F>,
) -> Result<()> {
    let check = Check("absorb_query");
    let [tokens, heads, q_width] = q.dims(check.0, "q")?;
    let [kv_heads, rows, rank] = kv_b.dims(check.0, "kv_b")?;
    let [out_tokens, out_heads, width] = out.dims(check.0, "out")?;
    check.shape("kv_b", kv_b, kv_heads == heads, || format!("[{heads}, nope + v, kv_lora_rank]"))?;
    check.shape("out", out, (out_tokens, out_heads) == (tokens, heads) && width >= rank, || {
        format!("[{tokens}, {heads}, {rank} + rope]")
    })?;
    // The rotary columns pass through, so what `out` has beyond the latent tells where `q_nope` ends.
    let rope = width - rank;
    check.shape("q", q, rope <= q_width && q_width - rope <= rows, || {
        format!("[T, H, nope + {rope}] with nope at most the {rows} rows of a head of `kv_b`")
    })?;
    let nope = q_width - rope;
    let q = check.act("q", q)?;
    let out = check.act_mut("out", out)?;
    with_weights!(check, kv_b, |weights, widen| {
        for_rows(out, width, tokens * heads * nope * rank, |i, out| {
            let (q_nope, q_rope) = q[i * q_width..][..q_width].split_at(nope);
            let head = &weights[(i % heads) * rows * rank..][..rows * rank];
            let (latent, rotary) = out.split_at_mut(rank);
            latent.fill(F::zero());
            add_rows(latent, q_nope, |n| &head[n * rank..][..rank], widen);
            latent.iter_mut().for_each(|x| *x = cpu.act(*x));
            rotary.copy_from_slice(q_rope);
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
            for (j, out) in out.iter_mut().enumerate() {
                *out = cpu.act(dot(o, &head[j * rank..][..rank], widen));
            }
        });
    });
    Ok(())
}
