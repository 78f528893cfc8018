//! Times of WGSL kernels at GLM-5.2's shapes of one rank of eight, beside a copy's: `cargo run --release -p dsa80-reference --features wgpu
//! --example wgpu_bench [PART OF THE ADAPTER'S NAME]`.
//!
//! A launch's time is that of as many as the backend submits at once, from their submission to their end.

#![expect(clippy::print_stdout, reason = "what it measures is what it is for")]

use std::time::Instant;

use dsa80_reference::wgpu::{Wgpu, WgpuOptions, WgpuTensor};
use dsa80_reference::{
    Batch, DType, HostExpert, HostInt4, HostLinear, HostTensor, Kernels, Result, SequenceSlice,
};
use half::bf16;

/// Launches that the backend submits at once.
const LAUNCHES: usize = 256;

const PAGE: usize = 64;
const HIDDEN: usize = 6144;
const RANK: usize = 512;
const ROPE: usize = 64;
const HEADS: usize = 8;
const TOP_K: usize = 2048;

/// Runs of a line, of which the best counts.
const RUNS: usize = 3;

struct Bench {
    wgpu: Wgpu,
    copy: f64,
}

impl Bench {
    /// Seconds of a call of `work`, which makes so many launches.
    fn seconds(&self, launches: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
        let last = self.wgpu.alloc(DType::Index, &[1])?;
        let mut best = f64::INFINITY;
        for _ in 0..RUNS {
            work()?;
            self.wgpu.read_index(&last)?;
            for _ in 0..LAUNCHES / launches {
                work()?;
            }
            let submitted = Instant::now();
            self.wgpu.read_index(&last)?;
            best = best.min(submitted.elapsed().as_secs_f64() / (LAUNCHES / launches) as f64);
        }
        Ok(best)
    }

    fn line(&self, name: &str, bytes: f64, launches: usize, work: impl FnMut() -> Result<()>) -> Result<()> {
        let seconds = self.seconds(launches, work)?;
        let rate = bytes / seconds;
        println!(
            "{name:44} {:10.1} us {:8.1} GB/s {:5.0} % of a copy",
            1e6 * seconds,
            1e-9 * rate,
            100.0 * rate / self.copy
        );
        Ok(())
    }

    fn act(&self, shape: &[usize]) -> Result<WgpuTensor> {
        self.filled(DType::Act, shape)
    }

    /// Numbers that repeat: what a kernel takes of them is the same as of others.
    fn filled(&self, dtype: DType, shape: &[usize]) -> Result<WgpuTensor> {
        let mut tensor = self.wgpu.alloc(dtype, shape)?;
        let number = |i: usize| ((i * 7919) % 1009) as f64 / 1009.0 - 0.5;
        self.wgpu.write(&(0..shape.iter().product()).map(number).collect::<Vec<_>>(), &mut tensor)?;
        Ok(tensor)
    }

    fn cache(&self, fp8: bool, pages: usize, act: usize, bytes: usize) -> Result<WgpuTensor> {
        if !fp8 {
            return self.act(&[pages, PAGE, act]);
        }
        let mut cache = self.wgpu.alloc(DType::Fp8, &[pages, PAGE, bytes])?;
        self.wgpu.write_bytes(&vec![0x30; pages * PAGE * bytes], &mut cache)?;
        Ok(cache)
    }

    /// `seqs` sequences of `new` tokens at the end of `context`, whose pages lie far from each other, among so many.
    fn batch(
        &self,
        seqs: usize,
        context: usize,
        new: usize,
        pages: usize,
    ) -> Result<<Wgpu as Kernels>::Batch> {
        let blocks = context.div_ceil(PAGE);
        let tables: Vec<Vec<u32>> = (0..seqs)
            .map(|s| (0..blocks).map(|b| ((s * blocks + b) * 977 % pages) as u32).collect())
            .collect();
        let token_ids = vec![0; new];
        let slices: Vec<_> = tables
            .iter()
            .map(|pages| SequenceSlice { token_ids: &token_ids, computed_len: context - new, pages })
            .collect();
        let host = Batch::new(PAGE, &slices)?;
        let mut batch = self.wgpu.alloc_batch(seqs * new, seqs, blocks)?;
        self.wgpu.upload_batch(&host, &mut batch)?;
        Ok(batch)
    }

    fn sparse_mla(&self, seqs: usize, new: usize, fp8: bool) -> Result<()> {
        let (context, pages, tokens) = (8192, 4096, seqs * new);
        let batch = self.batch(seqs, context, new, pages)?;
        let cache = self.cache(fp8, pages, RANK + ROPE, 656)?;
        let q = self.act(&[tokens, HEADS, RANK + ROPE])?;
        let mut topk_indices = self.wgpu.alloc(DType::Index, &[tokens, TOP_K])?;
        let positions =
            (0..tokens).flat_map(|t| (0..TOP_K).map(move |i| ((i * 3 + t) % (context - 600)) as i32));
        self.wgpu.write_index(&positions.collect::<Vec<_>>(), &mut topk_indices)?;
        let mut out = self.wgpu.alloc(DType::Act, &[tokens, HEADS, RANK])?;
        let row = if fp8 { 656 } else { 2 * (RANK + ROPE) };
        let name = format!("sparse_mla {seqs} x {new}, {}", if fp8 { "8 bits" } else { "bf16" });
        let bytes = (tokens * TOP_K * row) as f64;
        let launches = if tokens < 1024 { 2 } else { 1 };
        self.line(&name, bytes, launches, || {
            self.wgpu.sparse_mla(&batch, &q, &cache, &topk_indices, 0.05, &mut out)
        })
    }

