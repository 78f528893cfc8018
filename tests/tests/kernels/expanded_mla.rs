//! `expanded_mla` against attention the slow way.

use dsa80_cuda::expanded_mla::{
    ExpandedMlaDims, ExpandedMlaTile, ExpandedMlaWorkspace, Expansion, Step, expanded_mla,
};
use dsa80_cuda::linear::{LinearTiles, LinearWorkspace};
use dsa80_cuda::{CudaTensor, Limits, Tile};
use dsa80_reference::{DType, Error, Kernels};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, BatchCase, F32_UNIT, Pair, TestDevice, Values, half_ulp_bf16};
use half::bf16;
use proptest::prelude::*;
use proptest::sample::select;

use crate::sparse_mla_wide::selections;

/// With a last step of the tensor core that is half full, of one vector of rotary columns and of two.
const SMALL: &[ExpandedMlaDims] = &[
    ExpandedMlaDims { nope: 16, rope: 8, v: 16, kv_lora_rank: 32 },
    ExpandedMlaDims { nope: 24, rope: 16, v: 48, kv_lora_rank: 24 },
];

const GLM: ExpandedMlaDims = ExpandedMlaDims { nope: 192, rope: 64, v: 256, kv_lora_rank: 512 };

const TILES: &[ExpandedMlaTile] =
    &[ExpandedMlaTile { warps: 2, keys: 64 }, ExpandedMlaTile { warps: 1, keys: 32 }];

/// Any context.
const ALWAYS: Expansion =
    Expansion { tokens: 1, context_of_token: usize::MAX, visible_of_selected: usize::MAX };

#[derive(Debug, Clone)]
struct Case {
    batch: BatchCase,
    dims: ExpandedMlaDims,
    tile: ExpandedMlaTile,
    heads: usize,
    k: usize,
    values: Values,
    seed: u64,
}

fn cases(
    dims: &'static [ExpandedMlaDims],
    tiles: &'static [ExpandedMlaTile],
    (computed, tokens): (usize, usize),
) -> impl Strategy<Value = Case> {
    let batch = (select(vec![1_usize, 3, 16]), 0..=computed, 1..=tokens)
        .prop_map(|(page_size, computed, tokens)| BatchCase::of(page_size, &[(computed, tokens)]));
    let k = prop_oneof![1..=computed + tokens, Just(7), Just(0)];
    let values = Values::any_of(&[Values::Normal, Values::Zeros]);
    (batch, select(dims), select(tiles), 1..=3_usize, k, values, any::<u64>()).prop_map(
        |(batch, dims, tile, heads, k, values, seed)| Case { batch, dims, tile, heads, k, values, seed },
    )
}

struct Inputs {
    q: Pair,
    kv_b: Pair,
    cache: Pair,
    topk_indices: Pair,
    selections: Vec<i32>,
    scale: f64,
}

impl Inputs {
    fn new(device: &TestDevice, case: &Case) -> Self {
        let Case { batch, dims, heads, k, values, seed, .. } = case;
        let ExpandedMlaDims { nope, rope, v, kv_lora_rank: rank } = *dims;
        let (tokens, width) = (batch.batch.num_tokens(), nope + rope);
        let page = batch.batch.page_size * (rank + rope);
        // Rows that no sequence has must not reach the result.
        let mut rows = values.take(seed ^ 1, batch.pages * page);
        for (rows, _) in rows.chunks_mut(page).zip(&batch.used).filter(|(_, used)| !**used) {
            rows.fill(f64::NAN);
        }
        let selections = selections(batch, *k, *seed);
        // Keys and values of the size of a latent row's columns.
        let kv_b: Vec<f64> = Values::Normal
            .take(seed ^ 2, heads * (nope + v) * rank)
            .iter()
            .map(|x| x / (rank as f64).sqrt())
            .collect();
        let act = |name, shape: &[usize], values: &[f64]| Pair::new(device, name, DType::Act, shape, values);
        Self {
            q: act("q", &[tokens, *heads, width], &values.take(*seed, tokens * heads * width)),
            kv_b: Pair::weight(device, "kv_b", DType::Bf16, &[*heads, nope + v, rank], &kv_b),
            cache: act("cache", &[batch.pages, batch.batch.page_size, rank + rope], &rows),
            topk_indices: Pair::index(device, "topk_indices", &[tokens, *k], &selections),
            selections,
            // Scores apart enough that maxima fall behind.
            scale: 4.0 / (width as f64).sqrt(),
        }
    }

    fn launch(&self, device: &TestDevice, case: &Case) -> Vec<u8> {
        let Case { dims, tile, heads, k, .. } = *case;
        let (_, batch) = parity::batch(device, &case.batch.batch);
        let tokens = case.batch.batch.num_tokens();
        let expansion = Expansion { visible_of_selected: 1 + case.batch.batch.max_context_len, ..ALWAYS };
        let workspace =
            ExpandedMlaWorkspace::alloc(device, dims, &expansion, [tokens, heads, k.max(1)]).unwrap();
        let tiles = LinearTiles::safe();
        let linear = LinearWorkspace::alloc(device, &tiles).unwrap();
        let mut out = parity::poisoned(device, "out", DType::Act, &[tokens, heads, dims.v]);
        let step = Step {
            batch: &batch,
            q: &self.q.device,
            kv_b: &self.kv_b.device,
            cache: &self.cache.device,
            topk_indices: &self.topk_indices.device,
        };
        expanded_mla(device, &tile, (&tiles, &linear), &workspace, &step, self.scale, &mut out).unwrap();
        parity::read_bytes(device, &out)
    }

