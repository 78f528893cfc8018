//! Everything that is refused, and how.

use axum::body::Body;
use axum::http::{Request, StatusCode};
use dsa80_model::engine;
use dsa80_serve::ServerOptions;
use dsa80_serve::mock::MockOptions;
use dsa80_serve::openai::{Endpoints, refusals};
use expect_test::expect;
use serde_json::{Value as Json, json};

use super::client::{Server, over, post};

#[tokio::test]
async fn every_unsupported_field_is_a_400_that_names_it() {
    let server = Server::reciting("x");
    for (path, base, endpoint) in [
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "hi"}]}), Endpoints::Chat),
        ("/v1/completions", json!({"prompt": "hi"}), Endpoints::Completions),
    ] {
        for refusal in refusals(endpoint) {
            let error =
                server.post(path, over(base.clone(), json!({refusal.name: {"x": 1}}))).await.error(400);
            assert_eq!(error["param"], refusal.name);
            assert_eq!(error["code"], "unsupported_parameter");
            assert_eq!(error["type"], "invalid_request_error");
        }
    }
    assert!(server.engine.requests().is_empty(), "nothing reached the engine");
}

#[tokio::test]
async fn more_refusals() {
    let server = Server::reciting("x");
    let image = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]);
    for (fields, param) in [
        (json!({"messages": []}), "messages"),
        (json!({"messages": image}), "messages[0].content[0].type"),
        (json!({"messages": [{"role": "function", "content": "x"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user", "content": 3}]}), "messages[0].content"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        (json!({"reasoning_effort": "high"}), "reasoning_effort"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"logprobs": 3}), "logprobs"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": -1}), "max_tokens"),
        (json!({"max_tokens": 3, "min_tokens": 4}), "min_tokens"),
        (json!({"logit_bias": {"99999": 1}}), "logit_bias"),
        (json!({"stop_token_ids": [99999]}), "stop_token_ids"),
        (json!({"stop": 3}), "stop"),
        (json!({"n": 2, "best_of": 4}), "best_of"),
        (json!({"echo": true}), "echo"),
        (json!({"chat_template_kwargs": {"messages": []}}), "chat_template_kwargs"),
        (json!({"add_generation_prompt": true, "continue_final_message": true}), "continue_final_message"),
        (json!({"temperature": "warm"}), "temperature"),
        (json!({"seed": 1.5}), "seed"),
    ] {
        let error = server.chat(fields.clone()).await.error(400);
        assert_eq!(error["param"], param, "{fields} {error}");
    }
    for (fields, param) in [
        (json!({"prompt": [1, 99999]}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": [[1], []]}), "prompt"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"stream": true, "prompt_logprobs": 1}), "prompt_logprobs"),
    ] {
        let error = server.complete(fields.clone()).await.error(400);
        assert_eq!(error["param"], param, "{fields} {error}");
    }
    assert_eq!(server.post("/v1/completions", json!({})).await.error(400)["param"], "prompt");
    // The first prompt of the batch was taken before the empty one was found; it must not go on.
    super::lifecycle::eventually(|| server.engine.handle().stats().running == 0).await;
}

#[tokio::test]
async fn harmless_and_unknown_fields_pass() {
    let server = Server::reciting("x");
    let fields = json!({
        "user": "u", "metadata": {"a": "b"}, "store": true, "service_tier": "auto", "safety_identifier": "s",
        "prompt_cache_key": "k", "tools": [], "tool_choice": "none", "response_format": {"type": "text"},
        "parallel_tool_calls": false, "modalities": ["text"], "logit_bias": null, "stop": null, "seed": null,
        "frequency_penalty": 0, "something_new": {"deep": 1},
    });
    server.chat(fields).await.ok();
}

#[tokio::test]
async fn messages_say_what_was_expected_and_found() {
    let server = Server::new(MockOptions { max_model_len: 10, ..MockOptions::default() });
    let text =
        async |fields: Json| server.chat(fields).await.error(400)["message"].as_str().unwrap().to_owned();
    expect!["messages[0].role: unknown variant `function`, expected one of `system`, `developer`, `user`, `assistant`, `tool`."]
        .assert_eq(&text(json!({"messages": [{"role": "function", "content": "x"}]})).await);
    expect!["temperature must be between 0 and 100, found -1."]
        .assert_eq(&text(json!({"temperature": -1})).await);
    expect!["This model's maximum context length is 10 tokens, but you asked for 12 tokens (4 in the prompt, 8 to generate). Shorten the prompt or the output."]
        .assert_eq(&text(json!({"max_tokens": 8})).await);
    expect!["This model's maximum context length is 10 tokens, but your prompt has 13 tokens, which leaves no room to generate. Shorten the prompt or the output."]
        .assert_eq(&text(json!({"messages": [{"role": "user", "content": "x x x x x x"}]})).await);
    expect!["response_format is not supported by this server; only {\"type\": \"text\"} is."]
        .assert_eq(&text(json!({"response_format": {"type": "json_object"}})).await);
    expect!["max_tokens: invalid type: string \"3\", expected usize."]
        .assert_eq(&text(json!({"max_tokens": "3"})).await);
}

#[tokio::test]
async fn too_long_has_its_code() {
    let server = Server::new(MockOptions { max_model_len: 10, ..MockOptions::default() });
    let error = server.complete(json!({"max_tokens": 10})).await.error(400);
    assert_eq!(error["code"], "context_length_exceeded");
    assert_eq!(error["param"], "prompt");
    server.complete(json!({"max_tokens": 9})).await.ok();
    let prompt: Vec<u32> = vec![65; 10];
    assert_eq!(
        server.complete(json!({"prompt": prompt})).await.error(400)["code"],
        "context_length_exceeded",
        "no room for a single token"
    );
    server.complete(json!({"prompt": prompt, "max_tokens": 0, "echo": true, "logprobs": 1})).await.ok();
}

#[tokio::test]
async fn bodies_that_are_no_requests() {
    let server = Server::with(
        MockOptions::default(),
        ServerOptions { max_body_bytes: 200, ..ServerOptions::default() },
    );
    let error = server.post_text("/v1/chat/completions", "{\"messages\": [").await.error(400);
    assert_eq!(error["code"], "invalid_json");
    assert!(error["message"].as_str().unwrap().contains("line 1 column 14"), "{error}");
    server.post_text("/v1/chat/completions", "[]").await.error(400);
    server.post_text("/v1/chat/completions", "").await.error(400);

    let error = server.complete(json!({"prompt": "x".repeat(300)})).await.error(413);
    assert_eq!(error["code"], "request_too_large");
    assert!(error["message"].as_str().unwrap().contains("200 bytes"));

    let mut plain = post("/v1/completions", "{\"prompt\": \"x\"}".into());
    plain.headers_mut().insert("content-type", "text/plain".parse().unwrap());
    server.send(plain).await.error(415);
    let mut charset = post("/v1/completions", "{\"prompt\": \"x\"}".into());
    charset.headers_mut().insert("content-type", "application/json; charset=utf-8".parse().unwrap());
    assert_eq!(server.send(charset).await.status, StatusCode::OK);
}

#[tokio::test]
async fn paths_methods_and_models_that_do_not_exist() {
    let server = Server::reciting("x");
    assert_eq!(server.get("/v2/chat").await.error(404)["code"], "not_found");
    let reply = server.get("/v1/chat/completions").await;
    assert_eq!(reply.error(405)["code"], "method_not_allowed");
    assert_eq!(reply.headers["allow"], "POST");
    for path in ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"] {
        let body = json!({
            "model": "other", "messages": [{"role": "user", "content": "x"}], "prompt": "x", "tokens": [1],
        });
        let body = if path == "/tokenize" { json!({"model": "other", "prompt": "x"}) } else { body };
        let error = server.post(path, body).await.error(404);
        assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!("model")), "{path}");
        assert!(error["message"].as_str().unwrap().contains("m, org/m"));
    }
    server.get("/v1/models/other").await.error(404);
}