    fn indexer(&self, seqs: usize, new: usize, context: usize, fp8: bool) -> Result<()> {
        let (pages, tokens) = (8192, seqs * new);
        let batch = self.batch(seqs, context, new, pages)?;
        let cache = self.cache(fp8, pages, 128, 132)?;
        let q = self.act(&[tokens, 32, 128])?;
        let weights = self.filled(DType::Float, &[tokens, 32])?;
        let mut logits = self.wgpu.alloc(DType::Float, &[tokens, context])?;
        let row = if fp8 { 132 } else { 256 };
        let name =
            format!("indexer_logits {seqs} x {new} of {context}, {}", if fp8 { "8 bits" } else { "bf16" });
        self.line(&name, (seqs * context * row) as f64, 1, || {
            self.wgpu.indexer_logits(&batch, 0..tokens, &q, &weights, &cache, 0.01, &mut logits)
        })?;
        let mut topk_indices = self.wgpu.alloc(DType::Index, &[tokens, TOP_K])?;
        let name = format!("top_k {seqs} x {new} of {context}");
        self.line(&name, (4 * tokens * context) as f64, 1, || {
            self.wgpu.top_k(&batch, 0..tokens, &logits, &mut topk_indices)
        })
    }

    fn moe_int4(&self, tokens: usize) -> Result<()> {
        let (experts, intermediate, top_k, group_size) = (64, 256, 8, 32);
        let weight = |out: usize, inner: usize| {
            let groups = inner / group_size;
            HostLinear::Int4(HostInt4 {
                out_features: out,
                in_features: inner,
                group_size,
                weight_packed: vec![0x7a5c_19e3; out * inner / 8].into(),
                scales: HostTensor::bf16([out, groups], vec![bf16::from_f32(0.01); out * groups]),
                zero_points: Some(vec![0x7777_7777; out.div_ceil(8) * groups].into()),
            })
        };
        let layer = (0..experts).map(|_| HostExpert {
            gate_proj: weight(intermediate, HIDDEN),
            up_proj: weight(intermediate, HIDDEN),
            down_proj: weight(HIDDEN, intermediate),
        });
        let layer = self.wgpu.upload_experts_int4(layer.collect())?;
        let x = self.act(&[tokens, HIDDEN])?;
        let mut topk_ids = self.wgpu.alloc(DType::Index, &[tokens, top_k])?;
        let ids: Vec<i32> = (0..tokens * top_k).map(|i| (i * 11 % experts) as i32).collect();
        self.wgpu.write_index(&ids, &mut topk_ids)?;
        let topk_weights = self.filled(DType::Float, &[tokens, top_k])?;
        let mut out = self.wgpu.alloc(DType::Act, &[tokens, HIDDEN])?;
        let bytes = (tokens * top_k).min(experts) * 3 * HIDDEN * intermediate * 5 / 8;
        self.line(&format!("moe_int4 {tokens} tokens, 8 of {experts}"), bytes as f64, 4, || {
            self.wgpu.moe_int4(&x, &topk_ids, &topk_weights, &layer, None, &mut out)
        })
    }
}

fn main() -> Result<()> {
    let options = WgpuOptions { adapter: std::env::args().nth(1), ..WgpuOptions::default() };
    let mut bench = Bench { wgpu: Wgpu::open(&options)?, copy: f64::NAN };
    println!("{}", bench.wgpu.context().name());
    // A kernel that does nothing but read two thirds and write one: larger than what caches keep.
    let (rows, columns) = (4096, 12288);
    let (gate, up) = (bench.act(&[rows, columns])?, bench.act(&[rows, columns])?);
    let mut out = bench.wgpu.alloc(DType::Act, &[rows, columns])?;
    let seconds = bench.seconds(1, || bench.wgpu.silu_mul(&gate, &up, &mut out))?;
    bench.copy = (6 * rows * columns) as f64 / seconds;
    println!("a copy (silu_mul): {:.1} GB/s", 1e-9 * bench.copy);
    for fp8 in [false, true] {
        bench.sparse_mla(1, 1, fp8)?;
        bench.sparse_mla(32, 1, fp8)?;
        bench.sparse_mla(1, 512, fp8)?;
        bench.indexer(32, 1, 16384, fp8)?;
        bench.indexer(1, 512, 16384, fp8)?;
    }
    for tokens in [1, 32, 512] {
        bench.moe_int4(tokens)?;
    }
    Ok(())
}
