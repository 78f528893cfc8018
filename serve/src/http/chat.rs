//! `POST /v1/chat/completions`

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use futures::future::try_join_all;
use uuid::Uuid;

use super::body::ApiJson;
use super::collect::{Collected, collect, finish_reason, stop_reason};
use super::prompt::chat_prompt;
use super::sse::{self, ChunkWriter, UsagePlan};
use super::state::unix_time;
use super::version::FINGERPRINT;
use super::{ServedModel, ServerState};
use crate::openai::{
    ApiError, ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatDelta, ChatLogprobs, ChatReply,
    ChatRequest, TokenNames, Usage, prompt_logprobs,
};
use crate::output::{Delta, GeneratedToken, Piece};
use crate::record::RequestRecord;
use crate::submit::Plan;
use crate::text::RenderOptions;

pub(super) async fn chat_completions(
    State(state): State<ServerState>,
    Extension(record): Extension<Arc<RequestRecord>>,
    ApiJson(request): ApiJson<ChatRequest>,
) -> Result<Response, ApiError> {
    let model = state.model()?;
    let name = state.model_name(request.common.model.as_deref())?;
    request.common.check_ids(&model.text)?;
    let sampling = request.common.sampling(&model.text)?;
    let prompt = render(&model, &request).await?;
    let common = &request.common;
    let logprobs = (request.chat.logprobs == Some(true)).then(|| request.chat.top_logprobs.unwrap_or(0));
    let plan = Plan {
        metrics: state.metrics(),
        model: &model,
        record: &record,
        common,
        sampling,
        logprobs,
        prompt_logprobs: common.prompt_logprobs,
        field: "messages",
        prompts: 1,
    };
    let generations = plan.submit(&prompt)?;
    let head = Head {
        id: format!("chatcmpl-{}", Uuid::new_v4().simple()),
        created: unix_time(),
        model: name,
        served: model,
        logprobs: logprobs.is_some(),
        as_ids: common.return_tokens_as_token_ids.unwrap_or(false),
    };
    if common.stream() {
        let plan = UsagePlan {
            prompt_tokens: prompt.len(),
            n: common.n(),
            include: common.include_usage(),
            continuous: common.continuous_usage(),
        };
        let writer = Writer { head, begun: vec![false; generations.len()] };
        return Ok(sse::stream(generations, writer, plan, state.options().sse_keep_alive));
    }
    let choices = try_join_all(generations.into_iter().map(collect)).await?;
    Ok(Json(head.whole(&prompt, choices)).into_response())
}

/// The prompt's tokens.
async fn render(model: &ServedModel, request: &ChatRequest) -> Result<Vec<u32>, ApiError> {
    let chat = &request.chat;
    let messages = chat.messages.iter().enumerate();
    let messages = messages
        .map(|(i, message)| message.for_template(&format!("messages[{i}]")))
        .collect::<Result<Vec<_>, _>>()?;
    let mut kwargs = chat.chat_template_kwargs.clone().unwrap_or_default();
    if let Some(effort) = &chat.reasoning_effort {
        if !model.text.chat_template.as_ref().is_some_and(|template| template.uses("reasoning_effort")) {
            return Err(ApiError::unsupported(
                "reasoning_effort",
                "reasoning_effort is not supported by this model: its chat template does not read it. GLM's templates read \
                 \"chat_template_kwargs\": {\"enable_thinking\": true or false}.",
            ));
        }
        kwargs.entry("reasoning_effort").or_insert_with(|| effort.as_str().into());
    }
    let continue_final_message = chat.continue_final_message.unwrap_or(false);
    let options = RenderOptions {
        add_generation_prompt: chat.add_generation_prompt.unwrap_or(!continue_final_message),
        continue_final_message,
        tools: request.tools.clone(),
        kwargs,
    };
    let bytes = chat.messages.iter().map(crate::openai::ChatMessage::len_hint).sum();
    chat_prompt(model, messages, bytes, options, chat.add_special_tokens.unwrap_or(false)).await
}

