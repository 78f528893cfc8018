//! `qkv_norm_rope` against the kernels that it is made of, to the bit: each of these is judged by itself.

use dsa80_cuda::latent_rope::{LatentRopeDims, LatentRopeTile, latent_rope};
use dsa80_cuda::layer_norm_rope::{LayerNormRopeTile, layer_norm_rope};
use dsa80_cuda::qkv_norm_rope::{QkvNormRopeDims, QkvNormRopeTile, qkv_norm_rope};
use dsa80_cuda::rms_norm::{RmsNormTile, rms_norm};
use dsa80_cuda::{CudaBatch, CudaTensor, Limits, Tile};
use dsa80_reference::cpu::CpuTensor;
use dsa80_reference::fp8::{IndexerPage, MlaRow};
use dsa80_reference::{DType, DeviceTensor, IndexKeys, Kernels, RopeLayout};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, BatchCase, Batches, Pair, TestDevice, Values};
use proptest::prelude::*;
use proptest::sample::select;

use crate::cache_rows::{self, expect};

const EPS: f64 = 1e-5;
const KEY_EPS: f64 = 1e-6;

/// The indexer's keys of a case.
#[derive(Debug, Clone, Copy)]
struct Keys {
    width: usize,
    layout: RopeLayout,
    fp8: bool,
}

#[derive(Debug, Clone, Copy)]
struct Variant {
    q_lora_rank: usize,
    latent: LatentRopeDims,
    keys: Option<Keys>,
    /// Of the query's norm, the latent's, and the keys' with their bias.
    weights: [DType; 3],
    tile: QkvNormRopeTile,
}

const fn variant(
    [q_lora_rank, kv_lora_rank, rope]: [usize; 3],
    keys: Option<Keys>,
    weights: [DType; 3],
    [vectors, vector]: [usize; 2],
) -> Variant {
    let (latent, tile) = (LatentRopeDims { kv_lora_rank, rope }, QkvNormRopeTile { vectors, vector });
    Variant { q_lora_rank, latent, keys, weights, tile }
}

const fn keys(width: usize, layout: RopeLayout, fp8: bool) -> Option<Keys> {
    Some(Keys { width, layout, fp8 })
}

const BF16: [DType; 3] = [DType::Bf16; 3];

/// One warp and several, with keys of either layout and without.
const VARIANTS: &[Variant] = &[
    variant([600, 144, 16], keys(32, RopeLayout::Interleaved, true), BF16, [1, 4]),
    variant([32, 32, 8], keys(16, RopeLayout::Half, false), [DType::F32, DType::F16, DType::Bf16], [1, 8]),
    variant([520, 512, 64], None, BF16, [2, 8]),
];

type Case = cache_rows::Case<Variant>;

fn cases(variants: impl Strategy<Value = Variant>, size: usize) -> impl Strategy<Value = Case> {
    let batches =
        Batches { page_sizes: &[4, 16, 64], max_seqs: 4, max_computed: size, max_chunk: size }.any();
    (batches, variants, any::<bool>(), Values::any_of(&Values::ORDINARY), any::<u64>())
        .prop_map(|(batch, variant, fp8, values, seed)| Case { batch, variant, fp8, values, seed })
}

/// What goes in.
struct Inputs {
    q_a: Pair,
    q_weight: Pair,
    kv_a: Pair,
    kv_weight: Pair,
    cos_sin: Pair,
    x: Pair,
    weight: Pair,
    bias: Pair,
}

/// What comes out: the query's latent, MLA's cache, and the indexer's.
type Outputs = [CudaTensor<TestDevice>; 3];

impl Inputs {
    fn new(device: &TestDevice, case: &Case) -> Self {
        let Variant { q_lora_rank, latent: LatentRopeDims { kv_lora_rank, rope }, keys, weights, .. } =
            case.variant;
        let (rows, seed) = (case.batch.batch.num_tokens(), case.seed);
        let width = keys.map_or(0, |keys| keys.width);
        let act = |name, columns: usize, seed| {
            Pair::new(device, name, DType::Act, &[rows, columns], &case.values.take(seed, rows * columns))
        };
        let weight = |name, dtype, columns: usize, seed| {
            Pair::weight(device, name, dtype, &[columns], &Values::Normal.take(seed, columns))
        };
        Self {
            q_a: act("q_a", q_lora_rank, seed),
            q_weight: weight("q_weight", weights[0], q_lora_rank, seed ^ 1),
            kv_a: act("kv_a", kv_lora_rank + rope, seed ^ 2),
            kv_weight: weight("kv_weight", weights[1], kv_lora_rank, seed ^ 4),
            cos_sin: case.cos_sin(device, rope),
            x: act("x", width, seed ^ 5),
            weight: weight("weight", weights[2], width, seed ^ 6),
            bias: weight("bias", weights[2], width, seed ^ 7),
        }
    }

