//! `/v1/chat/completions`

use std::time::Duration;

use axum::http::StatusCode;
use dsa80_serve::mock::{EOS, MockOptions};
use expect_test::expect;
use serde_json::{Value as Json, json};

use super::client::{Server, bytes, over, stable};

/// The text, finish reason and logprobs of choice `index`, put together from a stream.
fn joined(events: &[Json], index: usize) -> (String, Json, Vec<Json>) {
    let (mut text, mut finish, mut logprobs) = (String::new(), Json::Null, Vec::new());
    let choices = events.iter().flat_map(|event| event["choices"].as_array().unwrap());
    for choice in choices.filter(|choice| choice["index"] == index) {
        assert!(finish.is_null(), "nothing may follow the finish");
        text.push_str(choice["delta"]["content"].as_str().unwrap_or(""));
        finish = choice["finish_reason"].clone();
        logprobs.extend(choice["logprobs"]["content"].as_array().into_iter().flatten().cloned());
    }
    (text, finish, logprobs)
}

#[tokio::test]
async fn a_whole_answer() {
    let server = Server::new(MockOptions { cached_tokens: 2, ..MockOptions::default() });
    let answer = server.chat(json!({"model": "m"})).await.ok();
    expect![[r#"{"id":"chatcmpl-ID","object":"chat.completion","created":"NOW","model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"Hello world","refusal":null},"logprobs":null,"finish_reason":"stop","stop_reason":null}],"usage":{"prompt_tokens":4,"completion_tokens":12,"total_tokens":16,"prompt_tokens_details":{"cached_tokens":2}},"system_fingerprint":"dsa80-0.1.0"}"#]]
        .assert_eq(&stable(answer));
    let request = &server.engine.requests()[0];
    assert_eq!(request.prompt, [EOS + 1, 104, 105, EOS + 2], "the template's tokens");
    assert_eq!(request.max_tokens, 996, "the rest of the context");
    assert_eq!(request.stop_token_ids, [EOS]);
}

#[tokio::test]
async fn a_stream_chunk_by_chunk() {
    let server = Server::reciting("日a");
    let reply = server.chat(json!({"stream": true, "stream_options": {"include_usage": true}})).await;
    let lines: Vec<String> = reply.events().into_iter().map(stable).collect();
    expect![[r#"
        {"id":"chatcmpl-ID","object":"chat.completion.chunk","created":"NOW","model":"m","system_fingerprint":"dsa80-0.1.0","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"usage":null}
        {"id":"chatcmpl-ID","object":"chat.completion.chunk","created":"NOW","model":"m","system_fingerprint":"dsa80-0.1.0","choices":[{"index":0,"delta":{"content":"日"},"logprobs":null,"finish_reason":null}],"usage":null}
        {"id":"chatcmpl-ID","object":"chat.completion.chunk","created":"NOW","model":"m","system_fingerprint":"dsa80-0.1.0","choices":[{"index":0,"delta":{"content":"a"},"logprobs":null,"finish_reason":null}],"usage":null}
        {"id":"chatcmpl-ID","object":"chat.completion.chunk","created":"NOW","model":"m","system_fingerprint":"dsa80-0.1.0","choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}],"usage":null}
        {"id":"chatcmpl-ID","object":"chat.completion.chunk","created":"NOW","model":"m","system_fingerprint":"dsa80-0.1.0","choices":[],"usage":{"prompt_tokens":4,"completion_tokens":5,"total_tokens":9,"prompt_tokens_details":{"cached_tokens":0}}}"#]]
        .assert_eq(&lines.join("\n"));
    assert_eq!(reply.headers["cache-control"], "no-cache");
    assert_eq!(reply.headers["x-accel-buffering"], "no");
}

#[tokio::test]
async fn usage_is_absent_unless_asked_for_and_in_every_chunk_on_request() {
    let server = Server::reciting("ab");
    let plain = server.chat(json!({"stream": true})).await.events();
    assert!(plain.iter().all(|chunk| chunk.get("usage").is_none()));
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let every = server.chat(json!({"stream": true, "stream_options": options})).await.events();
    let counts: Vec<u64> =
        every.iter().map(|chunk| chunk["usage"]["completion_tokens"].as_u64().unwrap()).collect();
    assert_eq!(counts, [1, 1, 2, 3, 3]);
}

#[tokio::test]
async fn streamed_and_whole_answers_agree() {
    let text = "Hello 日曜日 🙂🙃, one\ntwo\n\nthree STOP";
    for fields in [
        json!({}),
        json!({"logprobs": true, "top_logprobs": 2}),
        json!({"logprobs": true, "return_tokens_as_token_ids": true}),
        json!({"stop": "\n\n"}),
        json!({"stop": ["🙃", "zzz"], "logprobs": true}),
        json!({"stop": "STOP", "include_stop_str_in_output": true}),
        json!({"max_tokens": 9}),
        json!({"max_completion_tokens": 1, "n": 2}),
        json!({"stop_token_ids": [10], "n": 3}),
        json!({"ignore_eos": true, "max_tokens": 80}),
    ] {
        let server = Server::reciting(text);
        let whole = server.chat(fields.clone()).await.ok();
        let usage = json!({"stream": true, "stream_options": {"include_usage": true}});
        let events = server.chat(over(fields.clone(), usage)).await.events();
        for choice in whole["choices"].as_array().unwrap() {
            let (text, finish, logprobs) = joined(&events, choice["index"].as_u64().unwrap() as usize);
            assert_eq!(choice["message"]["content"], text, "{fields}");
            assert_eq!(choice["finish_reason"], finish, "{fields}");
            let want = choice["logprobs"]["content"].as_array().cloned().unwrap_or_default();
            assert_eq!(want, logprobs, "{fields}");
        }
        assert_eq!(whole["usage"], events.last().unwrap()["usage"], "{fields}");
    }
}

#[tokio::test]
async fn logprobs_in_the_chat_shape() {
    let server = Server::reciting("a\u{e9}");
    let answer = server.chat(json!({"logprobs": true, "top_logprobs": 1})).await.ok();
    expect![[r#"{"content":[{"token":"a","logprob":-1.625,"bytes":[97],"top_logprobs":[{"token":"a","logprob":-1.625,"bytes":[97]}]},{"token":"bytes:\\xc3","logprob":-1.625,"bytes":[195],"top_logprobs":[{"token":"bytes:\\xc3","logprob":-1.625,"bytes":[195]}]},{"token":"bytes:\\xa9","logprob":-0.375,"bytes":[169],"top_logprobs":[{"token":"bytes:\\xa9","logprob":-0.375,"bytes":[169]}]},{"token":"<|end|>","logprob":-1.125,"bytes":[60,124,101,110,100,124,62],"top_logprobs":[{"token":"\u0000","logprob":-1.125,"bytes":[0]}]}],"refusal":null}"#]]
        .assert_eq(&answer["choices"][0]["logprobs"].to_string());
}

#[tokio::test]
async fn choices_have_their_own_seeds_and_the_first_is_the_plain_answer() {
    let mock =
        MockOptions { scripts: vec![bytes("zero"), bytes("one"), bytes("two")], ..MockOptions::default() };
    let server = Server::new(mock);
    let answer = server.chat(json!({"n": 3, "seed": 1})).await.ok();
    let texts: Vec<&str> = answer["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["message"]["content"].as_str().unwrap())
        .collect();
    assert_eq!(texts, ["one", "two", "zero"]);
    assert_eq!(answer["usage"]["prompt_tokens"], 4, "the prompt is counted once");
    assert_eq!(answer["usage"]["completion_tokens"], 4 + 4 + 5);
    let one = server.chat(json!({"seed": 1})).await.ok();
    assert_eq!(one["choices"][0]["message"]["content"], "one");
    let events = server.chat(json!({"n": 3, "seed": 1, "stream": true})).await.events();
    assert_eq!([0, 1, 2].map(|i| joined(&events, i).0), ["one", "two", "zero"]);
}

#[tokio::test]
async fn what_ended_it_is_told() {
    let server = Server::reciting("one. two");
    let reason = async |fields: Json| {
        let choice = server.chat(fields).await.ok()["choices"][0].clone();
        (choice["message"]["content"].clone(), choice["finish_reason"].clone(), choice["stop_reason"].clone())
    };
    assert_eq!(reason(json!({"stop": ". "})).await, (json!("one"), json!("stop"), json!(". ")));
    assert_eq!(reason(json!({"stop_token_ids": [46]})).await, (json!("one"), json!("stop"), json!(46)));
    assert_eq!(reason(json!({"max_tokens": 3})).await, (json!("one"), json!("length"), Json::Null));
    assert_eq!(reason(json!({})).await, (json!("one. two"), json!("stop"), Json::Null));
}

#[tokio::test]
async fn a_stop_string_frees_the_engine_at_once() {
    let server = Server::new(MockOptions {
        scripts: vec![bytes("ab")],
        token_delay: Duration::from_millis(1),
        cached_tokens: 3,
        ..MockOptions::default()
    });
    let answer = server.chat(json!({"stop": "b", "ignore_eos": true})).await.ok();
    assert_eq!(answer["choices"][0]["message"]["content"], "a");
    assert_eq!(answer["usage"]["completion_tokens"], 2);
    assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 3);
    super::lifecycle::eventually(|| server.engine.handle().stats().cancelled == 1).await;
}

#[tokio::test]
async fn all_sampling_fields_reach_the_engine() {
    let server = Server::reciting("x");
    let fields = json!({
        "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "repetition_penalty": 1.5, "frequency_penalty": -1,
        "presence_penalty": 2, "logit_bias": {"65": -100, "66": 1.5}, "seed": -2, "min_tokens": 1, "max_tokens": 5,
        "ignore_eos": true, "stop_token_ids": [9], "logprobs": true, "prompt_logprobs": 3,
    });
    server.chat(fields).await.ok();
    let request = &server.engine.requests()[0];
    let sampling = &request.sampling;
    assert_eq!(
        (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.repetition_penalty),
        (0.5, 0.25, 7, 0.125, 1.5)
    );
    assert_eq!((sampling.frequency_penalty, sampling.presence_penalty), (-1.0, 2.0));
    assert_eq!(sampling.logit_bias, [(65, -100.0), (66, 1.5)]);
    assert_eq!(sampling.seed, u64::MAX - 1);
    assert_eq!((request.min_tokens, request.max_tokens, request.ignore_eos), (1, 5, true));
    assert_eq!(request.stop_token_ids, [9]);
    assert_eq!((request.logprobs, request.prompt_logprobs), (Some(0), Some(3)));
}

#[tokio::test]
async fn template_options_reach_the_template() {
    let server = Server::reciting("x");
    let prompt = async |fields: Json| {
        server.chat(fields).await.ok();
        let ids = server.engine.requests().last().unwrap().prompt.clone();
        dsa80_serve::mock::tokenizer().decode(&ids, false)
    };
    assert_eq!(prompt(json!({"add_generation_prompt": false})).await, "<|user|>hi");
    let thinking = json!({"chat_template_kwargs": {"enable_thinking": true}});
    assert_eq!(prompt(thinking).await, "<|user|>hi<|assistant|><think>");
    let messages = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "so "}]);
    assert_eq!(
        prompt(json!({"messages": messages, "continue_final_message": true})).await,
        "<|user|>q<|assistant|>so "
    );
    let parts = json!([{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
    assert_eq!(prompt(json!({"messages": parts})).await, "<|system|>ab<|assistant|>");
    let tools = json!({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"});
    assert_eq!(
        prompt(tools).await,
        "<|system|>{\"type\": \"function\", \"function\": {\"name\": \"f\"}}<|user|>hi<|assistant|>"
    );
}

#[tokio::test]
async fn a_long_prompt_goes_through_the_worker_threads() {
    let server = Server::new(MockOptions { max_model_len: 1 << 20, ..MockOptions::default() });
    let content = "Hello world ".repeat(20_000);
    let answer =
        server.chat(json!({"messages": [{"role": "user", "content": content}], "max_tokens": 1})).await.ok();
    assert_eq!(answer["usage"]["prompt_tokens"], 60_002);
}

#[tokio::test]
async fn an_engine_that_fails_is_a_500_and_ends_a_stream_with_an_error_event() {
    let server = Server::new(MockOptions { fail_after: Some(2), ..MockOptions::default() });
    let error = server.chat(json!({})).await.error(500);
    assert_eq!(error["message"], "the mock was told to fail");
    let reply = server.chat(json!({"stream": true})).await;
    assert_eq!(reply.status, StatusCode::OK, "the head was already sent");
    let events = reply.events();
    assert_eq!(events.last().unwrap()["error"]["type"], "server_error");
    assert_eq!(joined(&events[..events.len() - 1], 0).0, "He");
}

#[tokio::test]
async fn prompt_logprobs_in_vllms_shape() {
    let server = Server::reciting("x");
    let answer = server.chat(json!({"prompt_logprobs": 1, "max_tokens": 0})).await.ok();
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["prompt_logprobs"].as_array().unwrap().len(), 4);
    expect![[r#"[null,{"104":{"logprob":-1.625,"rank":1,"decoded_token":"h"}}]"#]]
        .assert_eq(&json!(answer["prompt_logprobs"].as_array().unwrap()[..2]).to_string());
}
