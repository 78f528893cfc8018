//! `bench serve` against our own server, and against one that does everything wrong.

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use clap::Parser;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::mock::{self, MockEngine, MockOptions};
use crate::{ServedModel, ServerOptions, ServerState};

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    args: ServeArgs,
}

fn args(url: &str, more: &str) -> ServeArgs {
    let words = ["bench", "--base-url", url].into_iter().chain(more.split_whitespace());
    Cli::try_parse_from(words).unwrap().args
}

/// Our server over an engine that recites.
async fn served(mock: MockOptions, api_keys: &[&str]) -> (String, Arc<MockEngine>) {
    let engine = MockEngine::new(mock);
    let model = ServedModel { text: Arc::new(mock::text_model()), engine: engine.handle() };
    let api_keys = api_keys.iter().map(|&key| key.to_owned()).collect();
    let options = ServerOptions { model_names: vec!["reciter".into()], api_keys, ..ServerOptions::default() };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(crate::serve(listener, ServerState::ready_with(options, model), pending()));
    (url, engine)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_still_loading_is_waited_for_up_to_a_limit() {
    let engine = MockEngine::new(MockOptions::default());
    let model = ServedModel { text: Arc::new(mock::text_model()), engine: engine.handle() };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let state = ServerState::new(ServerOptions::default());
    tokio::spawn(crate::serve(listener, state.clone(), pending()));
    let load = "--num-requests 2 --warmup 0 --input-len 8 --output-len 4 --vocab-size 256";
    // Also where the model's name need not be asked for.
    for more in ["", "--model reciter"] {
        let error = measure(&args(&url, &format!("{load} --wait 1 {more}"))).await.unwrap_err().to_string();
        for words in ["503", "being loaded", "not ready after 1 s; --wait SECONDS waits longer"] {
            assert!(error.contains(words), "{error}");
        }
    }
    let waiting = args(&url, &format!("{load} --wait 60"));
    let waiting = tokio::spawn(async move { measure(&waiting).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    state.set_ready(model);
    assert_eq!(waiting.await.unwrap().unwrap().completed, 2);
}

fn slow() -> MockOptions {
    MockOptions {
        start_delay: Duration::from_millis(30),
        token_delay: Duration::from_millis(10),
        ..MockOptions::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_is_measured_as_it_is() {
    let (url, engine) = served(slow(), &["sesame"]).await;
    let load =
        "--num-requests 12 --concurrency 4 --warmup 2 --input-len 20-40 --output-len 6 --vocab-size 256";
    let args = args(&url, &format!("{load} --ignore-eos --api-key sesame"));
    let report = measure(&args).await.unwrap();
    assert_eq!((report.requests, report.completed), (12, 12), "{:?}", report.errors);
    assert_eq!((report.uncounted, report.shorter, report.conditions.model.as_str()), (0, 0, "reciter"));
    let seen = engine.requests();
    assert_eq!(seen.len(), 14, "the warm-up is not measured");
    let input: usize = seen[2..].iter().map(|request| request.prompt.len()).sum();
    assert_eq!((report.input_tokens, report.output_tokens), (input, 12 * 6));
    assert!(seen.iter().all(|request| (20..=40).contains(&request.prompt.len()) && request.ignore_eos));
    // No less than the server takes; how much more depends on what else the machine does.
    let [first, gap, per_token, total] = [
        report.time_to_first_token,
        report.inter_token_latency,
        report.time_per_output_token,
        report.end_to_end,
    ]
    .map(Option::unwrap);
    assert!(first.p50 >= 40.0 && gap.mean >= 9.0 && per_token.p50 >= 9.0 && total.p50 >= 90.0, "{report:?}");
    assert!(first.p50 < total.p50 && total.p50 <= total.p99 && total.p99 <= total.max, "{report:?}");
    // Four at a time, three times.
    assert!(report.seconds >= 0.27, "{}", report.seconds);
    assert!((report.output_tokens_per_s * report.seconds - 72.0).abs() < 1e-6);
    let text = report.text();
    for words in ["reciter at http://", "4 at a time, 20-40 tokens in", "12 of 12 requests", "errors: none"] {
        assert!(text.contains(words), "{words} is not in\n{text}");
    }
    let json = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<ServeReport>(&json).unwrap().each.len(), 12);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_at_a_rate_do_not_wait_for_each_other() {
    let (url, _engine) = served(MockOptions { token_delay: Duration::from_millis(100), ..slow() }, &[]).await;
    let load =
        "--num-requests 20 --request-rate 200 --warmup 0 --input-len 8 --output-len 4 --vocab-size 256";
    let report = measure(&args(&url, &format!("{load} --ignore-eos"))).await.unwrap();
    assert_eq!(report.completed, 20, "{:?}", report.errors);
    // One after the other they would take more than eight seconds.
    assert!(report.seconds < 4.0 && report.end_to_end.unwrap().p50 >= 400.0, "{report:?}");
    assert!(report.late.is_some() && report.conditions.concurrency.is_none());
    assert!(report.text().contains("200 requests a second (Poisson)"), "{}", report.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn words_come_to_as_many_tokens_as_asked_for() {
    let (url, engine) = served(MockOptions { max_model_len: 8000, ..MockOptions::default() }, &[]).await;
    for endpoint in ["chat", "completions --prompts words"] {
        let load =
            format!("--endpoint {endpoint} --num-requests 4 --warmup 0 --input-len 600 --output-len 50");
        let report = measure(&args(&url, &load)).await.unwrap();
        assert_eq!((report.completed, report.shorter), (4, 4), "the script is shorter: {:?}", report.errors);
        assert!(report.conditions.tokens_of_words.is_some());
        for request in engine.requests().iter().rev().take(4) {
            assert!((540..660).contains(&request.prompt.len()), "{} tokens", request.prompt.len());
        }
        assert!(report.text().contains("--ignore-eos asks for all of it"), "{}", report.text());
    }
}

const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";

fn piece(text: &str) -> String {
    format!("data: {{\"choices\": [{{\"index\": 0, \"text\": \"{text}\", \"finish_reason\": null}}]}}\n\n")
}

/// What the odd server answers, by the number of the request, and what it is counted as. A line says where it pauses.
fn odd(number: usize) -> (String, &'static str) {
    let error = "{\"error\": {\"message\": \"come back later\", \"type\": \"x\"}}";
    let plain = |status: &str, kind: &str, body: &str| {
        let length = body.len();
        format!(
            "HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
        )
    };
    let two = [piece("a"), piece("b")].concat();
    match number {
        0 => (plain("429 Too Many Requests", "application/json", error), "http 429"),
        1 => (plain("500 Internal Server Error", "text/html", "<h1>oops</h1>"), "http 500"),
        2 => (plain("200 OK", "application/json", "{}"), "malformed"),
        // In the middle of a stream: closed, cut off in an event, garbage, an error.
        3 => (format!("{HEAD}{two}"), "disconnected"),
        4 => (format!("{HEAD}{two}data: {{\"choi"), "disconnected"),
        5 => (format!("{HEAD}{two}data: choices!\n\n"), "malformed"),
        6 => (format!("{HEAD}{two}data: {error}\n\ndata: [DONE]\n\n"), "error event"),
        7 => (format!("{HEAD}data: [DONE]\n\n"), "empty"),
        8 => (format!("{HEAD}{two}\u{0}{two}"), "timed out"),
        9 => (String::new(), "disconnected"),
        // A chunked body that is not ended as it should be.
        10 => (
            format!("{}5\r\ndata:\r\n", HEAD.replace("connection: close", "transfer-encoding: chunked")),
            "disconnected",
        ),
        // Well enough: no counts, other line ends, comments, and an end without [DONE].
        11 => (format!("{HEAD}{}", format!(": hi\n\n{two}data: [DONE]\n\n").replace('\n', "\r\n")), ""),
        _ => {
            let end =
                "data: {\"choices\": [{\"index\": 0, \"text\": \"\", \"finish_reason\": \"stop\"}]}\n\n";
            (format!("{HEAD}{two}{end}"), "")
        }
    }
}

async fn answer(mut stream: TcpStream, number: usize) {
    let (mut seen, mut bytes) = (Vec::new(), [0; 4096]);
    // The request's head and body come together, and its JSON ends with a brace.
    while !seen.ends_with(b"}") {
        match stream.read(&mut bytes).await {
            Ok(0) | Err(_) => return,
            Ok(count) => seen.extend_from_slice(&bytes[..count]),
        }
    }
    let answer = odd(number).0;
    for (index, part) in answer.split('\u{0}').enumerate() {
        if index > 0 {
            tokio::time::sleep(Duration::from_secs(30)).await;
        }
        // The client may have gone.
        let _ = stream.write_all(part.as_bytes()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_wrong_is_counted_by_kind() {
    const REQUESTS: usize = 13;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1/", listener.local_addr().unwrap());
    let number = AtomicUsize::new(0);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(answer(stream, number.fetch_add(1, Ordering::Relaxed)));
        }
    });
    let load =
        format!("--model odd --wait 0 --num-requests {REQUESTS} --warmup 0 --timeout 1.5 --input-len 3");
    let report = measure(&args(&url, &load)).await.unwrap();
    for (number, request) in report.each.iter().enumerate() {
        println!("{number}: {:?}", request);
    }
    let mut expected: std::collections::BTreeMap<String, usize> = Default::default();
    for kind in (0..REQUESTS).map(|number| odd(number).1).filter(|kind| !kind.is_empty()) {
        *expected.entry(kind.to_owned()).or_default() += 1;
    }
    let found: std::collections::BTreeMap<String, usize> =
        report.errors.iter().map(|(kind, failures)| (kind.clone(), failures.count)).collect();
    assert_eq!(found, expected, "{}", report.errors_in_words());
    assert_eq!((report.requests, report.completed, report.uncounted), (REQUESTS, 2, 2));
    // Two pieces each, and the prompts as long as asked for.
    assert_eq!(
        (report.output_tokens, report.input_tokens, report.inter_token_latency.is_some()),
        (4, 6, true)
    );
    assert_eq!(report.errors["http 429"].first, "HTTP 429: come back later");
    assert!(report.errors["http 500"].first.contains("<h1>oops</h1>"), "{:?}", report.errors);
    let text = report.text();
    assert!(text.contains("2 of 13 requests") && text.contains("1 timed out"), "{text}");
    assert!(text.contains("2 answers came without usage"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_be_asked_is_an_error_that_says_so() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let nobody = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let (keyed, _engine) = served(MockOptions::default(), &["sesame"]).await;
    for (url, more, words) in [
        ("https://api.openai.com", "", "plain HTTP"),
        ("localhost:8000", "", "http://127.0.0.1:8000"),
        (nobody.as_str(), "", "is a server running there?"),
        (keyed.as_str(), "", "--api-key"),
        (keyed.as_str(), "--endpoint chat --prompts ids", "--prompts words"),
    ] {
        let error = measure(&args(url, more)).await.unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains(words), "{url} {more}: {error}");
    }
    let report = measure(&args(&nobody, "--model m --num-requests 3 --warmup 0")).await.unwrap();
    assert_eq!((report.completed, report.errors["no connection"].count), (0, 3), "{:?}", report.errors);
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let parse = |more: &str| {
        Cli::try_parse_from(["bench"].into_iter().chain(more.split_whitespace())).map(|cli| cli.args.pace())
    };
    assert_eq!(parse("").unwrap(), Pace::Concurrency(1));
    assert_eq!(parse("--concurrency 8").unwrap(), Pace::Concurrency(8));
    assert_eq!(parse("--request-rate 2.5 --seed 4").unwrap(), Pace::Rate { rate: 2.5, seed: 4 });
    for more in [
        "--request-rate 2 --concurrency 3",
        "--request-rate 0",
        "--request-rate inf",
        "--concurrency 0",
        "--num-requests 0",
        "--input-len 9-3",
        "--endpoint responses",
        "--timeout -1",
    ] {
        assert!(parse(more).is_err(), "{more}");
    }
}
