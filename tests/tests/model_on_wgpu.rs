//! The model on the WGSL kernels: on a GPU where there is one, else on a CPU that stands in for one (on Debian: mesa-vulkan-drivers).
//!
//! A GPU machine needs no Rust: build here (`cargo test -p dsa80-tests --test model_on_wgpu --no-run`), carry the binary and `fixtures/`,
//! run there with `DSA80_FIXTURES` naming that folder, and `DSA80_WGPU_ADAPTER` an adapter of several.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::{Arc, Once};
use std::time::Duration;

use dsa80_model::checkpoint::Checkpoint;
use dsa80_model::engine::{Request, Step};
use dsa80_model::launch::{Device, Dtype, KvCacheDtype, LaunchOptions, launch};
use dsa80_model::measure::greedy_step;
use dsa80_model::runner::{Rank, RankParts};
use dsa80_reference::wgpu::{ActType, Edit, Wgpu, WgpuCommunicator, WgpuContext, WgpuOptions};
use dsa80_reference::{Batch, SamplingParams, SequenceSlice};
use dsa80_tests::engine::collect;
use dsa80_tests::fixture::{self, Fixture};
use dsa80_tests::judge::{BF16_BOUND_OF_ONE_PROMPT, Bf16Distance};
use dsa80_tests::layers::FirstLatents;
use dsa80_tests::parity::contract;
use dsa80_tests::parity::devices::tell;
use dsa80_tests::prompt::{self, Run};
use dsa80_tests::{bodies, judge};

const PAGE_SIZE: usize = 16;
/// How many of the further prompts run on a CPU.
const PROMPTS: usize = 8;

/// The adapter of the tests, and whether it is a GPU.
fn adapter() -> Option<(&'static Arc<WgpuContext>, bool)> {
    adapter_in(ActType::Bf16)
}

/// The same, with activations of a type.
fn adapter_in(act: ActType) -> Option<(&'static Arc<WgpuContext>, bool)> {
    static TOLD: Once = Once::new();
    let context = contract::contexts(act).next()?;
    if !context.is_hardware() {
        let name = context.name();
        TOLD.call_once(|| {
            tell(&format!(
                "left out: most prompts, pieces and fixtures of the model in WGSL ({name} is a CPU; a GPU runs all)"
            ));
        });
    }
    Some((context, context.is_hardware()))
}

/// Runs `body` on every fixture, with whether it is on a GPU.
fn every_fixture(body: impl Fn(Wgpu, &Fixture, bool)) {
    every_fixture_in(ActType::Bf16, body);
}

fn every_fixture_in(act: ActType, body: impl Fn(Wgpu, &Fixture, bool)) {
    let Some((context, gpu)) = adapter_in(act) else { return };
    for fixture in fixture::all().unwrap() {
        body(Wgpu::new(Arc::clone(context)), &fixture, gpu);
    }
}

fn fixture(name: &str) -> Fixture {
    Fixture::open(fixture::root().join(name)).unwrap()
}

/// All of them on a GPU; on a CPU as many as say something of the 99th percentile.
#[test]
fn prompts_together_are_as_close_to_hf_as_hf_in_bf16() {
    every_fixture(|wgpu, fixture, gpu| {
        bodies::prompts_together(wgpu, fixture, if gpu { 32 } else { PROMPTS })
    });
}

#[test]
fn one_prompt_in_one_piece_in_chunks_and_token_by_token() {
    every_fixture(|wgpu, fixture, gpu| {
        let ways = bodies::ways(fixture);
        bodies::in_pieces(wgpu, fixture, if gpu { &ways } else { &ways[1..2] });
    });
}

/// As the oracle is: with its bounds, by its judge. The greedy tokens are a prefill and then decodes.
#[test]
fn in_f32_it_is_as_close_to_hf_as_float32() {
    every_fixture_in(ActType::F32, |wgpu, fixture, gpu| {
        let context = Arc::clone(wgpu.context());
        let ways = bodies::ways(fixture);
        bodies::exact_in_pieces(wgpu, fixture, if gpu { &ways } else { &ways[1..2] });
        if gpu || fixture.name == "default" {
            bodies::greedy_tokens(Wgpu::new(context), fixture);
        }
    });
}

