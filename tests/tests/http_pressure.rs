//! Clients that go away, and clients that all come at once.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::time::Duration;

use dsa80_model::engine::EngineStats;
use dsa80_model::launch::LaunchOptions;
use dsa80_tests::engine::{eventually, options};
use dsa80_tests::server::{ServerOptions, TestServer};
use futures::StreamExt;
use futures::future::join_all;
use serde_json::{Value, json};

/// Short steps, so that a request can go away between two of them; one request runs, others wait.
fn one_at_a_time() -> LaunchOptions {
    LaunchOptions { max_num_seqs: 1, max_num_batched_tokens: 32, ..options() }
}

fn start(launch: LaunchOptions) -> TestServer {
    TestServer::start(ServerOptions { launch, ..ServerOptions::default() }).unwrap()
}

fn request(server: &TestServer, prompt_tokens: usize, more: Value) -> reqwest::RequestBuilder {
    let mut body = json!({"prompt": vec![11; prompt_tokens], "max_tokens": 8, "ignore_eos": true});
    for (field, value) in more.as_object().unwrap() {
        body[field] = value.clone();
    }
    // A client of its own: no connection is shared or kept.
    reqwest::Client::new().post(server.url("/v1/completions")).json(&body)
}

/// Waits off the runtime's threads.
async fn until(server: &TestServer, holds: impl Fn(&EngineStats) -> bool + Send + 'static) -> EngineStats {
    let engine = server.engine().clone();
    tokio::task::spawn_blocking(move || eventually(&engine, holds)).await.unwrap().unwrap()
}

/// The client goes away: before the answer's headers, or, where a stream has sent them at once, after.
fn leave<T>(client: tokio::task::JoinHandle<T>) {
    client.abort();
}

async fn metric(server: &TestServer, name: &str) -> f64 {
    let text = reqwest::get(server.url("/metrics")).await.unwrap().text().await.unwrap();
    let line = text.lines().find(|line| line.split([' ', '{']).next() == Some(name));
    let line = line.unwrap_or_else(|| panic!("no {name} in\n{text}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_before_the_first_token_frees_its_request() {
    let server = start(one_at_a_time());
    for (gone, stream) in [(1, false), (2, true)] {
        // A prompt of a few seconds.
        let running = tokio::spawn(request(&server, 8000, json!({"stream": stream})).send());
        until(&server, |stats| stats.running == 1).await;
        let waiting = tokio::spawn(request(&server, 8000, json!({"stream": stream})).send());
        until(&server, |stats| stats.waiting == 1).await;
        // First the one that waits, then the one that runs.
        leave(waiting);
        until(&server, move |stats| stats.waiting == 0 && stats.cancelled == 2 * gone - 1).await;
        leave(running);
        let stats = until(&server, |stats| stats.running == 0).await;
        assert_eq!((stats.cancelled, stats.finished, stats.generated_tokens), (2 * gone, 0, 0), "{stats:?}");
        assert_eq!(stats.pages_used, 0, "{stats:?}");
    }
    assert_eq!(metric(&server, "dsa80_requests_running").await, 0.0);
    let answer = request(&server, 5, json!({})).send().await.unwrap();
    assert_eq!(answer.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_in_the_middle_of_a_stream_frees_all_choices() {
    let server = start(options());
    let more = json!({"stream": true, "max_tokens": 4000, "n": 3, "seed": 1});
    let mut body = request(&server, 20, more).send().await.unwrap().bytes_stream();
    for _ in 0..4 {
        assert!(body.next().await.unwrap().unwrap().starts_with(b"data: "));
    }
    assert_eq!(server.engine().stats().running, 3);
    drop(body);
    let stats = until(&server, |stats| stats.running == 0).await;
    assert_eq!((stats.cancelled, stats.finished, stats.pages_used), (3, 0, 0), "{stats:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_beyond_the_queue_is_told_to_come_back() {
    let server = start(LaunchOptions { max_waiting: 6, max_num_seqs: 2, ..options() });
    let burst = join_all((0..40).map(|_| request(&server, 40, json!({})).send())).await;
    let (mut served, mut refused) = (0, 0);
    for response in burst {
        let response = response.unwrap();
        let retry_after = response.headers().get("retry-after").cloned();
        match response.status().as_u16() {
            200 => served += 1,
            429 => {
                refused += 1;
                let seconds: u64 = retry_after.unwrap().to_str().unwrap().parse().unwrap();
                assert!((1..=60).contains(&seconds), "{seconds}");
                let body: Value = response.json().await.unwrap();
                assert_eq!(body["error"]["code"], "rate_limit_exceeded", "{body}");
                assert!(body["error"]["message"].as_str().unwrap().contains("queue is full"), "{body}");
            }
            other => panic!("{other}"),
        }
    }
    println!("a burst of 40 on 2 running and 6 waiting: {served} served, {refused} told to come back");
    // What fits is served, whatever else comes.
    assert!(served >= 6 && refused >= 1, "{served} served, {refused} refused");
    let stats = until(&server, |stats| stats.running == 0 && stats.waiting == 0).await;
    assert_eq!((stats.finished, stats.cancelled, stats.pages_used), (served, 0, 0), "{stats:?}");
    // Afterwards there is room again; and one request of more choices than the queue can ever hold is told
    // so, and leaves nothing behind.
    let refused = request(&server, 40, json!({"n": 30, "max_tokens": 200})).send().await.unwrap();
    assert_eq!(refused.status(), 400);
    let body: Value = refused.json().await.unwrap();
    assert!(body["error"]["message"].as_str().unwrap().contains("30 places in a queue of 6"), "{body}");
    let stats = until(&server, |stats| stats.running == 0 && stats.waiting == 0).await;
    assert_eq!((stats.finished, stats.pages_used), (served, 0), "{stats:?}");
    assert_eq!(request(&server, 40, json!({})).send().await.unwrap().status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_says_so_and_finishes_what_it_has() {
    let server = start(options());
    let health = reqwest::get(server.url("/health")).await.unwrap();
    assert_eq!(
        (health.status().as_u16(), health.json::<Value>().await.unwrap()["status"].clone()),
        (200, json!("ready"))
    );
    let running = tokio::spawn(request(&server, 40, json!({"max_tokens": 300})).send());
    until(&server, |stats| stats.running == 1).await;
    let (health, refused) = (server.url("/health"), request(&server, 3, json!({})));
    let stopped = tokio::task::spawn_blocking(move || drop(server));
    let mut draining = Value::Null;
    for _ in 0..100 {
        // Once it has stopped nobody answers.
        let Ok(response) = reqwest::get(&health).await else { break };
        draining = response.json().await.unwrap();
        if draining["status"] == "draining" {
            let refused = refused.send().await.unwrap();
            assert_eq!(refused.status(), 503);
            assert!(refused.headers().contains_key("retry-after"));
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(draining["status"], "draining", "{draining}");
    let answer = running.await.unwrap().unwrap();
    assert_eq!(answer.status(), 200);
    let answer: Value = answer.json().await.unwrap();
    assert_eq!(answer["usage"]["completion_tokens"], 300, "{answer}");
    stopped.await.unwrap();
}
