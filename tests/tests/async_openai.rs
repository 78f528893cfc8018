//! The Rust client `async-openai` against the server.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::error::OpenAIError;
use async_openai::types::chat::{
    ChatCompletionRequestSystemMessage, ChatCompletionRequestUserMessage, ChatCompletionStreamOptions,
    CompletionFinishReason, CreateChatCompletionRequest, CreateChatCompletionRequestArgs, FinishReason,
    Prompt, Role,
};
use async_openai::types::completions::CreateCompletionRequestArgs;
use dsa80_tests::server::{ServerOptions, TestServer};
use futures::StreamExt;

async fn client(server: &TestServer) -> (Client<OpenAIConfig>, String) {
    let config = OpenAIConfig::new().with_api_base(server.url("/v1")).with_api_key("unused");
    let client = Client::with_config(config);
    let models = client.models().list().await.unwrap();
    assert_eq!((models.object.as_str(), models.data.len()), ("list", 1));
    let model = models.data[0].id.clone();
    assert_eq!(client.models().retrieve(&model).await.unwrap().id, model);
    (client, model)
}

/// A greedy chat whose model is kept from ending early by a bias against its end-of-sequence ids.
fn chat(model: &str) -> CreateChatCompletionRequestArgs {
    let mut request = CreateChatCompletionRequestArgs::default();
    request
        .model(model)
        .messages([
            ChatCompletionRequestSystemMessage::from("Be brief.").into(),
            ChatCompletionRequestUserMessage::from("Name a colour.").into(),
        ])
        .max_completion_tokens(20_u32)
        .temperature(0.0)
        .logit_bias(["748", "755", "757"].map(|id| (id.to_owned(), -100)));
    request
}

