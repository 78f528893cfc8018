//! The kernels of attention as a step launches them: one after the other over one batch, and captured in a graph that is replayed for
//! longer contexts.

use dsa80_cuda::indexer_logits::{IndexerLogitsDims, IndexerLogitsTile, indexer_logits};
use dsa80_cuda::latent_rope::{LatentRopeDims, LatentRopeTile, latent_rope};
use dsa80_cuda::layer_norm_rope::{LayerNormRopeDims, LayerNormRopeTile, layer_norm_rope};
use dsa80_cuda::sparse_mla::{SparseMlaDims, SparseMlaTiles, SparseMlaWorkspace, sparse_mla};
use dsa80_cuda::top_k::{TopKRows, TopKTile, TopKWorkspace, top_k};
use dsa80_cuda::{CudaBatch, CudaTensor, Device, Tile};
use dsa80_reference::{Batch, DType, Kernels, Result, RopeLayout};
use dsa80_tests::parity::{self, BatchCase, Pair, TestDevice, Values};

const INDEX_HEADS: usize = 16;
const INDEX_DIM: usize = 32;
const ROPE: usize = 16;
const RANK: usize = 48;
const HEADS: usize = 8;
const K: usize = 24;
const PAGE_SIZE: usize = 16;
const MAX_BLOCKS: usize = 8;
const SCALE: f64 = 0.125;

/// Everything that a step reads and writes.
struct Step<'a> {
    device: &'a TestDevice,
    batch: CudaBatch<TestDevice>,
    index_k: Pair,
    kv_a: Pair,
    norm: Pair,
    latent_norm: Pair,
    cos_sin: Pair,
    index_q: Pair,
    index_weights: Pair,
    q: Pair,
    index_cache: CudaTensor<TestDevice>,
    mla_cache: CudaTensor<TestDevice>,
    logits: CudaTensor<TestDevice>,
    topk_indices: CudaTensor<TestDevice>,
    out: CudaTensor<TestDevice>,
    top_k: (TopKTile, TopKWorkspace<TestDevice>),
    sparse_mla: (SparseMlaTiles, SparseMlaWorkspace<TestDevice>),
}

impl<'a> Step<'a> {
    fn new(device: &'a TestDevice, batch: &Batch, pages: usize) -> Self {
        let tokens = batch.num_tokens();
        let pair = |name, seed, dtype, shape: &[usize]| {
            Pair::new(device, name, dtype, shape, &Values::Normal.take(seed, shape.iter().product()))
        };
        let cache = |name, seed, width| pair(name, seed, DType::Act, &[pages, PAGE_SIZE, width]).device;
        let dims = SparseMlaDims { kv_lora_rank: RANK, rope: ROPE };
        let (top_k, sparse_mla) = (TopKTile::safe(TopKRows::Few), SparseMlaTiles::safe(dims));
        let mut on_device = CudaBatch::alloc(device, tokens, batch.num_seqs(), MAX_BLOCKS).unwrap();
        on_device.upload(device, batch).unwrap();
        Self {
            device,
            batch: on_device,
            index_k: pair("index_k", 1, DType::Act, &[tokens, INDEX_DIM]),
            kv_a: pair("kv_a", 2, DType::Act, &[tokens, RANK + ROPE]),
            norm: Pair::weight(device, "norm", DType::F32, &[INDEX_DIM], &Values::Normal.take(3, INDEX_DIM)),
            latent_norm: Pair::weight(device, "norm", DType::F32, &[RANK], &Values::Normal.take(4, RANK)),
            cos_sin: pair("cos_sin", 5, DType::Float, &[tokens, ROPE / 2, 2]),
            index_q: pair("index_q", 6, DType::Act, &[tokens, INDEX_HEADS, INDEX_DIM]),
            index_weights: pair("index_weights", 7, DType::Float, &[tokens, INDEX_HEADS]),
            q: pair("q", 8, DType::Act, &[tokens, HEADS, RANK + ROPE]),
            index_cache: cache("index_cache", 9, INDEX_DIM),
            mla_cache: cache("mla_cache", 10, RANK + ROPE),
            logits: parity::poisoned(device, "logits", DType::Float, &[tokens, MAX_BLOCKS * PAGE_SIZE]),
            topk_indices: parity::poisoned(device, "topk_indices", DType::Index, &[tokens, K]),
            out: parity::poisoned(device, "out", DType::Act, &[tokens, HEADS, RANK]),
            top_k: (top_k, TopKWorkspace::alloc(device, &[top_k]).unwrap()),
            sparse_mla: (
                sparse_mla,
                SparseMlaWorkspace::alloc(device, &sparse_mla, dims, tokens, HEADS, K).unwrap(),
            ),
        }
    }

