//! Every fixture in two ranks that are processes, as a launcher starts them: this binary is both of them. On the CPU, or with
//! `DSA80_TEST_DEVICE=cuda` on two GPUs.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dsa80_model::checkpoint::Checkpoint;
use dsa80_model::distributed::Place;
use dsa80_model::engine::{EngineHandle, Request};
use dsa80_model::launch::{Collectives, Device, LaunchOptions, follow, launch, launch_leader};
use dsa80_reference::SamplingParams;
use dsa80_tests::distance::log_softmax;
use dsa80_tests::engine::{self, collect};
use dsa80_tests::fixture::{self, Fixture};
use dsa80_tests::judge::{BF16_BOUND_OF_ONE_PROMPT, Bf16Distance};
use dsa80_tests::parity::devices::{one_group_at_a_time, tell};

const RANKS: usize = 2;

/// The folder of the fixture, in the environment of a rank.
const FIXTURE: &str = "DSA80_TEST_FIXTURE";
/// What stands before what rank 0 has to say.
const SAYS: &str = "scored and continued: ";

fn options(fixture: &Fixture) -> LaunchOptions {
    let len = fixture.tokens.len() + 16;
    LaunchOptions {
        tp: RANKS,
        max_model_len: Some(len),
        max_num_batched_tokens: 64,
        max_num_seqs: 2,
        page_size: 16,
        num_pages: Some(2 * len.div_ceil(16)),
        enable_prefix_caching: false,
        // What processes have.
        collectives: if engine::device() == Device::Cpu { Collectives::Auto } else { Collectives::Nccl },
        join_timeout: Duration::from_secs(60),
        step_timeout: Duration::from_secs(60),
        ..engine::options()
    }
}

/// The log-probabilities of the prompt's tokens from the second on, then the tokens that follow it and theirs.
#[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
struct Said {
    prompt: Vec<f32>,
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
}

fn ask(engine: &EngineHandle, fixture: &Fixture) -> Said {
    let request = Request {
        prompt: fixture.tokens.clone(),
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        max_tokens: 12,
        min_tokens: 0,
        stop_token_ids: Vec::new(),
        ignore_eos: true,
        logprobs: Some(0),
        prompt_logprobs: Some(0),
    };
    let answer = collect(engine.submit(request).unwrap()).unwrap();
    assert_eq!(answer.failure, None);
    let prompt = answer.prompt.iter().skip(1).map(|token| token.as_ref().unwrap().logprob);
    let logprobs = answer.logprobs.iter().map(|token| token.logprob);
    Said { prompt: prompt.collect(), tokens: answer.tokens.clone(), logprobs: logprobs.collect() }
}

/// One of the ranks; by itself it does nothing.
#[test]
#[ignore = "a rank of the other test, which starts it"]
fn one_of_the_ranks() {
    let (Some(dir), Some(place)) = (std::env::var_os(FIXTURE), Place::from_env().unwrap()) else { return };
    let fixture = Fixture::open(dir.into()).unwrap();
    let checkpoint = Arc::new(Checkpoint::open(&fixture.dir).unwrap());
    let options = options(&fixture);
    if place.rank > 0 {
        // Rank 0 leaving is how it ends.
        return follow(&checkpoint, &options, &place, Arc::new(|_| ())).unwrap();
    }
    let engine = launch_leader(&checkpoint, &options, &place).unwrap();
    let said = ask(&engine, &fixture);
    assert_eq!(ask(&engine, &fixture), said, "from run to run");
    engine.shutdown(Duration::from_secs(1));
    // Past the test runner, which prints the name of the test before.
    println!("\n{SAYS}{}", serde_json::to_string(&said).unwrap());
}

/// A rank that does not outlive the test.
struct Rank(Child);

impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn in_processes(fixture: &Fixture) -> Said {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let start = |rank: usize| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "one_of_the_ranks", "--ignored", "--nocapture"]).env(FIXTURE, &fixture.dir);
        command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
        command.env("WORLD_SIZE", RANKS.to_string()).env("MASTER_ADDR", "127.0.0.1");
        command.env("MASTER_PORT", port.to_string()).stdin(Stdio::null());
        let piped = || if rank == 0 { Stdio::piped() } else { Stdio::null() };
        Rank(command.stdout(piped()).stderr(Stdio::inherit()).spawn().unwrap())
    };
    let [mut first, mut second] = [0, 1].map(start);
    let output = std::io::read_to_string(first.0.stdout.take().unwrap()).unwrap();
    for (rank, process) in [&mut first, &mut second].into_iter().enumerate() {
        let status = process.0.wait().unwrap();
        assert!(status.success(), "{}: rank {rank} ended with {status}\n{output}", fixture.name);
    }
    let said = output.lines().find_map(|line| line.strip_prefix(SAYS)).unwrap();
    serde_json::from_str(said).unwrap()
}

fn in_threads(fixture: &Fixture) -> Said {
    // NCCL's groups of one process must not wait for each other on the same GPUs.
    let _alone = one_group_at_a_time();
    let checkpoint = Arc::new(Checkpoint::open(&fixture.dir).unwrap());
    let engine = launch(&checkpoint, &options(fixture)).unwrap();
    let said = ask(&engine, fixture);
    engine.shutdown(Duration::from_secs(1));
    said
}

/// As close to HF as the fixture's own scale asks for.
fn judge(fixture: &Fixture, said: &Said, way: &str) {
    let expected = fixture.logits.chunks(fixture.vocab_size).zip(&fixture.tokens[1..]);
    let expected = expected.map(|(row, &next)| log_softmax(row)[next as usize]);
    let delta: Vec<f64> =
        said.prompt.iter().zip(expected).map(|(&logprob, hf)| (f64::from(logprob) - hf).abs()).collect();
    assert_eq!(delta.len(), fixture.tokens.len() - 1);
    if engine::device() == Device::Cpu {
        let worst = delta.iter().copied().fold(0.0, f64::max);
        assert!(worst < 2e-5, "{} {way}: {worst:e}", fixture.name);
    } else {
        let distance = Bf16Distance::new(&fixture.name, way, &delta, &fixture.scale.bf16);
        distance.assert_within(BF16_BOUND_OF_ONE_PROMPT, &fixture.name, way);
    }
}

fn compare(fixture: &Fixture) {
    let processes = in_processes(fixture);
    judge(fixture, &processes, "2 processes");
    let threads = in_threads(fixture);
    judge(fixture, &threads, "2 threads");
    // To the last bit of every log-probability.
    assert_eq!(processes, threads, "{}: processes and threads", fixture.name);
}

#[test]
fn every_fixture_in_two_processes_is_what_it_is_in_two_threads_and_as_close_to_hf() {
    let on_gpus = engine::device() == Device::Cuda;
    let gpus = dsa80_cuda::devices().map_or(0, |devices| devices.len());
    if on_gpus && gpus < RANKS {
        return tell(&format!("left out: ranks that are processes with a GPU each (there are {gpus} GPUs)"));
    }
    let divides =
        |fixture: &Fixture| Checkpoint::open(&fixture.dir).unwrap().config().check_tp(RANKS).is_ok();
    let fixtures: Vec<Fixture> = fixture::all().unwrap().into_iter().filter(divides).collect();
    assert!(fixtures.len() > 5, "{} fixtures", fixtures.len());
    // A process takes seconds to find its GPU: several at once.
    let left = Mutex::new(fixtures.into_iter());
    let next = || left.lock().unwrap().next();
    std::thread::scope(|scope| {
        for _ in 0..if on_gpus { 3 } else { 1 } {
            scope.spawn(|| {
                while let Some(fixture) = next() {
                    compare(&fixture);
                }
            });
        }
    });
}