    /// The types and shapes of the outputs.
    fn outputs(case: &Case) -> [(DType, Vec<usize>); 3] {
        let Variant { q_lora_rank, latent: LatentRopeDims { kv_lora_rank, rope }, keys, .. } = case.variant;
        let (rows, page_size) = (case.batch.batch.num_tokens(), case.batch.batch.page_size);
        let cache = |fp8, act, bytes| {
            let row = if fp8 { bytes } else { act };
            (if fp8 { DType::Fp8 } else { DType::Act }, vec![case.batch.pages, page_size, row])
        };
        let mla = MlaRow { kv_lora_rank, rope }.row_bytes();
        let Keys { width, fp8, .. } =
            keys.unwrap_or(Keys { width: 16, layout: RopeLayout::Half, fp8: false });
        let key = IndexerPage { page_size, width }.row_bytes();
        let latent = (DType::Act, vec![rows, q_lora_rank]);
        [latent, cache(case.fp8, kv_lora_rank + rope, mla), cache(fp8, width, key)]
    }

    fn launch(
        &self,
        device: &TestDevice,
        case: &Case,
        launch: impl Fn(&CudaBatch<TestDevice>, &mut Outputs),
    ) -> Vec<u8> {
        let (_, batch) = parity::batch(device, &case.batch.batch);
        let mut out =
            Self::outputs(case).map(|(dtype, shape)| parity::poisoned(device, "out", dtype, &shape));
        launch(&batch, &mut out);
        out.iter().flat_map(|out| parity::read_bytes(device, out)).collect()
    }

    fn together(&self, device: &TestDevice, case: &Case) -> Vec<u8> {
        let Variant { keys, tile, .. } = case.variant;
        self.launch(device, case, |batch, [q_latent, cache, key_cache]| {
            let keys = keys.map(|keys| IndexKeys {
                x: &self.x.device,
                weight: &self.weight.device,
                bias: &self.bias.device,
                eps: KEY_EPS,
                layout: keys.layout,
                cache: key_cache,
            });
            let (q_a, q_weight) = (&self.q_a.device, &self.q_weight.device);
            let (kv_a, kv_weight) = (&self.kv_a.device, &self.kv_weight.device);
            let cos_sin = &self.cos_sin.device;
            qkv_norm_rope(
                device, &tile, batch, q_a, q_weight, q_latent, kv_a, kv_weight, cache, EPS, cos_sin, keys,
            )
            .unwrap();
        })
    }

    fn apart(&self, device: &TestDevice, case: &Case) -> Vec<u8> {
        let Variant { keys, tile: QkvNormRopeTile { vectors, vector }, .. } = case.variant;
        self.launch(device, case, |batch, [q_latent, cache, key_cache]| {
            let cos_sin = &self.cos_sin.device;
            let tile = RmsNormTile { vectors, blocks: 32 };
            rms_norm(device, &tile, &self.q_a.device, &self.q_weight.device, EPS, q_latent).unwrap();
            let (tile, x, weight) =
                (LatentRopeTile { warps: 2, vector }, &self.kv_a.device, &self.kv_weight.device);
            latent_rope(device, &tile, batch, x, weight, EPS, cos_sin, cache).unwrap();
            if let Some(Keys { layout, .. }) = keys {
                let tile = LayerNormRopeTile { warps: 2, vector };
                let (x, weight, bias) = (&self.x.device, &self.weight.device, &self.bias.device);
                layer_norm_rope(device, &tile, batch, x, weight, bias, KEY_EPS, layout, cos_sin, key_cache)
                    .unwrap();
            }
        })
    }

    /// The outputs of the oracle in 16 bits are near, and those of the kernel are where it has none.
    fn assert_near_the_oracle(&self, device: &TestDevice, case: &Case, found: &[u8]) {
        let oracle = parity::oracle();
        let (batch, _) = parity::batch(device, &case.batch.batch);
        let mut outs: [CpuTensor<f64>; 3] =
            Self::outputs(case).map(|(dtype, shape)| oracle.alloc(dtype, &shape).unwrap());
        let [q_latent, cache, key_cache] = &mut outs;
        let keys = case.variant.keys.map(|keys| IndexKeys {
            x: &self.x.host,
            weight: &self.weight.host,
            bias: &self.bias.host,
            eps: KEY_EPS,
            layout: keys.layout,
            cache: key_cache,
        });
        let (q_a, q_weight, kv_a, kv_weight) =
            (&self.q_a.host, &self.q_weight.host, &self.kv_a.host, &self.kv_weight.host);
        let cos_sin = &self.cos_sin.host;
        oracle
            .qkv_norm_rope(&batch, q_a, q_weight, q_latent, kv_a, kv_weight, cache, EPS, cos_sin, keys)
            .unwrap();
        let mut rest = found;
        for out in &outs {
            let width = if out.dtype() == DType::Fp8 { 1 } else { 2 };
            let (own, others) = rest.split_at(out.shape().iter().product::<usize>() * width);
            rest = others;
            if out.dtype() == DType::Fp8 {
                continue;
            }
            let (found, expected) = (parity::numbers(DType::Act, own), oracle.read(out).unwrap());
            // A rounding of the norm that flips, and one after the turn.
            let largest =
                expected.iter().filter(|x| x.is_finite()).fold(0.0_f64, |most, x| most.max(x.abs()));
            let columns = out.shape()[out.shape().len() - 1];
            let bound = |i: usize| expected[i].abs() / 64.0 + largest / 256.0;
            parity::assert_close("out", columns, &found, &expected, 5e-3, bound);
        }
    }
}

