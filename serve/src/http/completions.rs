//! `POST /v1/completions`

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use dsa80_model::engine::TokenLogprobs;
use futures::future::try_join_all;
use uuid::Uuid;

use super::body::ApiJson;
use super::collect::{Collected, collect, finish_reason, stop_reason};
use super::prompt::text_prompt;
use super::sse::{self, ChunkWriter, UsagePlan};
use super::state::unix_time;
use super::version::FINGERPRINT;
use super::{ServedModel, ServerState};
use crate::openai::{
    ApiError, Completion, CompletionChoice, CompletionLogprobs, CompletionRequest, Prompt, TokenNames, Usage,
    check_ids, prompt_logprobs,
};
use crate::output::{Delta, GeneratedToken, Piece};
use crate::record::RequestRecord;
use crate::submit::Plan;
use crate::text::{Tokenizer, Utf8Stream};

pub(super) async fn completions(
    State(state): State<ServerState>,
    Extension(record): Extension<Arc<RequestRecord>>,
    ApiJson(request): ApiJson<CompletionRequest>,
) -> Result<Response, ApiError> {
    let model = state.model()?;
    let CompletionRequest { common, completion } = request;
    let name = state.model_name(common.model.as_deref())?;
    common.check_ids(&model.text)?;
    let sampling = common.sampling(&model.text)?;
    let echo = completion.echo.unwrap_or(false);
    let prompts =
        prompts(&model, completion.prompt, completion.add_special_tokens.unwrap_or(true), echo).await?;
    let logprobs = completion.logprobs;
    // With nothing to generate the engine has to score, even if nobody looks at the score.
    let scores =
        [common.prompt_logprobs, logprobs.filter(|_| echo), (common.max_tokens() == Some(0)).then_some(0)];
    let plan = Plan {
        metrics: state.metrics(),
        model: &model,
        record: &record,
        common: &common,
        sampling,
        logprobs,
        prompt_logprobs: scores.into_iter().flatten().max(),
        field: "prompt",
        prompts: prompts.len(),
    };
    let mut generations = Vec::new();
    for prompt in &prompts {
        generations.extend(plan.submit(&prompt.ids)?);
    }
    let prompt_tokens = prompts.iter().map(|prompt| prompt.ids.len()).sum();
    let head = Head {
        id: format!("cmpl-{}", Uuid::new_v4().simple()),
        created: unix_time(),
        model: name,
        served: model,
        prompts,
        n: common.n(),
        logprobs,
        prompt_logprobs: common.prompt_logprobs,
        as_ids: common.return_tokens_as_token_ids.unwrap_or(false),
    };
    if common.stream() {
        let plan = UsagePlan {
            prompt_tokens,
            n: common.n(),
            include: common.include_usage(),
            continuous: common.continuous_usage(),
        };
        let writer = Writer { head, begun: vec![false; generations.len()] };
        return Ok(sse::stream(generations, writer, plan, state.options().sse_keep_alive));
    }
    let choices = try_join_all(generations.into_iter().map(collect)).await?;
    Ok(head.whole(prompt_tokens, choices))
}

/// A prompt with what `echo` needs.
struct PromptText {
    ids: Vec<u32>,
    /// Its text, on `echo`.
    echo: Option<String>,
}

/// The prompts' tokens, and their texts on `echo`: as sent, or decoded in full where ids were sent.
async fn prompts(
    model: &ServedModel,
    prompt: Prompt,
    add_special_tokens: bool,
    echo: bool,
) -> Result<Vec<PromptText>, ApiError> {
    let (texts, lists) = match prompt {
        Prompt::Text(text) => (vec![text], Vec::new()),
        Prompt::Texts(texts) => (texts, Vec::new()),
        Prompt::Ids(ids) => (Vec::new(), vec![ids]),
        Prompt::IdLists(lists) => (Vec::new(), lists),
    };
    let mut prompts = Vec::with_capacity(texts.len() + lists.len());
    for text in texts {
        let shown = echo.then(|| text.clone());
        prompts.push(PromptText { ids: text_prompt(model, text, add_special_tokens).await?, echo: shown });
    }
    for ids in lists {
        check_ids("prompt", &ids, model.text.vocab_size)?;
        let shown = echo.then(|| model.text.tokenizer.decode(&ids, false));
        prompts.push(PromptText { ids, echo: shown });
    }
    Ok(prompts)
}

/// What all chunks of an answer have in common.
struct Head {
    id: String,
    created: u64,
    model: String,
    served: ServedModel,
    prompts: Vec<PromptText>,
    /// Choices for each prompt.
    n: usize,
    logprobs: Option<usize>,
    prompt_logprobs: Option<usize>,
    as_ids: bool,
}

impl Head {
    fn whole(self, prompt_tokens: usize, collected: Vec<Collected>) -> Response {
        let completion_tokens = collected.iter().map(|choice| choice.completion_tokens).sum();
        let cached_tokens = collected.iter().step_by(self.n).map(|choice| choice.cached_tokens).sum();
        let choices =
            collected.into_iter().enumerate().map(|(index, choice)| self.choice(index, choice)).collect();
        let usage = Usage::new(prompt_tokens, completion_tokens, cached_tokens);
        Json(self.answer(choices, Some(Some(usage)))).into_response()
    }

