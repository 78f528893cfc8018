//! A day of service in a minute: many requests of mixed kinds, of which some are refused and some clients leave, on a server that has too few
//! pages for them. Nothing may be lost on the way: no answer, no page, no memory, no file descriptor.
//!
//! On a GPU: `DSA80_TEST_DEVICE=cuda ./soak-0123456789abcdef --ignored --nocapture`, `DSA80_SOAK_REQUESTS` for another number.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, in its helpers too, and shows what it measured"
)]

mod client;
mod footprint;
mod job;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use dsa80_model::engine::EngineStats;
use dsa80_model::launch::{Device, LaunchOptions};
use dsa80_tests::engine::{device, eventually, options};
use dsa80_tests::server::{ServerOptions, TestServer};

use client::Outcome;
use footprint::Footprint;
use job::Job;

/// The longest context.
const MAX_MODEL_LEN: usize = 320;
const PAGE_SIZE: usize = 4;
/// Little more than the longest context, for 24 sequences.
const PAGES: usize = 84;
/// Clients at a time; each may ask for three choices.
const CLIENTS: usize = 40;
/// The requests after which nothing may grow any more, and the pieces of the rest.
const ROUNDS: usize = 5;
/// What the process may grow by from the end of the first round: allocators keep pieces of what came together by chance. Of the 16,000 requests
/// that then follow in a day, none may keep 1.5 KiB.
const GROWTH: usize = 24 << 20;
/// The same of the device: kernels that are used for the first time.
const DEVICE_GROWTH: usize = 2 << 20;
/// Threads of the runtimes' pools come and go.
const POOLED: usize = 4;

fn launch_options() -> LaunchOptions {
    LaunchOptions {
        max_model_len: Some(MAX_MODEL_LEN),
        max_num_seqs: 24,
        max_num_batched_tokens: 128,
        page_size: PAGE_SIZE,
        num_pages: Some(PAGES),
        ..options()
    }
}

/// What all clients saw.
#[derive(Debug, Default)]
struct Tally {
    /// Whole answers.
    complete: usize,
    /// Their choices.
    choices: usize,
    /// Their tokens.
    tokens: usize,
    /// Clients that left.
    left: usize,
    /// The choices that they had asked for.
    choices_left: usize,
    refused: usize,
    /// Greedy answers, and how many of them are what the prompt gave alone.
    greedy: usize,
    same: usize,
}

impl Tally {
    fn add(&mut self, job: &Job, outcome: Outcome, alone: &HashMap<usize, String>) {
        match outcome {
            Outcome::Refused => self.refused += 1,
            Outcome::Left => {
                self.left += 1;
                self.choices_left += job.choices;
            }
            Outcome::Complete { texts, tokens } => {
                self.complete += 1;
                self.choices += texts.len();
                self.tokens += tokens;
                if let Some(prompt) = job.greedy {
                    self.greedy += 1;
                    self.same += usize::from(texts[0] == alone[&prompt]);
                }
            }
        }
    }
}

/// Runs jobs `first..last`, `CLIENTS` at a time, on connections that end with it.
async fn round(
    server: &Arc<TestServer>,
    first: usize,
    last: usize,
    alone: &Arc<HashMap<usize, String>>,
) -> Vec<Tally> {
    let (next, http) = (Arc::new(AtomicUsize::new(first)), reqwest::Client::new());
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let (next, http) = (Arc::clone(&next), http.clone());
            let (server, alone) = (Arc::clone(server), Arc::clone(alone));
            tokio::spawn(async move {
                let mut tally = Tally::default();
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= last {
                        return tally;
                    }
                    let job = job::job(index);
                    match client::run(&http, &server.url(job.path), &job).await {
                        Ok(outcome) => tally.add(&job, outcome, &alone),
                        Err(error) => panic!("request {index}: {error:#}\n{job:?}"),
                    }
                }
            })
        })
        .collect();
    let mut tallies = Vec::new();
    for client in clients {
        tallies.push(client.await.unwrap());
    }
    tallies
}

