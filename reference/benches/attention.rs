//! Multiply-adds a second of the oracle's attention kernels, f32:
//! `cargo bench -p dsa80-reference --bench attention`. `RAYON_NUM_THREADS=1` gives one core's.

use divan::{Bencher, counter::ItemsCount};
use dsa80_reference::cpu::{Cpu, CpuBatch, CpuTensor};
use dsa80_reference::{Batch, DType, HostTensor, Kernels, SequenceSlice};
use half::bf16;

const PAGE_SIZE: usize = 64;

/// One sequence: `tokens` new ones at the end of `context`.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    context: usize,
    tokens: usize,
    heads: usize,
    kv_lora_rank: usize,
    rope: usize,
    nope: usize,
    v: usize,
    index_heads: usize,
    index_head_dim: usize,
    index_topk: usize,
}

/// GLM-5.2's dimensions, and a model small enough for a laptop.
const GLM: Case = Case {
    name: "GLM-5.2",
    context: 4096,
    tokens: 1,
    heads: 64,
    kv_lora_rank: 512,
    rope: 64,
    nope: 192,
    v: 256,
    index_heads: 32,
    index_head_dim: 128,
    index_topk: 2048,
};
const SMALL: Case = Case {
    name: "small",
    context: 512,
    tokens: 1,
    heads: 4,
    kv_lora_rank: 64,
    rope: 16,
    nope: 32,
    v: 32,
    index_heads: 16,
    index_head_dim: 32,
    index_topk: 64,
};
const CASES: [Case; 4] = [SMALL, Case { tokens: 64, ..SMALL }, GLM, Case { tokens: 16, ..GLM }];

fn main() {
    divan::main();
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, {} tokens at {}", self.name, self.tokens, self.context)
    }
}

fn batch(cpu: &Cpu<f32>, case: Case) -> CpuBatch {
    let pages: Vec<u32> = (0..case.context.div_ceil(PAGE_SIZE) as u32).rev().collect();
    let token_ids = vec![0; case.tokens];
    let slice =
        SequenceSlice { token_ids: &token_ids, computed_len: case.context - case.tokens, pages: &pages };
    let mut batch = cpu.alloc_batch(case.tokens, 1, pages.len()).expect("memory");
    let host = Batch::new(PAGE_SIZE, &[slice]).expect("there are enough pages");
    cpu.upload_batch(&host, &mut batch).expect("it was allocated for this");
    batch
}

fn tensor(cpu: &Cpu<f32>, dtype: DType, shape: &[usize]) -> CpuTensor<f32> {
    let mut tensor = cpu.alloc(dtype, shape).expect("memory");
    let values: Vec<f64> = (0..shape.iter().product()).map(|i: usize| (i as f64 * 0.37).sin()).collect();
    cpu.write(&values, &mut tensor).expect("as many values as elements");
    tensor
}

fn cache(cpu: &Cpu<f32>, case: Case, width: usize) -> CpuTensor<f32> {
    tensor(cpu, DType::Act, &[case.context.div_ceil(PAGE_SIZE), PAGE_SIZE, width])
}

#[divan::bench(args = CASES)]
fn indexer_logits(bencher: Bencher<'_, '_>, case: Case) {
    let cpu = Cpu::new();
    let Case { context, tokens, index_heads: heads, index_head_dim: width, .. } = case;
    let (batch, cache) = (batch(&cpu, case), cache(&cpu, case, width));
    let q = tensor(&cpu, DType::Act, &[tokens, heads, width]);
    let weights = tensor(&cpu, DType::Float, &[tokens, heads]);
    let mut logits = cpu.alloc(DType::Float, &[tokens, context]).expect("memory");
    bencher.counter(ItemsCount::new(tokens * context * heads * width)).bench_local(|| {
        cpu.indexer_logits(&batch, 0..tokens, &q, &weights, &cache, 0.1, &mut logits).expect("shapes agree");
    });
}

#[divan::bench(args = CASES)]
fn top_k(bencher: Bencher<'_, '_>, case: Case) {
    let cpu = Cpu::new();
    let Case { context, tokens, index_topk, .. } = case;
    let batch = batch(&cpu, case);
    let logits = tensor(&cpu, DType::Float, &[tokens, context]);
    let mut indices = cpu.alloc(DType::Index, &[tokens, index_topk]).expect("memory");
    bencher.counter(ItemsCount::new(tokens * context)).bench_local(|| {
        cpu.top_k(&batch, 0..tokens, &logits, &mut indices).expect("shapes agree");
    });
}

#[divan::bench(args = CASES)]
fn sparse_mla(bencher: Bencher<'_, '_>, case: Case) {
    let cpu = Cpu::new();
    let Case { tokens, heads, kv_lora_rank, rope, index_topk: k, .. } = case;
    let (batch, cache) = (batch(&cpu, case), cache(&cpu, case, kv_lora_rank + rope));
    let q = tensor(&cpu, DType::Act, &[tokens, heads, kv_lora_rank + rope]);
    let mut indices = cpu.alloc(DType::Index, &[tokens, k]).expect("memory");
    let every_other: Vec<i32> =
        (0..tokens * k).map(|i| (i % k * 2 % (case.context - tokens)) as i32).collect();
    cpu.write_index(&every_other, &mut indices).expect("as many values as elements");
    let mut out = cpu.alloc(DType::Act, &[tokens, heads, kv_lora_rank]).expect("memory");
    bencher.counter(ItemsCount::new(tokens * k * heads * (2 * kv_lora_rank + rope))).bench_local(|| {
        cpu.sparse_mla(&batch, &q, &cache, &indices, 0.1, &mut out).expect("shapes agree");
    });
}

#[divan::bench(args = CASES)]
fn absorb(bencher: Bencher<'_, '_>, case: Case) {
    let cpu = Cpu::new();
    let Case { tokens, heads, kv_lora_rank: rank, rope, nope, v, .. } = case;
    let data = (0..heads * (nope + v) * rank).map(|i| bf16::from_f32((i as f32 * 0.11).cos())).collect();
    let kv_b = cpu.upload(HostTensor::bf16([heads, nope + v, rank], data)).expect("memory");
    let q = tensor(&cpu, DType::Act, &[tokens, heads, nope + rope]);
    let o = tensor(&cpu, DType::Act, &[tokens, heads, rank]);
    let cos_sin = tensor(&cpu, DType::Float, &[tokens, rope / 2, 2]);
    let mut latent = cpu.alloc(DType::Act, &[tokens, heads, rank + rope]).expect("memory");
    let mut out = cpu.alloc(DType::Act, &[tokens, heads, v]).expect("memory");
    bencher.counter(ItemsCount::new(tokens * heads * (nope + v) * rank)).bench_local(|| {
        cpu.absorb_query(&q, &kv_b, &cos_sin, &mut latent).expect("shapes agree");
        cpu.absorb_output(&o, &kv_b, &mut out).expect("shapes agree");
    });
}
