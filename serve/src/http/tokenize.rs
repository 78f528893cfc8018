//! `POST /tokenize` and `POST /detokenize`

use axum::Json;
use axum::extract::State;

use super::ServerState;
use super::body::ApiJson;
use super::prompt::{chat_prompt, run_cpu, text_prompt};
use crate::openai::{
    ApiError, ChatMessage, DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse,
    check_ids,
};
use crate::text::RenderOptions;

pub(super) async fn tokenize(
    State(state): State<ServerState>,
    ApiJson(request): ApiJson<TokenizeRequest>,
) -> Result<Json<TokenizeResponse>, ApiError> {
    let model = state.model()?;
    state.model_name(request.model.as_deref())?;
    let tokens = match (request.prompt, request.messages) {
        (Some(prompt), _) => text_prompt(&model, prompt, request.add_special_tokens.unwrap_or(true)).await?,
        (None, messages) => {
            let messages = messages.unwrap_or_default();
            let bytes = messages.iter().map(ChatMessage::len_hint).sum();
            let rendered = messages.iter().enumerate();
            let rendered = rendered
                .map(|(i, message)| message.for_template(&format!("messages[{i}]")))
                .collect::<Result<Vec<_>, _>>()?;
            let continue_final_message = request.continue_final_message.unwrap_or(false);
            let options = RenderOptions {
                add_generation_prompt: request.add_generation_prompt.unwrap_or(!continue_final_message),
                continue_final_message,
                tools: request.tools,
                kwargs: request.chat_template_kwargs.unwrap_or_default(),
            };
            chat_prompt(&model, rendered, bytes, options, request.add_special_tokens.unwrap_or(false)).await?
        }
    };
    let spell = |&id: &u32| model.text.tokenizer.token_string(id).unwrap_or_default();
    let token_strs = (request.return_token_strs == Some(true)).then(|| tokens.iter().map(spell).collect());
    let max_model_len = model.engine.max_model_len();
    Ok(Json(TokenizeResponse { count: tokens.len(), max_model_len, tokens, token_strs }))
}

pub(super) async fn detokenize(
    State(state): State<ServerState>,
    ApiJson(request): ApiJson<DetokenizeRequest>,
) -> Result<Json<DetokenizeResponse>, ApiError> {
    let model = state.model()?;
    state.model_name(request.model.as_deref())?;
    check_ids("tokens", &request.tokens, model.text.vocab_size)?;
    let prompt =
        run_cpu(request.tokens.len(), move || Ok(model.text.tokenizer.decode(&request.tokens, false)))
            .await?;
    Ok(Json(DetokenizeResponse { prompt }))
}