#[test]
fn in_f32_ranks_are_as_close_and_gather_what_one_multiplies() {
    ranks(ActType::F32, |fixture, way, run| judge::exact(fixture, way, run).unwrap());
}

/// The same judge says no to bf16.
#[test]
fn rounding_is_seen_in_f32() {
    let fixture = fixture("default");
    for act in [ActType::Bf16, ActType::F32] {
        let Some((context, _)) = adapter_in(act) else { return };
        let run =
            run(&mut judge::load(Wgpu::new(Arc::clone(context)), &fixture, PAGE_SIZE).unwrap(), &fixture, 64);
        assert_eq!(judge::exact(&fixture, "64", &run).is_ok(), act == ActType::F32, "{act:?}");
    }
}

#[test]
fn a_prefill_and_then_decodes_on_pages_of_every_size() {
    let Some((context, gpu)) = adapter() else { return };
    for fixture in fixture::all().unwrap().iter().take(if gpu { usize::MAX } else { 1 }) {
        for page_size in [3, 64] {
            bodies::prefill_then_decodes(Wgpu::new(Arc::clone(context)), fixture, page_size);
        }
    }
}

#[test]
fn every_layer_is_the_oracles_within_rounding() {
    every_fixture(|wgpu, fixture, gpu| {
        bodies::layer_by_layer(wgpu, fixture, if gpu { fixture.tokens.len() } else { 48 });
    });
}

#[test]
fn without_subgroups_it_is_the_same_model() {
    let Some(plain) = contract::contexts(ActType::Bf16).next_back() else { return };
    bodies::prompts_together(Wgpu::new(Arc::clone(plain)), &fixture("cases/int4_sym_g128"), PROMPTS);
}

#[test]
fn two_runs_are_the_same_to_the_bit() {
    let Some((context, _)) = adapter() else { return };
    bodies::two_runs(Wgpu::new(Arc::clone(context)), &fixture("cases/int4_channel"));
}

#[test]
fn a_step_samples_from_its_logits() {
    let Some((context, _)) = adapter() else { return };
    bodies::a_step_samples_from_its_logits(Wgpu::new(Arc::clone(context)));
}

/// The fixture's prompt in pieces of so many tokens.
fn run(rank: &mut Rank<Wgpu>, fixture: &Fixture, size: usize) -> Run {
    let pages = prompt::scattered_pages(&judge::limits(fixture, PAGE_SIZE), 0);
    let pieces = prompt::pieces(fixture.tokens.len(), size);
    prompt::run(rank, &fixture.tokens, &pages, PAGE_SIZE, &pieces).unwrap()
}

/// Bytes of a binding that are fewer than the embedding has, a layer's experts, or its cache.
const SMALL_BINDING: u64 = 32 << 10;

/// They are cut, as caches are, and nothing else changes.
#[test]
fn weights_larger_than_a_binding_are_the_same_weights() {
    // So few tokens that their activations are not too large.
    const TOKENS: usize = 8;
    let Some((context, _)) = adapter() else { return };
    let fixture = fixture("default");
    let config = Checkpoint::open(&fixture.dir).unwrap().config().clone();
    assert!((2 * config.vocab_size * config.hidden_size) as u64 > SMALL_BINDING);
    let run = |wgpu| run(&mut judge::load(wgpu, &fixture, PAGE_SIZE).unwrap(), &fixture, TOKENS);
    let whole = run(Wgpu::new(Arc::clone(context)));
    let same = contract::same_adapter(&Wgpu::new(Arc::clone(context)));
    let small = WgpuOptions { largest_binding: Some(SMALL_BINDING), ..same };
    assert!(run(Wgpu::open(&small).unwrap()) == whole, "in windows and whole");
}

