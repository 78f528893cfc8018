//! The requests of lm-evaluation-harness's `local-completions` model: token ids, echo, log-probabilities; and that the
//! numbers it would add up are those that HF transformers computes in float64.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use anyhow::{Context, Result};
use dsa80_tests::fixture::{self, Fixture};
use dsa80_tests::server::{ServerOptions, TestServer};
use serde_json::{Value, json};

/// Twenty times HF float32's own largest distance from HF float64 on this fixture, a token.
const TOLERANCE_PER_TOKEN: f64 = 5e-5;

struct Harness {
    server: TestServer,
    model: String,
    http: reqwest::Client,
}

impl Harness {
    async fn start() -> Result<Self> {
        let server = TestServer::start(ServerOptions::default())?;
        let http = reqwest::Client::new();
        let models: Value = http.get(server.url("/v1/models")).send().await?.json().await?;
        let model = models["data"][0]["id"].as_str().context("no model")?.to_owned();
        Ok(Self { server, model, http })
    }

    /// Posts what the harness posts for log-likelihoods, with `more` on top, and returns the choices by index.
    async fn choices(&self, prompts: &[Vec<u32>], more: Value) -> Vec<Value> {
        let mut body = json!({
            "model": self.model, "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234,
            "echo": true,
        });
        for (field, value) in more.as_object().unwrap() {
            body[field] = value.clone();
        }
        let response = self.http.post(self.server.url("/v1/completions")).json(&body).send().await.unwrap();
        let (status, text) = (response.status(), response.text().await.unwrap());
        assert_eq!(status, 200, "{text}");
        let answer: Value = serde_json::from_str(&text).unwrap();
        let mut choices = answer["choices"].as_array().unwrap().clone();
        choices.sort_by_key(|choice| choice["index"].as_u64());
        let indices: Vec<_> = choices.iter().map(|choice| choice["index"].as_u64().unwrap()).collect();
        assert_eq!(indices, (0..prompts.len() as u64).collect::<Vec<_>>());
        choices
    }
}

fn floats(values: &Value) -> Vec<f64> {
    values.as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
}

/// Log-probability of `token` in row `row` of the golden logits.
fn golden(fixture: &Fixture, row: usize, token: u32) -> f64 {
    let logits = &fixture.logits[row * fixture.vocab_size..(row + 1) * fixture.vocab_size];
    let best = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|logit| (logit - best).exp()).sum();
    logits[token as usize] - best - sum.ln()
}

