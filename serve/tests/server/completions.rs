//! `/v1/completions`

use dsa80_serve::mock::{MockOptions, logprob_of, tokenizer};
use expect_test::expect;
use serde_json::{Value as Json, json};

use super::client::{Server, bytes, over, stable};

#[tokio::test]
async fn a_whole_answer() {
    let server = Server::reciting(" world");
    let answer = server.complete(json!({"logprobs": 1, "max_tokens": 2})).await.ok();
    expect![[r#"{"id":"cmpl-ID","object":"text_completion","created":"NOW","model":"m","system_fingerprint":"dsa80-0.1.0","choices":[{"index":0,"text":" w","logprobs":{"text_offset":[0,1],"token_logprobs":[-1.125,-0.125],"tokens":[" ","w"],"top_logprobs":[{" ":-1.125},{"w":-0.125}]},"finish_reason":"length"}],"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3,"prompt_tokens_details":{"cached_tokens":0}}}"#]]
        .assert_eq(&stable(answer));
}

#[tokio::test]
async fn a_stream_chunk_by_chunk() {
    let server = Server::reciting(" w");
    let fields = json!({"stream": true, "echo": true, "stream_options": {"include_usage": true}});
    let lines: Vec<String> = server.complete(fields).await.events().into_iter().map(stable).collect();
    expect![[r#"
        {"id":"cmpl-ID","object":"text_completion","created":"NOW","model":"m","system_fingerprint":"dsa80-0.1.0","choices":[{"index":0,"text":"Hello","logprobs":null,"finish_reason":null}],"usage":null}
        {"id":"cmpl-ID","object":"text_completion","created":"NOW","model":"m","system_fingerprint":"dsa80-0.1.0","choices":[{"index":0,"text":" ","logprobs":null,"finish_reason":null}],"usage":null}
        {"id":"cmpl-ID","object":"text_completion","created":"NOW","model":"m","system_fingerprint":"dsa80-0.1.0","choices":[{"index":0,"text":"w","logprobs":null,"finish_reason":null}],"usage":null}
        {"id":"cmpl-ID","object":"text_completion","created":"NOW","model":"m","system_fingerprint":"dsa80-0.1.0","choices":[{"index":0,"text":"","logprobs":null,"finish_reason":"stop"}],"usage":null}
        {"id":"cmpl-ID","object":"text_completion","created":"NOW","model":"m","system_fingerprint":"dsa80-0.1.0","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":3,"total_tokens":4,"prompt_tokens_details":{"cached_tokens":0}}}"#]]
        .assert_eq(&lines.join("\n"));
}

#[tokio::test]
async fn prompts_of_all_kinds_and_batches() {
    let mock = MockOptions { scripts: vec![bytes("zero"), bytes("one")], ..MockOptions::default() };
    let server = Server::new(mock);
    for (prompt, prompts, tokens) in [
        (json!("Hello world"), 1, 2),
        (json!(["Hello", "Hello world", "the"]), 3, 4),
        (json!([72, 105]), 1, 2),
        (json!([[72], [72, 105, 106]]), 2, 4),
    ] {
        let answer = server.complete(json!({"prompt": prompt, "n": 2, "seed": 0})).await.ok();
        let choices = answer["choices"].as_array().unwrap();
        let texts: Vec<(u64, &str)> =
            choices.iter().map(|c| (c["index"].as_u64().unwrap(), c["text"].as_str().unwrap())).collect();
        let want: Vec<(u64, &str)> =
            (0..2 * prompts).map(|i| (i, if i % 2 == 0 { "zero" } else { "one" })).collect();
        assert_eq!(texts, want, "choice p * n + i has seed + i");
        assert_eq!(answer["usage"]["prompt_tokens"], tokens);
    }
}

/// The request that lm-evaluation-harness's `local-completions` sends to score a batch, and how it reads the
/// answer.
#[tokio::test]
async fn lm_evaluation_harness_scores_a_batch() {
    let server = Server::reciting("!");
    for max_tokens in [0, 1] {
        let prompts = [vec![72, 101, 108, 108, 111], vec![104, 105]];
        let body = json!({
            "model": "m", "prompt": prompts, "temperature": 0, "max_tokens": max_tokens, "logprobs": 1, "seed": 1234,
            "echo": true,
        });
        let answer = server.post("/v1/completions", body).await.ok();
        for (choice, prompt) in answer["choices"].as_array().unwrap().iter().zip(&prompts) {
            let logprobs = &choice["logprobs"];
            for list in ["text_offset", "token_logprobs", "tokens", "top_logprobs"] {
                assert_eq!(logprobs[list].as_array().unwrap().len(), prompt.len() + max_tokens, "{list}");
            }
            assert_eq!(logprobs["token_logprobs"][0], Json::Null);
            for (i, &id) in prompt.iter().enumerate().skip(1) {
                let own = logprobs["token_logprobs"][i].as_f64().unwrap();
                assert_eq!(own, f64::from(logprob_of(id)));
                let top = logprobs["top_logprobs"][i].as_object().unwrap();
                assert!(
                    top.values().any(|value| value.as_f64() == Some(own)),
                    "the token itself is among them"
                );
            }
        }
        assert_eq!(answer["usage"]["prompt_tokens"], 7);
        assert_eq!(answer["usage"]["completion_tokens"], 2 * max_tokens);
    }
}

#[tokio::test]
async fn echo_puts_the_prompt_first_with_offsets_through_both() {
    let server = Server::reciting("é!");
    let answer = server.complete(json!({"prompt": "日 Hello", "echo": true, "logprobs": 0})).await.ok();
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], "日 Helloé!");
    expect![[r#"{"text_offset":[0,0,1,2,7,7,8,9],"token_logprobs":[null,-1.125,-1.125,-0.125,-1.625,-0.375,-1.375,-1.125],"tokens":["bytes:\\xe6\\x97","bytes:\\xa5"," ","Hello","bytes:\\xc3","bytes:\\xa9","!","<|end|>"],"top_logprobs":[null,{"bytes:\\xa5":-1.125},{" ":-1.125},{"Hello":-0.125},{"bytes:\\xc3":-1.625},{"bytes:\\xa9":-0.375},{"!":-1.375},{"<|end|>":-1.125}]}"#]]
        .assert_eq(&choice["logprobs"].to_string());
}

#[tokio::test]
async fn streamed_and_whole_answers_agree() {
    for fields in [
        json!({}),
        json!({"echo": true}),
        json!({"echo": true, "logprobs": 2}),
        json!({"echo": true, "logprobs": 1, "max_tokens": 0}),
        json!({"echo": true, "max_tokens": 0, "prompt": [72, 105]}),
        json!({"prompt": ["a", "Hello world"], "n": 2, "logprobs": 0, "echo": true, "stop": "\n"}),
        json!({"return_tokens_as_token_ids": true, "logprobs": 1}),
    ] {
        let server = Server::reciting("日 one\ntwo");
        let whole = server.complete(fields.clone()).await.ok();
        let usage = json!({"stream": true, "stream_options": {"include_usage": true}});
        let events = server.complete(over(fields.clone(), usage)).await.events();
        for want in whole["choices"].as_array().unwrap() {
            let (mut text, mut finish) = (String::new(), Json::Null);
            let mut lists =
                json!({"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []});
            let pieces = events.iter().flat_map(|event| event["choices"].as_array().unwrap());
            for piece in pieces.filter(|piece| piece["index"] == want["index"]) {
                text.push_str(piece["text"].as_str().unwrap());
                finish = piece["finish_reason"].clone();
                for (name, list) in piece["logprobs"].as_object().into_iter().flatten() {
                    lists[name].as_array_mut().unwrap().extend(list.as_array().unwrap().clone());
                }
            }
            assert_eq!(want["text"], text, "{fields}");
            assert_eq!(want["finish_reason"], finish, "{fields}");
            if !want["logprobs"].is_null() {
                assert_eq!(want["logprobs"], lists, "{fields}");
            }
        }
        assert_eq!(whole["usage"], events.last().unwrap()["usage"], "{fields}");
    }
}

#[tokio::test]
async fn tokens_as_ids_when_asked() {
    let server = Server::reciting("ab");
    let answer = server
        .complete(json!({"logprobs": 1, "return_tokens_as_token_ids": true, "max_tokens": 2}))
        .await
        .ok();
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["token_id:97", "token_id:98"]));
    assert_eq!(logprobs["top_logprobs"][0], json!({"token_id:97": -1.625}));
}

#[tokio::test]
async fn a_benchmark_gets_exactly_the_tokens_it_asks_for() {
    let server = Server::reciting("ab");
    let fields = json!({"ignore_eos": true, "min_tokens": 33, "max_tokens": 33});
    let answer = server.complete(fields).await.ok();
    assert_eq!(answer["usage"]["completion_tokens"], 33);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn prompt_logprobs_beside_echo_keep_their_own_width() {
    let server = Server::reciting("!");
    let fields =
        json!({"prompt": [72, 105], "echo": true, "logprobs": 1, "prompt_logprobs": 3, "max_tokens": 1});
    let choice = server.complete(fields).await.ok()["choices"][0].clone();
    assert_eq!(choice["logprobs"]["top_logprobs"][1].as_object().unwrap().len(), 1);
    assert_eq!(choice["prompt_logprobs"][1].as_object().unwrap().len(), 3);
}

#[tokio::test]
async fn special_tokens_in_the_text_are_tokens() {
    let server = Server::reciting("!");
    server.complete(json!({"prompt": "<|user|>x"})).await.ok();
    assert_eq!(server.engine.requests()[0].prompt, tokenizer().encode("<|user|>x", false).unwrap());
    assert_eq!(server.engine.requests()[0].prompt.len(), 2);
}