/// What all chunks of an answer have in common.
struct Head {
    id: String,
    created: u64,
    model: String,
    served: ServedModel,
    logprobs: bool,
    as_ids: bool,
}

impl Head {
    fn whole(self, prompt: &[u32], choices: Vec<Collected>) -> ChatCompletion {
        let completion_tokens = choices.iter().map(|choice| choice.completion_tokens).sum();
        let cached_tokens = choices.first().map_or(0, |choice| choice.cached_tokens);
        let scored = choices.iter().find_map(|choice| choice.prompt.as_ref());
        let prompt_logprobs =
            scored.map(|scored| prompt_logprobs(&self.served.text.tokenizer, prompt, scored));
        let choices = choices.into_iter().enumerate().map(|(index, choice)| ChatChoice {
            index,
            logprobs: self.logprobs(&choice.tokens),
            message: ChatReply { role: "assistant", content: choice.text, refusal: None },
            finish_reason: finish_reason(&choice.finish),
            stop_reason: stop_reason(&choice.finish),
        });
        ChatCompletion {
            choices: choices.collect(),
            id: self.id,
            object: "chat.completion",
            created: self.created,
            model: self.model,
            usage: Usage::new(prompt.len(), completion_tokens, cached_tokens),
            system_fingerprint: FINGERPRINT,
            prompt_logprobs,
        }
    }

    fn logprobs(&self, tokens: &[GeneratedToken]) -> Option<ChatLogprobs> {
        let names = TokenNames { tokenizer: &self.served.text.tokenizer, as_ids: self.as_ids };
        let entries =
            tokens.iter().filter_map(|token| Some(names.chat_entry(token.id, token.logprobs.as_ref()?)));
        self.logprobs.then(|| ChatLogprobs { content: entries.collect(), refusal: None })
    }

    fn chunk(&self, choices: Vec<ChatChunkChoice>, usage: Option<Option<Usage>>) -> String {
        let chunk = ChatChunk {
            id: &self.id,
            object: "chat.completion.chunk",
            created: self.created,
            model: &self.model,
            system_fingerprint: FINGERPRINT,
            choices,
            usage,
        };
        serde_json::to_string(&chunk).unwrap_or_default()
    }
}

struct Writer {
    head: Head,
    /// Choices whose role was sent.
    begun: Vec<bool>,
}

impl Writer {
    fn choice(index: usize, delta: ChatDelta) -> ChatChunkChoice {
        ChatChunkChoice { index, delta, logprobs: None, finish_reason: None, stop_reason: None }
    }
}

impl ChunkWriter for Writer {
    fn piece(&mut self, index: usize, piece: Piece, usage: Option<Option<Usage>>) -> Vec<String> {
        let Piece::Delta(Delta { text, tokens, finish }) = piece else { return Vec::new() };
        let mut chunks = Vec::new();
        if !std::mem::replace(&mut self.begun[index], true) {
            let delta = ChatDelta { role: Some("assistant"), content: Some(String::new()) };
            chunks.push(self.head.chunk(vec![Self::choice(index, delta)], usage));
        }
        if !text.is_empty() || (self.head.logprobs && !tokens.is_empty()) {
            let delta = ChatDelta { role: None, content: Some(text) };
            let choice =
                ChatChunkChoice { logprobs: self.head.logprobs(&tokens), ..Self::choice(index, delta) };
            chunks.push(self.head.chunk(vec![choice], usage));
        }
        if let Some(finish) = finish {
            let choice = ChatChunkChoice {
                finish_reason: Some(finish_reason(&finish)),
                stop_reason: stop_reason(&finish),
                ..Self::choice(index, ChatDelta::default())
            };
            chunks.push(self.head.chunk(vec![choice], usage));
        }
        chunks
    }

    fn usage(&mut self, usage: Usage) -> String {
        self.head.chunk(Vec::new(), Some(Some(usage)))
    }
}