#[tokio::test(flavor = "multi_thread")]
async fn log_likelihoods_are_those_of_hf_in_float64() {
    let harness = Harness::start().await.unwrap();
    let fixture = Fixture::open(fixture::root().join("default")).unwrap();
    // Prefixes of the golden prompt, as (context, continuation), not in order of length.
    let cases = [(100, 44), (1, 3), (139, 5), (20, 60), (70, 1)];
    let prompts: Vec<_> =
        cases.iter().map(|(context, more)| fixture.tokens[..context + more].to_vec()).collect();
    for (max_tokens, top) in [(1, 1), (0, 1), (1, 5), (0, 5)] {
        let choices = harness.choices(&prompts, json!({"max_tokens": max_tokens, "logprobs": top})).await;
        for ((choice, prompt), (context, more)) in choices.iter().zip(&prompts).zip(cases) {
            let logprobs = &choice["logprobs"];
            let count = prompt.len() + max_tokens;
            for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
                assert_eq!(
                    logprobs[list].as_array().unwrap().len(),
                    count,
                    "{list} of {more} after {context}"
                );
            }
            assert!(logprobs["token_logprobs"][0].is_null() && logprobs["top_logprobs"][0].is_null());
            assert_eq!(choice["finish_reason"], "length");
            // What the harness sums up for a continuation, and HF's own sum.
            let all = floats(&json!(logprobs["token_logprobs"].as_array().unwrap()[1..]));
            let scored = &all[context - 1..context + more - 1];
            let expected: Vec<_> =
                (context..context + more).map(|i| golden(&fixture, i - 1, prompt[i])).collect();
            for (i, (found, expected)) in scored.iter().zip(&expected).enumerate() {
                let place = format!("token {i} of {more} after {context}");
                assert!((found - expected).abs() <= TOLERANCE_PER_TOKEN, "{place}: {found}, HF {expected}");
            }
            let difference = (scored.iter().sum::<f64>() - expected.iter().sum::<f64>()).abs();
            assert!(difference <= TOLERANCE_PER_TOKEN * more as f64, "{more} after {context}: {difference}");
            // What it reads to know whether the continuation is the greedy one.
            for (i, best) in logprobs["top_logprobs"].as_array().unwrap().iter().enumerate().skip(1) {
                let best = best.as_object().unwrap();
                let own = logprobs["token_logprobs"][i].as_f64().unwrap();
                let highest = best.values().map(|value| value.as_f64().unwrap()).fold(f64::MIN, f64::max);
                assert!(highest >= own && best.len() <= top + 1, "token {i}: {own}, {best:?}");
                let token = logprobs["tokens"][i].as_str().unwrap();
                assert_eq!(best.get(token).and_then(Value::as_f64), Some(own), "token {i}: {best:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_can_be_told_by_id() {
    let harness = Harness::start().await.unwrap();
    let prompts = [vec![3, 700, 12, 12], vec![9]];
    let by_id =
        json!({"return_tokens_as_token_ids": true, "logprobs": 5, "max_tokens": 3, "ignore_eos": true});
    for (choice, prompt) in harness.choices(&prompts, by_id).await.iter().zip(&prompts) {
        let tokens = choice["logprobs"]["tokens"].as_array().unwrap();
        let ids: Vec<u32> = tokens
            .iter()
            .map(|token| token.as_str().unwrap().strip_prefix("token_id:").unwrap().parse().unwrap())
            .collect();
        assert_eq!(ids[..prompt.len()], prompt[..]);
        assert_eq!(ids.len(), prompt.len() + 3);
        for (i, best) in choice["logprobs"]["top_logprobs"].as_array().unwrap().iter().enumerate().skip(1) {
            let best = best.as_object().unwrap();
            // By id no two alternatives share a name: five, and the token itself where it is not among them.
            assert!(best.len() == 5 || best.len() == 6, "{best:?}");
            assert!(best.keys().all(|name| name.starts_with("token_id:")), "{best:?}");
            // Those generated are greedy.
            if i >= prompt.len() {
                let highest =
                    best.iter().max_by(|a, b| a.1.as_f64().unwrap().total_cmp(&b.1.as_f64().unwrap()));
                assert_eq!(highest.map(|(name, _)| name.as_str()), tokens[i].as_str(), "{best:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lengths_can_be_commanded() {
    let harness = Harness::start().await.unwrap();
    // An end-of-sequence id that wins every time.
    let eos = json!({"748": 100});
    let plain = json!({"max_tokens": 9, "logit_bias": eos, "echo": false, "logprobs": null});
    let with = |field: &str, value: Value| {
        let mut more = plain.clone();
        more[field] = value;
        more
    };
    let ids = json!({"return_tokens_as_token_ids": true, "logprobs": 0});
    for (more, length, reason) in [
        (plain.clone(), 1, "stop"),
        (with("ignore_eos", json!(true)), 9, "length"),
        (with("min_tokens", json!(4)), 5, "stop"),
        (with("min_tokens", json!(9)), 9, "length"),
    ] {
        let mut counted = more.clone();
        counted.as_object_mut().unwrap().extend(ids.as_object().unwrap().clone());
        let choice = harness.choices(&[vec![5, 6, 7]], counted).await.remove(0);
        let tokens = choice["logprobs"]["tokens"].as_array().unwrap().len();
        assert_eq!((tokens, choice["finish_reason"].as_str()), (length, Some(reason)), "{more}: {choice}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_batch_keeps_its_order() {
    let harness = Harness::start().await.unwrap();
    // More prompts than run at once.
    let prompts: Vec<Vec<u32>> = (0..70).map(|i| vec![i as u32 + 5; 1 + (i * 29) % 40]).collect();
    let more = json!({"max_tokens": 0, "logprobs": 1, "return_tokens_as_token_ids": true});
    for (choice, prompt) in harness.choices(&prompts, more).await.iter().zip(&prompts) {
        let tokens = choice["logprobs"]["tokens"].as_array().unwrap();
        assert_eq!(tokens.len(), prompt.len());
        assert!(tokens.iter().all(|token| *token == format!("token_id:{}", prompt[0])), "{tokens:?}");
    }
}
