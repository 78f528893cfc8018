//! Launching: what does not fit is refused with the arithmetic and what would fit.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::time::Duration;

use dsa80_model::checkpoint::Checkpoint;
use dsa80_model::engine::{Event, FinishReason, Request};
use dsa80_model::launch::{Device, Dtype, KvCacheDtype, LaunchOptions, launch};
use dsa80_reference::SamplingParams;
use dsa80_tests::engine::{collect, options};
use dsa80_tests::fixture::{self, Fixture};

fn default_checkpoint() -> Arc<Checkpoint> {
    Arc::new(Checkpoint::open(&fixture::root().join("default")).unwrap())
}

/// The message with which `options` are refused.
fn refusal(options: &LaunchOptions) -> String {
    match launch(&default_checkpoint(), options) {
        Ok(_) => panic!("{options:?} should be refused"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn refusals_name_the_option_and_what_would_fit() {
    let options = || LaunchOptions { device: Device::Cpu, ..LaunchOptions::default() };
    let on_gpus = |tp| LaunchOptions { device: Device::Cuda, tp, ..options() };
    let cases = [
        (on_gpus(3), "degrees that divide this model: 1, 2, 4, 8"),
        (LaunchOptions { tp: 3, ..options() }, "degrees that divide this model: 1, 2, 4, 8"),
        (LaunchOptions { tp: 0, ..options() }, "tensor parallelism over 0 ranks is not possible"),
        (LaunchOptions { max_num_batched_tokens: usize::MAX, ..options() }, "cpu: not enough memory"),
        (LaunchOptions { num_pages: Some(usize::MAX), ..options() }, "cpu: not enough memory"),
        (LaunchOptions { page_size: usize::MAX, ..options() }, "longest context that would fit is 0 tokens"),
        (LaunchOptions { page_size: 0, ..options() }, "--page-size is 0"),
        (LaunchOptions { max_num_seqs: 0, ..options() }, "--max-num-seqs is 0"),
        (LaunchOptions { num_pages: Some(0), ..options() }, "--num-pages is 0"),
        (LaunchOptions { max_model_len: Some(0), ..options() }, "--max-model-len is 0"),
        (
            LaunchOptions { gpu_memory_utilization: 0.0, ..options() },
            "--gpu-memory-utilization is 0; expected a share",
        ),
        (LaunchOptions { gpu_memory_utilization: f64::NAN, ..options() }, "--gpu-memory-utilization is NaN"),
        (
            LaunchOptions { kv_cache_dtype: KvCacheDtype::Bf16, ..options() },
            "--kv-cache-dtype bf16 is for a GPU",
        ),
        (LaunchOptions { dtype: Dtype::Bf16, ..options() }, "--dtype bf16 is for a GPU"),
        (LaunchOptions { dtype: Dtype::F32, ..on_gpus(1) }, "--dtype f32: the CUDA kernels compute in bf16"),
        (
            LaunchOptions { dtype: Dtype::F32, kv_cache_dtype: KvCacheDtype::Bf16, ..options() },
            "with --dtype f32 use auto (f32) or fp8",
        ),
        (
            LaunchOptions { kv_cache_dtype: KvCacheDtype::Fp8, page_size: 6, ..options() },
            "--page-size 6 is not a multiple of 4",
        ),
        (LaunchOptions { max_model_len: Some(8193), ..options() }, "max_position_embeddings, 8192"),
        (
            LaunchOptions { max_model_len: Some(512), num_pages: Some(4), page_size: 64, ..options() },
            "longest context that would fit is 256 tokens",
        ),
        (
            LaunchOptions { kv_cache_bytes: Some(1), ..options() },
            "longest context that would fit is 0 tokens",
        ),
    ];
    for (options, expected) in cases {
        let message = refusal(&options);
        assert!(message.contains(expected), "{options:?}: {message}");
    }
}

/// What to do about it is in the message; where there is a GPU, the model is launched.
#[test]
fn without_a_gpu_cuda_says_what_is_missing() {
    let on_cuda = LaunchOptions { device: Device::Cuda, ..LaunchOptions::default() };
    match launch(&default_checkpoint(), &on_cuda) {
        Ok(engine) => engine.shutdown(Duration::ZERO),
        Err(error) => {
            let message = error.to_string();
            assert!(message.starts_with("--device cuda: ") && message.contains("--device cpu"), "{message}");
            let missing =
                ["install the NVIDIA driver", "lists no GPU", "new enough", "cuda/requirements.txt"];
            assert!(missing.iter().any(|words| message.contains(words)), "{message}");
        }
    }
}

#[test]
fn ranks_without_a_gpu_each_are_refused() {
    let on_cuda = LaunchOptions { device: Device::Cuda, tp: 8, ..LaunchOptions::default() };
    match launch(&default_checkpoint(), &on_cuda) {
        Ok(engine) => engine.shutdown(Duration::ZERO),
        Err(error) => {
            let message = error.to_string();
            assert!(message.starts_with("--device cuda: ") && message.contains("--device cpu"), "{message}");
            let missing =
                ["install the NVIDIA driver", "lists no GPU", "new enough", "8 ranks need a GPU each"];
            assert!(missing.iter().any(|words| message.contains(words)), "{message}");
        }
    }
}

#[test]
fn contexts_are_cut_to_what_the_caches_hold() {
    let options = LaunchOptions { num_pages: Some(3), page_size: 32, ..options() };
    let engine = launch(&default_checkpoint(), &options).unwrap();
    assert_eq!(engine.max_model_len(), 96);
    engine.shutdown(Duration::ZERO);
    assert!(!engine.is_alive());
}

/// A page of 8 bits takes less than half of one of f32, and a model answers about the same from it.
#[test]
fn caches_in_8_bits_hold_more_and_say_about_the_same() {
    let fixture = Fixture::open(fixture::root().join("default")).unwrap();
    let engine = |kv_cache_dtype| {
        let options =
            LaunchOptions { device: Device::Cpu, kv_cache_dtype, kv_cache_bytes: Some(1 << 20), ..options() };
        launch(&default_checkpoint(), &options).unwrap()
    };
    let (exact, eight) = (engine(KvCacheDtype::Auto), engine(KvCacheDtype::Fp8));
    assert!(eight.max_model_len() > 2 * exact.max_model_len());
    let answers = [&exact, &eight].map(|engine| {
        let request = Request {
            prompt: fixture.tokens[..40].to_vec(),
            sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
            max_tokens: 1,
            logprobs: Some(1),
            ..Request::default()
        };
        let answer = collect(engine.submit(request).unwrap()).unwrap();
        engine.shutdown(Duration::ZERO);
        answer.logprobs[0].top[0].1
    });
    let difference = (answers[0] - answers[1]).abs();
    assert!(difference > 0.0 && difference < 0.3, "{answers:?}");
}

/// Random weights need no more than the config, and the same seed makes the same.
#[test]
fn a_dummy_is_made_from_the_config_alone() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(fixture::root().join("default/config.json"), dir.path().join("config.json")).unwrap();
    let answer = |seed, tp| {
        let checkpoint = Arc::new(Checkpoint::open_dummy(dir.path(), seed).unwrap());
        let engine = launch(&checkpoint, &LaunchOptions { device: Device::Cpu, tp, ..options() }).unwrap();
        let sampling = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let request = Request {
            prompt: vec![1, 2, 3],
            sampling,
            max_tokens: 8,
            logprobs: Some(1),
            ..Request::default()
        };
        let answer = collect(engine.submit(request).unwrap()).unwrap();
        engine.shutdown(Duration::ZERO);
        assert!(answer.logprobs.iter().all(|logprobs| logprobs.logprob.is_finite()));
        answer.logprobs
    };
    assert_eq!(answer(1, 1), answer(1, 1));
    assert_ne!(answer(1, 1), answer(2, 1));
    assert_eq!(answer(1, 2).len(), 8);
    let missing = Checkpoint::open_dummy(&dir.path().join("nothing"), 1).err().unwrap().to_string();
    assert!(missing.contains("config.json: no such file"), "{missing}");
}

#[test]
fn the_engine_continues_as_hf_does() {
    for fixture in fixture::all().unwrap() {
        // A margin within rounding ends the comparison: what follows it may differ.
        let clear = fixture.greedy_margin.iter().take_while(|margin| **margin > 1e-3).count();
        assert!(clear > 4, "{}: {clear} clear tokens", fixture.name);
        let checkpoint = Arc::new(Checkpoint::open(&fixture.dir).unwrap());
        let options = LaunchOptions { device: Device::Cpu, max_num_batched_tokens: 50, ..options() };
        let engine = launch(&checkpoint, &options).unwrap();
        assert_eq!(greedy(&engine, &fixture)[..clear], fixture.greedy[..clear], "{}", fixture.name);
        // Once more, now that the prefix cache knows the prompt.
        assert_eq!(greedy(&engine, &fixture)[..clear], fixture.greedy[..clear], "{}, cached", fixture.name);
        assert!(engine.stats().cached_tokens > 0, "{}: nothing was cached", fixture.name);
        engine.shutdown(Duration::ZERO);
    }
}

/// The engine's greedy continuation of the fixture's prompt.
fn greedy(engine: &dsa80_model::engine::EngineHandle, fixture: &Fixture) -> Vec<u32> {
    let request = Request {
        prompt: fixture.tokens[..fixture.scale.greedy_prompt_len].to_vec(),
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        max_tokens: fixture.greedy.len(),
        ..Request::default()
    };
    let mut events = engine.submit(request).unwrap();
    let mut tokens = Vec::new();
    while let Some(event) = events.next_blocking() {
        match event {
            Event::Token { id, .. } => tokens.push(id),
            Event::Finished { reason, usage } => {
                assert_eq!(reason, FinishReason::Length);
                assert_eq!(usage.completion_tokens, tokens.len());
            }
            Event::Failed(reason) => panic!("{reason}"),
            Event::Started { .. } | Event::Prompt(_) => {}
        }
    }
    tokens
}