fn with_logprobs(mut request: CreateChatCompletionRequestArgs) -> CreateChatCompletionRequest {
    request.logprobs(true).top_logprobs(3_u8).build().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn chat_whole_and_streamed() {
    let server = TestServer::start(ServerOptions::default()).unwrap();
    let (client, model) = client(&server).await;
    let whole = client.chat().create(with_logprobs(chat(&model))).await.unwrap();
    let choice = &whole.choices[0];
    let text = choice.message.content.clone().unwrap();
    assert_eq!(choice.message.role, Role::Assistant);
    assert_eq!(choice.finish_reason, Some(FinishReason::Length));
    let usage = whole.usage.unwrap();
    assert_eq!(usage.completion_tokens, 20);
    assert_eq!(usage.total_tokens, usage.prompt_tokens + 20);
    let logprobs = choice.logprobs.clone().unwrap().content.unwrap();
    assert_eq!(logprobs.len(), 20);
    for token in &logprobs {
        assert_eq!(token.top_logprobs.len(), 3);
        assert!(token.top_logprobs.is_sorted_by(|a, b| a.logprob >= b.logprob), "{token:?}");
        assert_eq!(token.logprob, token.top_logprobs[0].logprob, "greedy: {token:?}");
    }

    let options = ChatCompletionStreamOptions { include_usage: Some(true), include_obfuscation: None };
    let request = with_logprobs(chat(&model).stream_options(options).clone());
    let mut stream = client.chat().create_stream(request).await.unwrap();
    let (mut streamed, mut tokens, mut last_usage, mut finish) = (String::new(), Vec::new(), None, None);
    let mut roles = Vec::new();
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.unwrap();
        assert_eq!(chunk.object, "chat.completion.chunk");
        assert!(last_usage.is_none(), "a chunk after the usage: {chunk:?}");
        for choice in chunk.choices {
            roles.push(choice.delta.role);
            streamed += choice.delta.content.as_deref().unwrap_or_default();
            tokens.extend(choice.logprobs.and_then(|logprobs| logprobs.content).unwrap_or_default());
            finish = finish.or(choice.finish_reason);
        }
        last_usage = chunk.usage;
    }
    assert_eq!(streamed, text);
    assert_eq!(tokens, logprobs);
    assert_eq!(finish, Some(FinishReason::Length));
    assert_eq!(last_usage.map(|usage| usage.total_tokens), Some(usage.total_tokens));
    assert_eq!(roles[0], Some(Role::Assistant));
    assert!(roles[1..].iter().all(Option::is_none), "{roles:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn completions_with_logprobs_and_in_a_stream() {
    let server = TestServer::start(ServerOptions::default()).unwrap();
    let (client, model) = client(&server).await;
    let mut request = CreateCompletionRequestArgs::default();
    request.model(&model).temperature(0.0).max_tokens(5_u32).logprobs(2_u8).seed(1);
    let batch = Prompt::ArrayOfIntegerArray(vec![vec![1, 2, 3, 4], vec![90, 91]]);
    let answer =
        client.completions().create(request.clone().prompt(batch).echo(true).build().unwrap()).await.unwrap();
    assert_eq!(answer.object, "text_completion");
    for (choice, prompt_tokens) in answer.choices.iter().zip([4, 2]) {
        let logprobs = choice.logprobs.clone().unwrap();
        let count = logprobs.tokens.len();
        assert!((prompt_tokens + 1..=prompt_tokens + 5).contains(&count), "{count}");
        assert_eq!(
            (logprobs.token_logprobs.len(), logprobs.top_logprobs.len(), logprobs.text_offset.len()),
            (count, count, count)
        );
        assert_eq!(logprobs.token_logprobs[0], None);
        assert!(logprobs.token_logprobs[1..].iter().all(|value| value.is_some_and(|value| value <= 0.0)));
    }
    let prompt = Prompt::String("Once".into());
    let whole = client.completions().create(request.clone().prompt(prompt.clone()).build().unwrap()).await;
    let whole = whole.unwrap().choices.remove(0);
    let mut stream =
        client.completions().create_stream(request.prompt(prompt).build().unwrap()).await.unwrap();
    let (mut text, mut finish, mut tokens) = (String::new(), None, 0);
    while let Some(chunk) = stream.next().await {
        for choice in chunk.unwrap().choices {
            text += &choice.text;
            tokens += choice.logprobs.map_or(0, |logprobs| logprobs.tokens.len());
            finish = finish.or(choice.finish_reason);
        }
    }
    assert_eq!((text, finish), (whole.text, whole.finish_reason));
    assert_eq!(tokens, whole.logprobs.unwrap().tokens.len());
    assert!(matches!(finish, Some(CompletionFinishReason::Length | CompletionFinishReason::Stop)));
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_arrive_with_status_and_param() {
    let server = TestServer::start(ServerOptions::default()).unwrap();
    let (client, model) = client(&server).await;
    let error = client.chat().create(chat(&model).temperature(-1.0).build().unwrap()).await.unwrap_err();
    let OpenAIError::ApiError(error) = error else { panic!("{error:?}") };
    assert_eq!(error.status_code.as_u16(), 400);
    assert_eq!(error.api_error.param.as_deref(), Some("temperature"));
    assert_eq!(error.api_error.r#type.as_deref(), Some("invalid_request_error"));
    let error = client.chat().create(chat("gpt-unknown").build().unwrap()).await.unwrap_err();
    let OpenAIError::ApiError(error) = error else { panic!("{error:?}") };
    assert_eq!(error.status_code.as_u16(), 404);
    assert_eq!(error.api_error.code.as_deref(), Some("model_not_found"));
    // A stream that cannot begin is an error, too, and no empty stream.
    let refused = client.chat().create_stream(chat(&model).temperature(-1.0).build().unwrap()).await;
    let first = match refused {
        Ok(mut stream) => stream.next().await.expect("an error").err(),
        Err(error) => Some(error),
    };
    assert!(first.is_some_and(|error| error.to_string().contains("temperature")));
}
