//! The small routes.

use axum::body::Body;
use axum::http::{Method, Request, StatusCode};
use dsa80_serve::ServerOptions;
use dsa80_serve::mock::{EOS, MockOptions};
use serde_json::json;

use super::client::{Server, post};

#[tokio::test]
async fn models_by_every_name() {
    let server = Server::reciting("x");
    let list = server.get("/v1/models").await.ok();
    assert_eq!(list["object"], "list");
    let ids: Vec<_> = list["data"].as_array().unwrap().iter().map(|card| card["id"].clone()).collect();
    assert_eq!(ids, ["m", "org/m"]);
    let card = server.get("/v1/models/org/m").await.ok();
    assert_eq!(card, list["data"][1]);
    assert_eq!((&card["object"], &card["max_model_len"]), (&json!("model"), &json!(1000)));
}

#[tokio::test]
async fn answers_carry_the_name_that_was_asked_for() {
    let server = Server::reciting("x");
    assert_eq!(server.chat(json!({"model": "org/m"})).await.ok()["model"], "org/m");
    assert_eq!(server.chat(json!({})).await.ok()["model"], "m");
}

#[tokio::test]
async fn tokens_there_and_back() {
    let server = Server::reciting("x");
    let answer =
        server.post("/tokenize", json!({"prompt": "Hello 日", "return_token_strs": true})).await.ok();
    assert_eq!(answer["count"], 4);
    assert_eq!(answer["max_model_len"], 1000);
    assert_eq!(answer["token_strs"][0], "Hello");
    let text = server.post("/detokenize", json!({"tokens": answer["tokens"]})).await.ok();
    assert_eq!(text, json!({"prompt": "Hello 日"}));

    let messages = json!([{"role": "user", "content": "h"}]);
    let answer = server.post("/tokenize", json!({"messages": messages})).await.ok();
    assert_eq!(answer["tokens"], json!([EOS + 1, 104, EOS + 2]));
    assert!(answer["token_strs"].is_null());
    let answer =
        server.post("/tokenize", json!({"messages": messages, "add_generation_prompt": false})).await.ok();
    assert_eq!(answer["count"], 2);

    server.post("/tokenize", json!({})).await.error(400);
    server.post("/tokenize", json!({"prompt": "x", "messages": messages})).await.error(400);
    assert_eq!(server.post("/detokenize", json!({"tokens": [320]})).await.error(400)["param"], "tokens");
}

#[tokio::test]
async fn the_version() {
    assert_eq!(Server::reciting("x").get("/version").await.ok(), json!({"version": "0.1.0"}));
}

#[tokio::test]
async fn metrics_count_what_happened() {
    let server = Server::reciting("four");
    server.chat(json!({})).await.ok();
    super::lifecycle::eventually(|| server.engine.handle().stats().finished == 1).await;
    let reply = server.get("/metrics").await;
    assert_eq!(reply.status, StatusCode::OK);
    assert!(reply.headers["content-type"].to_str().unwrap().starts_with("text/plain; version=0.0.4"));
    for line in [
        "dsa80_generated_tokens_total 5",
        "dsa80_requests_finished_total 1",
        "dsa80_requests_running 0",
        "dsa80_time_to_first_token_seconds_count 1",
        "dsa80_inter_token_latency_seconds_count 4",
        "dsa80_e2e_request_latency_seconds_count 1",
        "dsa80_queue_time_seconds_count 1",
        "dsa80_http_requests_in_flight 1",
    ] {
        assert!(reply.body.lines().any(|found| found == line), "{line} is not in\n{}", reply.body);
    }
}

#[tokio::test]
async fn request_ids_are_echoed_or_made() {
    let server = Server::reciting("x");
    let mut request = post("/v1/completions", "{\"prompt\": \"x\"}".into());
    request.headers_mut().insert("x-request-id", "mine-1".parse().unwrap());
    assert_eq!(server.send(request).await.headers["x-request-id"], "mine-1");
    let made = server.get("/nowhere").await.headers["x-request-id"].clone();
    assert!(made.to_str().unwrap().starts_with("req-"));
    let mut request = post("/v1/completions", "{\"prompt\": \"x\"}".into());
    request.headers_mut().insert("x-request-id", "x".repeat(129).parse().unwrap());
    assert!(server.send(request).await.headers["x-request-id"].to_str().unwrap().starts_with("req-"));
}

#[tokio::test]
async fn other_sites_pages_only_with_leave() {
    let preflight = |origin: &str| {
        Request::builder()
            .method(Method::OPTIONS)
            .uri("/v1/chat/completions")
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization,content-type")
            .body(Body::empty())
            .unwrap()
    };
    let serve = |origins: &[&str]| {
        let cors_origins = origins.iter().map(|&origin| origin.to_owned()).collect();
        let options = ServerOptions { cors_origins, api_keys: vec!["k".into()], ..ServerOptions::default() };
        Server::with(MockOptions::default(), options)
    };
    let closed = serve(&[]).send(preflight("http://a.example")).await;
    assert!(!closed.headers.contains_key("access-control-allow-origin"));
    let one = serve(&["http://a.example"]);
    let good = one.send(preflight("http://a.example")).await;
    assert_eq!(good.status, StatusCode::OK, "a preflight carries no key");
    assert_eq!(good.headers["access-control-allow-origin"], "http://a.example");
    assert!(
        !one.send(preflight("http://b.example")).await.headers.contains_key("access-control-allow-origin")
    );
    let any = serve(&["*"]).send(preflight("http://b.example")).await;
    assert_eq!(any.headers["access-control-allow-origin"], "*");
}