fn run(device: &TestDevice, case: Case) {
    let inputs = Inputs::new(device, &case);
    let found = parity::twice(device, || inputs.together(device, &case));
    parity::assert_same("outputs", 1, &found, &inputs.apart(device, &case));
    inputs.assert_near_the_oracle(device, &case, &found);
}

#[test]
fn agrees_with_the_kernels_that_it_is_made_of_and_with_the_oracle() {
    parity::check("qkv_norm_rope", cases(select(VARIANTS), 24), run);
}

#[test]
fn agrees_with_them_at_size_with_every_tile() {
    let (q_lora_rank, latent) = (2048, LatentRopeDims { kv_lora_rank: 512, rope: 64 });
    let dims = QkvNormRopeDims { q_lora_rank, latent, key: Some(128) };
    let tiles = select(QkvNormRopeTile::candidates(dims, &Limits::a100()));
    let layouts = [RopeLayout::Interleaved, RopeLayout::Half];
    let choices =
        [None, keys(128, layouts[0], false), keys(128, layouts[0], true), keys(128, layouts[1], true)];
    let variants = (tiles, select(choices.to_vec())).prop_map(move |(tile, keys)| Variant {
        q_lora_rank,
        latent,
        keys,
        weights: BF16,
        tile,
    });
    parity::check_on_gpu("qkv_norm_rope_at_size", cases(variants, 400), run);
}

#[test]
fn planted_faults_are_seen() {
    for (find, replace) in [
        // The last row of each part.
        ("if (row >= rows) return;", "if (row >= rows - 1) return;"),
        ("if (block < 0) return", "if (block < -1) return"),
        // The second block of cache rows goes over the first, and is taken for one of keys.
        ("block % row_blocks * TILE_WARPS", "0 * TILE_WARPS"),
        ("if (block < row_blocks)", "if (block < 1)"),
        // The other cache's slots, and the other norm's epsilon.
        ("key_cache, key_slots, page_size", "key_cache, slots - 1, page_size"),
        ("page_size, row, key_eps", "page_size, row, 100 * eps"),
    ] {
        let fault = Fault { file: "qkv_norm_rope.cu", find, replace };
        parity::catches(fault, cases(select(&VARIANTS[..2]), 24), run);
    }
}

#[test]
fn misfits_are_named() {
    parity::small_cases(|device| {
        let (_, batch) = parity::batch(device, &BatchCase::of(3, &[(0, 2)]).batch);
        let tensor = |dtype, shape: &[usize]| parity::poisoned(device, "tensor", dtype, shape);
        let act = |shape: &[usize]| tensor(DType::Act, shape);
        let (weight, kv_weight, cos_sin) =
            (tensor(DType::Bf16, &[32]), tensor(DType::Bf16, &[16]), tensor(DType::Float, &[2, 4, 2]));
        let key_weight = &kv_weight;
        let run = |q_a: &[usize], q_latent: &[usize], kv_a: &[usize], x: &[usize], key_cache| {
            let (mut q_latent, mut cache, mut key_cache) = (act(q_latent), act(&[4, 3, 24]), key_cache);
            let x = act(x);
            let (bias, layout) = (key_weight, RopeLayout::Half);
            let cache_of_keys = &mut key_cache;
            let keys =
                Some(IndexKeys { x: &x, weight: key_weight, bias, eps: EPS, layout, cache: cache_of_keys });
            let tile = QkvNormRopeTile { vectors: 1, vector: 4 };
            let (q_a, kv_a) = (act(q_a), act(kv_a));
            qkv_norm_rope(
                device,
                &tile,
                &batch,
                &q_a,
                &weight,
                &mut q_latent,
                &kv_a,
                &kv_weight,
                &mut cache,
                EPS,
                &cos_sin,
                keys,
            )
            .unwrap_err()
            .to_string()
        };
        let cache = || act(&[4, 3, 16]);
        let (q, kv, x) = (&[2, 32][..], &[2, 24][..], &[2, 16][..]);
        expect(run(&[3, 32], q, kv, x, cache()), &["qkv_norm_rope: `q_a`", "[2, 32]"]);
        expect(run(q, &[2, 16], kv, x, cache()), &["`q_latent`", "[2, 32]"]);
        expect(run(&[2, 16], &[2, 16], kv, x, cache()), &["`q_weight`", "[16]"]);
        expect(run(q, q, &[2, 25], x, cache()), &["`kv_a`", "[2, 16 + 8]"]);
        expect(run(q, q, kv, &[1, 16], cache()), &["`keys.x`", "[2, D]"]);
        expect(run(q, q, kv, &[2, 8], cache()), &["`keys.weight`", "[8]"]);
        expect(run(q, q, kv, x, act(&[4, 4, 16])), &["`cache`", "[pages, 3, 16]"]);
        expect(run(q, q, kv, x, tensor(DType::Fp8, &[4, 3, 20])), &["`page_size` is 3"]);
    });
}