/// What these tests compare says something: a half of a shared expert is too far from HF, and rows of a window that count from the table's
/// first are other rows.
#[test]
fn planted_faults_are_seen() {
    let Some((context, _)) = adapter() else { return };
    let fixture = fixture("default");
    let run = |largest_binding, edits: &[Edit]| {
        let same = contract::same_adapter(&Wgpu::new(Arc::clone(context)));
        let options = WgpuOptions { largest_binding, edits: edits.to_vec(), ..same };
        run(&mut judge::load(Wgpu::open(&options).unwrap(), &fixture, PAGE_SIZE).unwrap(), &fixture, 8)
    };
    let half = Edit { shader: "moe_sum", find: "sum += act_pair(", replace: "sum += 0.5 * act_pair(" };
    let found = Bf16Distance::of(&fixture, "half an expert", &run(None, &[half]));
    assert!(found.mean > BF16_BOUND_OF_ONE_PROMPT.mean, "{found:?}");
    let rows = Edit { shader: "embed", find: "(row - params.first) * params", replace: "row * params" };
    let [whole, cut] = [None, Some(SMALL_BINDING)].map(|bytes| run(bytes, std::slice::from_ref(&rows)));
    assert!(whole != cut, "nothing was cut");
}

#[test]
fn ranks_are_as_far_from_hf_as_hf_in_bf16_and_gather_what_one_multiplies() {
    ranks(ActType::Bf16, bodies::close);
}

/// Runs the fixture that many ranks divide on two and on four, and judges each.
fn ranks(act: ActType, judge: impl Fn(&Fixture, &str, &Run)) {
    let Some((context, _)) = adapter_in(act) else { return };
    let fixture = fixture("cases/int4_asym_g32_tp8");
    let checkpoint = Checkpoint::open(&fixture.dir).unwrap();
    let limits = judge::limits(&fixture, PAGE_SIZE);
    let pages = prompt::scattered_pages(&limits, 0);
    let latents =
        |rank: &mut Rank<Wgpu>| FirstLatents::of(rank, &fixture.tokens[..20], &pages, PAGE_SIZE).unwrap();
    let alone = latents(&mut judge::load(Wgpu::new(Arc::clone(context)), &fixture, PAGE_SIZE).unwrap());
    for world_size in [2, 4] {
        let backends: Vec<Wgpu> = (0..world_size).map(|_| Wgpu::new(Arc::clone(context))).collect();
        let ranks = WgpuCommunicator::group(&backends).into_iter().zip(backends);
        let ranks = ranks.map(|(rank, kernels)| RankParts { kernels, communicator: Box::new(rank) as _ });
        let runs = bodies::on_ranks(&checkpoint, &limits, ranks.collect(), |rank| {
            (run(rank, &fixture, 64), latents(rank))
        });
        assert!(runs.iter().all(|run| *run == runs[0]), "{world_size} ranks: they differ");
        let (run, shared) = &runs[0];
        judge(&fixture, &format!("{world_size} ranks"), run);
        assert!(*shared == alone, "{world_size} ranks: q_a and kv_a differ");
    }
}

/// Two sequences, prefilled and then one token each, and the best token of both.
fn two_sequences(fixture: &Fixture) -> (Step, Step) {
    let limits = judge::limits(fixture, PAGE_SIZE);
    let pages = [0, 1].map(|sequence| prompt::scattered_pages(&limits, sequence));
    let slices = |tokens: std::ops::Range<usize>| {
        pages.each_ref().map(|pages| SequenceSlice {
            token_ids: &fixture.tokens[tokens.clone()],
            computed_len: tokens.start,
            pages,
        })
    };
    let prefill = Batch::new(PAGE_SIZE, &slices(0..40)).unwrap();
    let decode = Batch::new(PAGE_SIZE, &slices(40..41)).unwrap();
    (greedy_step(prefill, [39, 79]), greedy_step(decode, [0, 1]))
}