    fn answer(&self, choices: Vec<CompletionChoice>, usage: Option<Option<Usage>>) -> Completion<'_> {
        Completion {
            id: &self.id,
            object: "text_completion",
            created: self.created,
            model: &self.model,
            system_fingerprint: FINGERPRINT,
            choices,
            usage,
        }
    }

    fn chunk(&self, choice: CompletionChoice, usage: Option<Option<Usage>>) -> String {
        serde_json::to_string(&self.answer(vec![choice], usage)).unwrap_or_default()
    }

    /// A whole choice.
    fn choice(&self, index: usize, collected: Collected) -> CompletionChoice {
        let prompt = &self.prompts[index / self.n];
        let scored = collected.prompt.as_deref();
        let mut logprobs = self.generated(index, &collected.tokens);
        let mut text = collected.text;
        if let Some(echo) = &prompt.echo {
            text.insert_str(0, echo);
            if let (Some(generated), Some(mut lists)) = (logprobs.take(), self.echoed(index, scored)) {
                lists.append(generated);
                logprobs = Some(lists);
            }
        }
        let prompt_logprobs = self.prompt_logprobs.zip(scored).map(|(top, scored)| {
            prompt_logprobs(&self.served.text.tokenizer, &prompt.ids, &shortened(scored, top))
        });
        CompletionChoice {
            index,
            text,
            logprobs,
            finish_reason: Some(finish_reason(&collected.finish)),
            stop_reason: stop_reason(&collected.finish),
            prompt_logprobs,
        }
    }

    fn names(&self) -> TokenNames<'_> {
        TokenNames { tokenizer: &self.served.text.tokenizer, as_ids: self.as_ids }
    }

    /// Log-probabilities of generated tokens, if they were asked for.
    fn generated(&self, index: usize, tokens: &[GeneratedToken]) -> Option<CompletionLogprobs> {
        self.logprobs?;
        let echo = self.prompts[index / self.n].echo.as_ref();
        let before = echo.map_or(0, |echo| echo.chars().count());
        let mut lists = CompletionLogprobs::default();
        for token in tokens {
            self.names().push(&mut lists, token.id, before + token.offset, token.logprobs.as_ref());
        }
        Some(lists)
    }

    /// Log-probabilities of an echoed prompt, if they were asked for.
    fn echoed(&self, index: usize, scored: Option<&[Option<TokenLogprobs>]>) -> Option<CompletionLogprobs> {
        let prompt = &self.prompts[index / self.n];
        let (scored, echo) = (shortened(scored?, self.logprobs?), prompt.echo.as_ref()?);
        let offsets = offsets(&self.served.text.tokenizer, &prompt.ids, echo);
        let mut lists = CompletionLogprobs::default();
        for ((&id, offset), scored) in prompt.ids.iter().zip(offsets).zip(&scored) {
            self.names().push(&mut lists, id, offset, scored.as_ref());
        }
        Some(lists)
    }
}

/// Where each of `ids` begins in `text`, in characters. Tokens that the tokenizer put before the text are at
/// 0.
fn offsets(tokenizer: &Tokenizer, ids: &[u32], text: &str) -> Vec<usize> {
    let (mut utf8, mut fresh, mut at) = (Utf8Stream::default(), String::new(), 0);
    let mut offsets: Vec<usize> = Vec::with_capacity(ids.len());
    for &id in ids {
        offsets.push(at);
        utf8.push(tokenizer.token_bytes(id), &mut fresh);
        at += fresh.chars().count();
        fresh.clear();
    }
    utf8.finish(&mut fresh);
    let added = (at + fresh.chars().count()).saturating_sub(text.chars().count());
    offsets.iter().map(|offset| offset.saturating_sub(added)).collect()
}

/// The same scores with at most `top` alternatives: the engine was asked once for two readers.
fn shortened(scored: &[Option<TokenLogprobs>], top: usize) -> Vec<Option<TokenLogprobs>> {
    let mut scored = scored.to_vec();
    scored.iter_mut().flatten().for_each(|place| place.top.truncate(top));
    scored
}

struct Writer {
    head: Head,
    /// Choices whose prompt was echoed.
    begun: Vec<bool>,
}

impl Writer {
    fn plain(index: usize, text: String, logprobs: Option<CompletionLogprobs>) -> CompletionChoice {
        CompletionChoice {
            index,
            text,
            logprobs,
            finish_reason: None,
            stop_reason: None,
            prompt_logprobs: None,
        }
    }
}

impl ChunkWriter for Writer {
    fn piece(&mut self, index: usize, piece: Piece, usage: Option<Option<Usage>>) -> Vec<String> {
        let mut chunks = Vec::new();
        let scored = match &piece {
            Piece::Prompt(scored) => Some(scored.as_slice()),
            _ => None,
        };
        // The scored prompt, if there is one, comes before any delta.
        if !std::mem::replace(&mut self.begun[index], true)
            && let Some(echo) = self.head.prompts[index / self.head.n].echo.clone()
        {
            let choice = Self::plain(index, echo, self.head.echoed(index, scored));
            chunks.push(self.head.chunk(choice, usage));
        }
        let Piece::Delta(Delta { text, tokens, finish }) = piece else { return chunks };
        let logprobs = self.head.generated(index, &tokens).filter(|lists| !lists.tokens.is_empty());
        if text.is_empty() && logprobs.is_none() && finish.is_none() {
            return chunks;
        }
        let choice = CompletionChoice {
            finish_reason: finish.as_ref().map(finish_reason),
            stop_reason: finish.as_ref().and_then(stop_reason),
            ..Self::plain(index, text, logprobs)
        };
        chunks.push(self.head.chunk(choice, usage));
        chunks
    }

    fn usage(&mut self, usage: Usage) -> String {
        serde_json::to_string(&self.head.answer(Vec::new(), Some(Some(usage)))).unwrap_or_default()
    }
}
