//! The server over the backend.

use dsa80_model::launch::{Device, LaunchOptions};
use dsa80_tests::parity::devices;
use dsa80_tests::server::{ServerOptions, TestServer};
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread")]
async fn the_server_answers_on_a_gpu() {
    if devices::gpu().is_none() {
        return;
    }
    let launch = LaunchOptions { device: Device::Cuda, ..LaunchOptions::default() };
    let start = || TestServer::start(ServerOptions { launch, ..ServerOptions::default() });
    let server = tokio::task::block_in_place(start).unwrap();
    let client = reqwest::Client::new();
    let ask = |seed: u64| {
        let body = json!({
            "messages": [{"role": "user", "content": "What is 17 x 24?"}],
            "max_tokens": 32, "seed": seed, "temperature": 0.8, "top_p": 0.9, "logprobs": true, "top_logprobs": 3,
        });
        client.post(server.url("/v1/chat/completions")).json(&body).send()
    };
    // Eight at once.
    let answers = futures::future::join_all((0..8).map(ask)).await;
    for answer in answers {
        let answer = answer.unwrap();
        assert_eq!(answer.status(), 200);
        let answer: Value = answer.json().await.unwrap();
        let tokens = answer["usage"]["completion_tokens"].as_u64().unwrap();
        assert!((1..=32).contains(&tokens), "{answer}");
        let logprobs = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
        assert!(!logprobs.is_empty(), "{answer}");
        for token in logprobs {
            let logprob = token["logprob"].as_f64().unwrap();
            assert!(logprob.is_finite() && logprob <= 0.0, "{token}");
            assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 3, "{token}");
        }
    }
    tokio::task::block_in_place(|| drop(server));
}