#[test]
fn a_step_is_one_command_encoder_and_one_wait() {
    let Some((context, _)) = adapter() else { return };
    let options = contract::same_adapter(&Wgpu::new(Arc::clone(context)));
    // Its own: tests beside this one turn to the device as well.
    let context = WgpuContext::open(&options).unwrap();
    let fixture = fixture("cases/int4_sym_g32");
    let mut rank = judge::load(Wgpu::new(Arc::clone(&context)), &fixture, PAGE_SIZE).unwrap();
    let (prefill, decode) = two_sequences(&fixture);
    rank.step(&prefill).unwrap();
    for step in [&prefill, &decode] {
        let before = context.turns();
        rank.step(step).unwrap();
        let after = context.turns();
        println!("{before:?} then {after:?}");
        assert_eq!((after.submissions - before.submissions, after.waits - before.waits), (1, 1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_answers() {
    if adapter().is_some() {
        let launch = LaunchOptions { device: Device::Wgpu, ..LaunchOptions::default() };
        bodies::the_server_answers(launch).await;
    }
}

/// With caches in f32 its log-probabilities are the CPU's; in 8 bits, where a few codes round to the other side, nearly.
#[test]
fn an_engine_in_f32_says_what_the_cpu_says() {
    if adapter().is_none() {
        return;
    }
    let fixture = fixture("default");
    let checkpoint = dsa80_tests::engine::default_checkpoint().unwrap();
    for (kv_cache_dtype, bound) in [(KvCacheDtype::Auto, 2e-5), (KvCacheDtype::Fp8, 0.1)] {
        let answers = [Device::Cpu, Device::Wgpu].map(|device| {
            let options =
                LaunchOptions { device, dtype: Dtype::F32, kv_cache_dtype, ..LaunchOptions::default() };
            let engine = launch(&checkpoint, &options).unwrap();
            let request = Request {
                prompt: fixture.tokens[..40].to_vec(),
                sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
                max_tokens: 4,
                logprobs: Some(1),
                ..Request::default()
            };
            let answer = collect(engine.submit(request).unwrap()).unwrap();
            engine.shutdown(Duration::ZERO);
            answer
        });
        let [cpu, wgpu] = &answers;
        assert_eq!(cpu.tokens, wgpu.tokens, "{kv_cache_dtype}");
        for (cpu, wgpu) in cpu.logprobs.iter().zip(&wgpu.logprobs) {
            let difference = (cpu.logprob - wgpu.logprob).abs();
            assert!(difference <= bound, "{kv_cache_dtype}: {difference:e}");
        }
    }
}

/// What to do about it is in the message.
#[test]
fn what_does_not_fit_is_refused_with_what_would() {
    if adapter().is_none() {
        return;
    }
    let checkpoint = dsa80_tests::engine::default_checkpoint().unwrap();
    let options = || LaunchOptions { device: Device::Wgpu, ..LaunchOptions::default() };
    let cases = [
        (LaunchOptions { num_pages: Some(1 << 40), ..options() }, "that this adapter binds"),
        (LaunchOptions { max_num_batched_tokens: 1 << 40, ..options() }, "lower the batch or cache size"),
        (
            LaunchOptions { max_model_len: Some(512), num_pages: Some(4), ..options() },
            "longest context that would fit is 256 tokens",
        ),
        (LaunchOptions { tp: 8, ..options() }, "use --tp 4"),
        (
            LaunchOptions { dtype: Dtype::F32, num_pages: Some(1 << 40), ..options() },
            "use --dtype bf16, of which there is room for",
        ),
        (
            LaunchOptions {
                dtype: Dtype::F32,
                max_model_len: Some(512),
                kv_cache_bytes: Some(200 << 10),
                ..options()
            },
            "or use --dtype bf16, of which there is room for 384 tokens",
        ),
        (
            LaunchOptions { dtype: Dtype::F32, max_num_batched_tokens: 1 << 40, ..options() },
            "or compute in bf16, whose activations take half",
        ),
    ];
    for (options, expected) in cases {
        match launch(&checkpoint, &options) {
            Ok(engine) => {
                engine.shutdown(Duration::ZERO);
                panic!("{options:?} should be refused");
            }
            Err(error) => assert!(error.to_string().contains(expected), "{options:?}: {error}"),
        }
    }
}