#[tokio::test]
async fn a_full_queue_is_a_429_with_a_time_to_come_back() {
    let server = Server::new(MockOptions {
        max_waiting: 2,
        start_delay: std::time::Duration::from_secs(60),
        ..MockOptions::default()
    });
    let request = engine::Request { prompt: vec![1], max_tokens: 1, ..engine::Request::default() };
    let held = server.engine.handle().submit(request).unwrap();
    let reply = server.complete(json!({"n": 2})).await;
    let error = reply.error(429);
    assert_eq!((&error["type"], &error["code"]), (&json!("rate_limit_error"), &json!("rate_limit_exceeded")));
    assert_eq!(reply.headers["retry-after"], "1");
    // The choice that found room must not stay behind.
    super::lifecycle::eventually(|| server.engine.handle().stats().running == 1).await;
    drop(held);
}

#[tokio::test]
async fn a_request_larger_than_the_queue_is_told_so_and_not_to_come_back() {
    let server = Server::new(MockOptions {
        max_waiting: 2,
        start_delay: std::time::Duration::from_secs(60),
        ..MockOptions::default()
    });
    for body in [json!({"n": 3}), json!({"prompt": ["a", "b", "c"]})] {
        let error = server.complete(body).await.error(400);
        assert_eq!(error["param"], "prompt");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("needs 3 places in a queue of 2"), "{message}");
    }
    super::lifecycle::eventually(|| server.engine.handle().stats().running == 0).await;
}

#[tokio::test]
async fn a_key_guards_everything_but_health() {
    let server = Server::with(
        MockOptions::default(),
        ServerOptions { api_keys: vec!["k1".into(), "k2".into()], ..ServerOptions::default() },
    );
    assert_eq!(server.get("/health").await.status, StatusCode::OK);
    for path in ["/v1/models", "/metrics", "/version", "/nowhere", "/v1/chat/completions"] {
        let reply = server.get(path).await;
        assert_eq!(reply.error(401)["code"], "invalid_api_key", "{path}");
        assert_eq!(reply.headers["www-authenticate"], "Bearer");
    }
    for path in ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"] {
        server.post(path, json!({})).await.error(401);
    }
    let with = |value: &str| {
        let request = Request::get("/v1/models").header("authorization", value);
        server.send(request.body(Body::empty()).unwrap())
    };
    for good in ["Bearer k1", "bearer k2"] {
        assert_eq!(with(good).await.status, StatusCode::OK, "{good}");
    }
    for bad in ["Bearer k3", "Bearer k", "Bearer k11", "Bearer ", "Basic k1", "k1"] {
        with(bad).await.error(401);
    }
}