/// The server says that it is well, as long as it lives.
async fn watch(server: Arc<TestServer>) {
    let http = reqwest::Client::builder().pool_max_idle_per_host(0).build().unwrap();
    loop {
        for path in ["/health", "/metrics"] {
            let answer = http.get(server.url(path)).send().await.unwrap();
            assert_eq!(answer.status(), 200, "{path}");
            assert!(!answer.text().await.unwrap().is_empty(), "{path}");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn settled(server: &Arc<TestServer>) -> EngineStats {
    let engine = server.engine().clone();
    let idle = |stats: &EngineStats| stats.running == 0 && stats.waiting == 0;
    tokio::task::spawn_blocking(move || eventually(&engine, idle)).await.unwrap().unwrap()
}

async fn soak(requests: usize) {
    let start = || TestServer::start(ServerOptions { launch: launch_options(), ..ServerOptions::default() });
    let server = Arc::new(tokio::task::block_in_place(start).unwrap());
    let started = Instant::now();
    let mut alone = HashMap::new();
    let mut sum = Tally::default();
    for prompt in 0..job::GREEDY_PROMPTS {
        let job = job::greedy(prompt, false);
        let http = reqwest::Client::new();
        let Outcome::Complete { texts, tokens } =
            client::run(&http, &server.url(job.path), &job).await.unwrap()
        else {
            panic!("{job:?}")
        };
        (sum.complete, sum.choices, sum.tokens) = (sum.complete + 1, sum.choices + 1, sum.tokens + tokens);
        alone.insert(prompt, texts[0].clone());
    }
    let alone = Arc::new(alone);

    let mut prints: Vec<Footprint> = Vec::new();
    for number in 0..ROUNDS {
        let watching = tokio::spawn(watch(Arc::clone(&server)));
        let (first, last) = (number * requests / ROUNDS, (number + 1) * requests / ROUNDS);
        for tally in round(&server, first, last, &alone).await {
            sum.complete += tally.complete;
            sum.choices += tally.choices;
            sum.tokens += tally.tokens;
            sum.left += tally.left;
            sum.choices_left += tally.choices_left;
            sum.refused += tally.refused;
            sum.greedy += tally.greedy;
            sum.same += tally.same;
        }
        assert!(!watching.is_finished(), "the server was not well: {:?}", watching.await);
        watching.abort();
        let stats = settled(&server).await;
        assert_eq!((stats.pages_used, stats.failed), (0, 0), "{stats:?}");
        prints.push(footprint::settled().await);
        println!("{last:>6} requests, {:>5.1} s: {}", started.elapsed().as_secs_f64(), prints[number]);
    }

    let stats = server.engine().stats();
    println!("{sum:?}\n{stats:?}");
    assert_eq!(sum.complete + sum.left + sum.refused, requests + job::GREEDY_PROMPTS);
    assert!(
        sum.left * 20 >= requests && sum.refused * 30 >= requests && sum.complete * 2 >= requests,
        "{sum:?}"
    );
    // A choice that a stop string ended is cancelled for the engine; of those whose clients left, some never reached it.
    let ended = (stats.finished + stats.cancelled) as usize;
    assert!((sum.choices..=sum.choices + sum.choices_left).contains(&ended), "{ended} ended: {sum:?}");
    assert!(stats.finished as usize >= sum.choices / 2 && stats.cancelled > 0, "{stats:?}");
    assert!(stats.generated_tokens as usize >= sum.tokens, "{stats:?}: {sum:?}");
    assert!(stats.preemptions > 0 && stats.cached_tokens > 0 && stats.steps_ahead > 0, "{stats:?}");
    assert!(stats.pages_cached <= stats.pages_total && stats.pages_total == PAGES, "{stats:?}");

    println!("{} of {} greedy answers are those that the prompts gave alone", sum.same, sum.greedy);
    // On a GPU the order of a sum depends on the size of the step, and one rounding can flip a choice.
    let least = if device() == Device::Cpu { sum.greedy } else { sum.greedy / 2 };
    assert!(sum.greedy > 0 && sum.same >= least, "{} of {}", sum.same, sum.greedy);

    let (warm, end) = (&prints[0], &prints[ROUNDS - 1]);
    assert!(end.files <= warm.files, "file descriptors: {warm}, then {end}");
    assert!(end.threads <= warm.threads + POOLED, "threads: {warm}, then {end}");
    assert!(end.resident <= warm.resident + GROWTH, "memory: {warm}, then {end}");
    let free = |print: &Footprint| print.device_free.unwrap_or(0);
    assert!(free(end) + DEVICE_GROWTH >= free(warm), "the device's memory: {warm}, then {end}");

    // Every page can be had again: the longest context that there is.
    let long = job::longest();
    let outcome = client::run(&reqwest::Client::new(), &server.url(long.path), &long).await.unwrap();
    assert!(matches!(outcome, Outcome::Complete { .. }), "{outcome:?}");
    tokio::task::block_in_place(|| drop(server));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_hour_of_service() {
    soak(250).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a minute on a GPU"]
async fn a_day_of_service() {
    let requests = std::env::var("DSA80_SOAK_REQUESTS").map_or(20_000, |number| number.parse().unwrap());
    soak(requests).await;
}