    /// The result in float64 of keys and values that are rounded to bf16, and what an element of the device's may be off by.
    fn expected(&self, case: &Case) -> (Vec<f64>, Vec<f64>) {
        let Case { dims, heads, k, .. } = *case;
        let ExpandedMlaDims { nope, rope, v, kv_lora_rank: rank } = dims;
        let host = &case.batch.batch;
        let (tokens, context) = (host.num_tokens(), host.max_context_len);
        let read = |pair: &Pair| parity::oracle().read(&pair.host).unwrap();
        let (q, kv_b, cache) = (read(&self.q), read(&self.kv_b), read(&self.cache));
        let row = |s: usize| &cache[host.slot(0, s) * (rank + rope)..][..rank + rope];
        let mut out = vec![0.0; tokens * heads * v];
        let mut bounds = out.clone();
        for h in 0..heads {
            let up = &kv_b[h * (nope + v) * rank..][..(nope + v) * rank];
            let expand = |s: usize| -> Vec<f64> {
                up.chunks(rank).map(|up| bf16::from_f64(dot(up, &row(s)[..rank])).to_f64()).collect()
            };
            let expanded: Vec<Vec<f64>> = (0..context).map(expand).collect();
            for t in 0..tokens {
                let q = &q[(t * heads + h) * (nope + rope)..][..nope + rope];
                let selected: Vec<usize> =
                    self.selections[t * k..][..k].iter().filter_map(|&s| usize::try_from(s).ok()).collect();
                let score = |s: &usize| {
                    let turned = dot(&q[nope..], &row(*s)[rank..]);
                    (dot(&q[..nope], &expanded[*s][..nope]) + turned) * self.scale
                };
                let scores: Vec<f64> = selected.iter().map(score).collect();
                let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
                let total: f64 = weights.iter().sum();
                let (selected, expanded) = (&selected, &expanded);
                let values = |column: usize| selected.iter().map(move |&s| expanded[s][nope + column]);
                let largest = (0..v).flat_map(values).fold(0.0_f64, |a, b| a.max(b.abs()));
                // A weight is off by its rounding, by its score's f32 sums, and by keys whose f32 sums round the other way, which are 2^-8 of
                // themselves off: few, and each a share of a score. Values likewise. All of it as if everything went the same way.
                let error = largest * (2.0_f64.powi(-7) + (context + 200) as f64 * 4.0 * F32_UNIT);
                for column in 0..v {
                    let sum: f64 = weights.iter().zip(values(column)).map(|(p, value)| p * value).sum();
                    let (i, value) =
                        ((t * heads + h) * v + column, if total > 0.0 { sum / total } else { 0.0 });
                    out[i] = value;
                    bounds[i] = error + 2.0 * half_ulp_bf16(value.abs() + error);
                }
            }
        }
        (out, bounds)
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn run(device: &TestDevice, case: Case) {
    let inputs = Inputs::new(device, &case);
    let found = parity::numbers(DType::Act, &parity::twice(device, || inputs.launch(device, &case)));
    let (expected, bounds) = inputs.expected(&case);
    parity::assert_close("out", case.dims.v, &found, &expected, 4e-3, |i| bounds[i]);
}

#[test]
fn agrees_with_attention_the_slow_way() {
    parity::check("expanded_mla", cases(SMALL, TILES, (150, 90)), run);
}

#[test]
fn agrees_with_attention_the_slow_way_in_glm_dims() {
    let case = |tile| Case {
        batch: BatchCase::of(16, &[(70, 20)]),
        dims: GLM,
        tile,
        heads: 2,
        k: 40,
        values: Values::Normal,
        seed: 7,
    };
    parity::small_cases(|device| run(device, case(ExpandedMlaTile::safe(GLM))));
    parity::large_cases(|device| {
        ExpandedMlaTile::candidates(GLM, &Limits::a100())
            .into_iter()
            .for_each(|tile| run(device, case(tile)));
    });
}

#[test]
fn agrees_at_size_with_every_tile() {
    let tiles = ExpandedMlaTile::candidates(GLM, &Limits::a100()).leak();
    parity::check_on_gpu("expanded_mla_at_size", cases(&[GLM], tiles, (600, 300)), run);
}

#[test]
fn steps_are_expanded_that_are_long_enough_and_whose_contexts_are_not_too_long() {
    let pays =
        |sequences: &[(usize, usize)]| Expansion::default().pays(&BatchCase::of(64, sequences).batch, 2048);
    assert!(pays(&[(4096, 4096)]) && pays(&[(0, 1280)]) && pays(&[(6144, 2048)]) && pays(&[(2816, 1280)]));
    // Too few tokens; too long a context; two sequences.
    assert!(!pays(&[(0, 1279)]) && !pays(&[(6656, 1536)]) && !pays(&[(8192, 4096)]));
    assert!(!pays(&[(0, 4096), (0, 1)]) && !pays(&[]));
    // No step is larger than what is said to be the largest.
    for k in [256, 2048, 8192] {
        let pays = |tokens| Expansion::default().pays(&BatchCase::of(64, &[(0, tokens)]).batch, k);
        let most = Expansion::default().most_tokens(k);
        assert!(pays(most) && !pays(most + 1), "{k}: {most}");
    }
}

#[test]
fn misfits_are_named() {
    parity::small_cases(|device| {
        let case = Case {
            batch: BatchCase::of(16, &[(3, 4), (0, 2)]),
            dims: SMALL[0],
            tile: TILES[0],
            heads: 2,
            k: 3,
            values: Values::Normal,
            seed: 1,
        };
        let inputs = Inputs::new(device, &case);
        let (_, batch) = parity::batch(device, &case.batch.batch);
        let fp8 = CudaTensor::alloc(device, "cache", DType::Fp8, &[2, 16, 56]).unwrap();
        let step = Step {
            batch: &batch,
            q: &inputs.q.device,
            kv_b: &inputs.kv_b.device,
            cache: &inputs.cache.device,
            topk_indices: &inputs.topk_indices.device,
        };
        let message = |step: &Step<'_, TestDevice>| step.dims().unwrap_err().to_string();
        assert!(message(&step).contains("one sequence"), "{}", message(&step));
        let bytes = message(&Step { cache: &fp8, ..step });
        assert!(bytes.contains("`cache`"), "{bytes}");
        // A workspace for rows with fewer rotary columns, and all else alike.
        let one = BatchCase::of(16, &[(3, 4)]);
        let inputs = Inputs::new(device, &Case { batch: one.clone(), ..case.clone() });
        let (_, batch) = parity::batch(device, &one.batch);
        let step = Step {
            batch: &batch,
            q: &inputs.q.device,
            kv_b: &inputs.kv_b.device,
            cache: &inputs.cache.device,
            topk_indices: &inputs.topk_indices.device,
        };
        let launch = |rope| {
            let dims = ExpandedMlaDims { rope, ..case.dims };
            let expansion = Expansion { visible_of_selected: 8, ..ALWAYS };
            let workspace = ExpandedMlaWorkspace::alloc(device, dims, &expansion, [4, 2, 3]).unwrap();
            let linear = LinearWorkspace::alloc(device, &LinearTiles::safe()).unwrap();
            let mut out = parity::poisoned(device, "out", DType::Act, &[4, 2, case.dims.v]);
            let tiles = (&LinearTiles::safe(), &linear);
            expanded_mla(device, &case.tile, tiles, &workspace, &step, 1.0, &mut out)
        };
        assert_eq!(launch(8), Ok(()));
        assert!(matches!(launch(0), Err(Error::Capacity { .. })), "{:?}", launch(0));
    });
    let wide = ExpandedMlaDims { v: 272, ..GLM };
    let error = TILES[0].validate(wide, &Limits::a100()).unwrap_err().to_string();
    assert!(error.contains("272 columns of a value"), "{error}");
}

#[test]
fn planted_faults_are_seen() {
    for (file, find, replace) in [
        // Values are read before they have arrived.
        (
            "expanded_mla.cu",
            "        cp_async_wait<0>();\n        __syncthreads();\n        if (tile + 1 < tiles)",
            "        __syncthreads();\n        if (tile + 1 < tiles)",
        ),
        // Keys of the next tile overwrite those that other warps still read.
        (
            "expanded_mla.cu",
            "        cp_async_wait<0>();\n        __syncthreads();\n        if (tile + 1 < tiles)",
            "        cp_async_wait<0>();\n        if (tile + 1 < tiles)",
        ),
        // The other row's selection.
        ("expanded_mla.cu", "members.has(h, n, c)", "members.has(1 - h, n, c)"),
        // The last tile is left out.
        ("expanded_mla.cu", "(end_position + KEYS - 1) / KEYS", "max(end_position / KEYS, 1)"),
        // What was accumulated is not rescaled.
        ("expanded_mla.cu", "if (__any_sync(ALL, behind))", "if (__any_sync(ALL, behind) && tile == 0)"),
        // A neighbour's bit.
        ("expanded_mla_rows.cu", "1u << position % 32", "1u << (position + 1) % 32"),
        // Half of the rotary part of a row.
        ("expanded_mla_rows.cu", "(CHUNKS - LATENT) + chunk - LATENT]", "(CHUNKS - LATENT)]"),
        // A page's first row for all of its rows.
        ("expanded_mla_rows.cu", "* page_size + position % page_size;", "* page_size;"),
    ] {
        let fault = Fault { file, find, replace };
        parity::catches(fault, cases(SMALL, &TILES[..1], (150, 90)), run);
    }
}
