//! Random weights in the formats that a config describes, and caches in 8 bits.

use std::path::Path;
use std::time::Instant;

use dsa80_cuda::{Counting, Cuda, Device, Tiles};
use dsa80_model::config::ModelConfig;
use dsa80_model::dummy::DummyWeights;
use dsa80_model::engine::StepLimits;
use dsa80_model::plan::Plan;
use dsa80_model::runner::{Rank, WeightSource};
use dsa80_reference::{Batch, DType, LoneRank, SequenceSlice};
use dsa80_tests::layers::{Forced, Trace, relative_l2};
use dsa80_tests::parity::oracle;
use dsa80_tests::{fixture, glm, judge, prompt};

use super::{emulated, on_gpu};

/// What a fixture's config describes, with random weights.
fn dummy(name: &str) -> DummyWeights {
    let text = std::fs::read_to_string(fixture::root().join(name).join("config.json")).unwrap();
    DummyWeights::new(ModelConfig::from_json(&text).unwrap(), 1)
}

/// The backend's residual stream against the oracle's, its choices forced: the relative distance after the last layer.
fn distance<D: Device>(cuda: Cuda<D>, weights: &DummyWeights, cache_dtype: DType) -> f64 {
    let vocab_size = weights.config().vocab_size;
    let limits = StepLimits { cache_dtype, ..prompt::limits(48, 16, vocab_size) };
    let mut rounding = judge::load_weights(oracle(), weights, &limits).unwrap();
    let mut rank = judge::load_weights(cuda, weights, &limits).unwrap();
    let tokens: Vec<u32> = (0..48).map(|i| (i * 7919 % vocab_size) as u32).collect();
    let pages = prompt::scattered_pages(&limits, 1);
    let mut last = 0.0;
    for piece in [0..40, 40..48] {
        let slice =
            SequenceSlice { token_ids: &tokens[piece.clone()], computed_len: piece.start, pages: &pages };
        let batch = Batch::new(16, &[slice]).unwrap();
        let mut expected = Trace::default();
        rounding.forward(&batch, Some(&mut expected)).unwrap();
        let mut found = Forced::new(&expected);
        rank.forward(&batch, Some(&mut found)).unwrap();
        last = *relative_l2(&found.hidden, &expected.hidden).last().unwrap();
    }
    last
}

/// Packed and dense weights that the backend made are those that the oracle made.
#[test]
fn random_models_are_the_oracles_within_rounding() {
    for name in ["default", "cases/int4_sym_g32", "cases/awq_g32", "cases/bf16"] {
        for cuda in emulated().into_iter().chain(on_gpu()) {
            let distance = distance(cuda, &dummy(name), DType::Act);
            println!("{name}: {distance:.1e}");
            assert!(distance < 1e-2, "{name}: {distance}");
        }
    }
}

/// A value that lies between two codes goes to one here and to the other there, an eighth of it away.
#[test]
fn caches_in_8_bits_are_the_oracles_within_their_rounding() {
    for cuda in emulated().into_iter().chain(on_gpu()) {
        let distance = distance(cuda, &dummy("default"), DType::Fp8);
        println!("8 bits: {distance:.1e}");
        assert!(distance < 2e-2, "{distance}");
    }
}

/// `DSA80_RANK` is the rank (0 by default) of eight, `DSA80_CONFIG` a folder with another config.json than GLM-5.2's with INT4 experts. By
/// hand, on a GPU of 80 GB: `--ignored --nocapture`.
#[test]
#[ignore = "a measurement, for a GPU of 80 GB"]
fn a_rank_of_eight_at_full_size() {
    let Some(_) = on_gpu() else { return };
    let config = match std::env::var_os("DSA80_CONFIG") {
        None => glm::whole(),
        Some(dir) => {
            let text = std::fs::read_to_string(Path::new(&dir).join("config.json")).unwrap();
            ModelConfig::from_json(&text).unwrap()
        }
    };
    let rank = std::env::var("DSA80_RANK").map_or(0, |rank| rank.parse().unwrap());
    let lone = || Box::new(LoneRank::new(rank, 8).unwrap());
    let weights = DummyWeights::new(config.clone(), 0);
    let limits = StepLimits {
        page_size: 64,
        num_pages: 1024,
        cache_dtype: DType::Act,
        max_batch_tokens: 512,
        max_batch_seqs: 32,
        max_model_len: 16384,
        vocab_size: config.vocab_size,
        max_logprobs: 20,
    };
    const INDEX_LOGITS: usize = 64 << 20;

    let cuda = Cuda::open().unwrap();
    let started = Instant::now();
    let counting = Counting::new(cuda.device().limits().clone());
    let allocated = counting.allocated();
    let tiles = Tiles::for_gpu(&cuda.device().limits().name, None).unwrap();
    let rehearsed = Rank::load(Cuda::new(counting, tiles), lone(), &weights, &limits, INDEX_LOGITS).unwrap();
    let counted = allocated.bytes();
    drop(rehearsed);
    let gib = |bytes: u64| bytes as f64 / (1_u64 << 30) as f64;
    println!("counted in {:.1} s: {:.2} GiB", started.elapsed().as_secs_f64(), gib(counted));

    let (free, _) = cuda.device().memory().unwrap();
    let started = Instant::now();
    let mut rank = Rank::load(cuda, lone(), &weights, &limits, INDEX_LOGITS).unwrap();
    rank.stand_in_for_others().unwrap();
    rank.kernels().device().synchronize().unwrap();
    let seconds = started.elapsed().as_secs_f64();
    let taken = (free - rank.kernels().device().memory().unwrap().0) as u64;
    let plan = Plan::from_config(&config, 8).unwrap().weights.total();
    println!(
        "made in {seconds:.1} s: {:.2} GiB taken, of which {:.2} are weights by the plan",
        gib(taken),
        gib(plan)
    );
    assert!(taken.abs_diff(counted) < 1 << 29, "{taken} taken, {counted} counted");
    assert!(seconds < 30.0);

    let pages: Vec<u32> = (0..16).collect();
    let token_ids: Vec<u32> = (0..512).map(|i| i * 7919 % 19360).collect();
    for (computed_len, tokens) in [(0, 512), (512, 1)] {
        let slice = SequenceSlice { token_ids: &token_ids[..tokens], computed_len, pages: &pages };
        let batch = Batch::new(64, &[slice]).unwrap();
        let mut trace = Trace::default();
        rank.forward(&batch, Some(&mut trace)).unwrap();
        let largest = |values: &Vec<f64>| values.iter().fold(0.0_f64, |most, x| most.max(x.abs()));
        let largest: Vec<f64> = trace.hidden.iter().map(largest).collect();
        println!(
            "{tokens} tokens: largest of the residual stream {:.1} then {:.1}",
            largest[0],
            largest[largest.len() - 1]
        );
        assert!(trace.hidden.iter().flatten().all(|x| x.is_finite()));
        assert!(largest.iter().all(|&x| x < 1e3), "{largest:?}");
    }
}