    fn launch(&mut self) -> Result<()> {
        let (device, batch) = (self.device, &self.batch);
        let rows = 0..batch.host().num_tokens();
        layer_norm_rope(
            device,
            &LayerNormRopeTile::safe(LayerNormRopeDims { width: INDEX_DIM, rope: ROPE }),
            batch,
            &self.index_k.device,
            &self.norm.device,
            &self.norm.device,
            1e-6,
            RopeLayout::Interleaved,
            &self.cos_sin.device,
            &mut self.index_cache,
        )?;
        latent_rope(
            device,
            &LatentRopeTile::safe(LatentRopeDims { kv_lora_rank: RANK, rope: ROPE }),
            batch,
            &self.kv_a.device,
            &self.latent_norm.device,
            1e-5,
            &self.cos_sin.device,
            &mut self.mla_cache,
        )?;
        indexer_logits(
            device,
            &IndexerLogitsTile::safe(IndexerLogitsDims { heads: INDEX_HEADS, dims: INDEX_DIM }),
            batch,
            rows.clone(),
            &self.index_q.device,
            &self.index_weights.device,
            &self.index_cache,
            SCALE,
            &mut self.logits,
        )?;
        top_k(device, &self.top_k.0, &self.top_k.1, batch, rows, &self.logits, &mut self.topk_indices)?;
        sparse_mla(
            device,
            &self.sparse_mla.0,
            &self.sparse_mla.1,
            batch,
            &self.q.device,
            &self.mla_cache,
            &self.topk_indices,
            SCALE,
            &mut self.out,
        )
    }

    /// The oracle's scores, selection and attention, each from what the device had before it.
    fn judge(&self, batch: &Batch) {
        let (device, oracle, tokens) = (self.device, parity::oracle(), batch.num_tokens());
        let (host_batch, _) = parity::batch(device, batch);
        let pages = self.mla_cache.len() / (PAGE_SIZE * (RANK + ROPE));
        let read = |name, dtype, shape: &[usize], tensor| {
            Pair::new(device, name, dtype, shape, &parity::read(device, tensor)).host
        };

        let index_cache = read("index_cache", DType::Act, &[pages, PAGE_SIZE, INDEX_DIM], &self.index_cache);
        let columns = MAX_BLOCKS * PAGE_SIZE;
        let mut logits = Pair::poisoned(device, "logits", DType::Float, &[tokens, columns]).host;
        let (q, weights) = (&self.index_q.host, &self.index_weights.host);
        oracle.indexer_logits(&host_batch, 0..tokens, q, weights, &index_cache, SCALE, &mut logits).unwrap();
        let (expected, found) = (oracle.read(&logits).unwrap(), parity::read(device, &self.logits));
        for t in 0..tokens {
            let visible = t * columns..t * columns + batch.visible(t);
            let largest = expected[visible.clone()].iter().fold(0.0_f64, |a, b| a.max(b.abs()));
            parity::assert_close(
                "logits",
                columns,
                &found[visible.clone()],
                &expected[visible],
                1e-6,
                |_| 1e-5 * largest,
            );
        }

        let mut indices = Pair::poisoned(device, "topk_indices", DType::Index, &[tokens, K]).host;
        let logits = read("logits", DType::Float, &[tokens, columns], &self.logits);
        oracle.top_k(&host_batch, 0..tokens, &logits, &mut indices).unwrap();
        let found = parity::read_index(device, &self.topk_indices);
        parity::assert_same("topk_indices", K, &found, &oracle.read_index(&indices).unwrap());

        let mla_cache = read("mla_cache", DType::Act, &[pages, PAGE_SIZE, RANK + ROPE], &self.mla_cache);
        let mut out = Pair::poisoned(device, "out", DType::Act, &[tokens, HEADS, RANK]).host;
        oracle.sparse_mla(&host_batch, &self.q.host, &mla_cache, &indices, SCALE, &mut out).unwrap();
        let (expected, found) = (oracle.read(&out).unwrap(), parity::read(device, &self.out));
        let largest = expected.iter().fold(0.0_f64, |a, b| a.max(b.abs()));
        parity::assert_close("out", RANK, &found, &expected, 2.5e-3, |_| 1e-2 * largest);
    }

    fn poison(&self) {
        for tensor in [&self.logits, &self.topk_indices, &self.out] {
            self.device
                .write(tensor.buffer(), 0, &vec![0xff; parity::read_bytes(self.device, tensor).len()])
                .unwrap();
        }
    }
}

/// A step of three sequences, one of them verifying two drafts, with block tables of a fixed width.
fn batch(computed: [usize; 3]) -> (Batch, usize) {
    let [a, b, c] = computed;
    let BatchCase { mut batch, pages, .. } = BatchCase::of(PAGE_SIZE, &[(a, 1), (b, 3), (c, 1)]);
    let rows = batch.block_table.chunks(batch.max_blocks).flat_map(|row| {
        let padding = std::iter::repeat_n(-1, MAX_BLOCKS - row.len());
        row.iter().copied().chain(padding).collect::<Vec<_>>()
    });
    batch.block_table = rows.collect();
    batch.max_blocks = MAX_BLOCKS;
    (batch, pages)
}

#[test]
fn one_after_the_other_they_agree_with_the_oracle() {
    parity::small_cases(|device| {
        let (batch, pages) = batch([70, 5, 100]);
        let mut step = Step::new(device, &batch, pages);
        step.launch().unwrap();
        step.judge(&batch);
    });
}

#[test]
fn a_captured_step_serves_longer_contexts() {
    parity::small_cases(|device| {
        let (longer, pages) = batch([71, 60, 110]);
        let (first, _) = batch([40, 8, 20]);
        let mut step = Step::new(device, &first, pages);
        step.launch().unwrap();
        let graph = device.capture(|| step.launch()).unwrap();
        step.poison();
        step.batch.upload(device, &longer).unwrap();
        device.replay(&graph).unwrap();
        step.judge(&longer);
    });
}
