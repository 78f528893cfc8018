//! Handing a prompt to the engine, once for each choice.

use std::sync::Arc;

use dsa80_model::engine::{Request, SubmitError};
use dsa80_reference::SamplingParams;

use crate::generation::Generation;
use crate::http::ServedModel;
use crate::metrics::Metrics;
use crate::openai::{ApiError, Common};
use crate::output::{Decoder, OutputOptions};
use crate::record::RequestRecord;

/// Everything about a request that does not depend on the prompt.
pub(crate) struct Plan<'a> {
    pub(crate) metrics: &'a Arc<Metrics>,
    pub(crate) model: &'a ServedModel,
    pub(crate) record: &'a Arc<RequestRecord>,
    pub(crate) common: &'a Common,
    /// With the seed of the first choice.
    pub(crate) sampling: SamplingParams,
    /// Alternatives to report with each generated token.
    pub(crate) logprobs: Option<usize>,
    /// Alternatives to report with each prompt token.
    pub(crate) prompt_logprobs: Option<usize>,
    /// `messages` or `prompt`.
    pub(crate) field: &'static str,
    /// Prompts in the whole request.
    pub(crate) prompts: usize,
}

impl Plan<'_> {
    /// Checks the prompt and submits it `n` times.
    ///
    /// # Errors
    /// 400 for a prompt that does not fit, 429 for a full queue; nothing is left running then.
    pub(crate) fn submit(&self, prompt: &[u32]) -> Result<Vec<Generation>, ApiError> {
        let max_tokens = self.max_tokens(prompt.len())?;
        self.record.add_prompt_tokens(prompt.len());
        (0..self.common.n())
            .map(|choice| {
                let mut sampling = self.sampling.clone();
                sampling.seed = Common::choice_seed(sampling.seed, choice);
                self.submit_one(prompt, sampling, max_tokens)
            })
            .collect()
    }

    fn submit_one(
        &self,
        prompt: &[u32],
        sampling: SamplingParams,
        max_tokens: usize,
    ) -> Result<Generation, ApiError> {
        let common = self.common;
        let text = &self.model.text;
        let ignore_eos = common.ignore_eos.unwrap_or(false);
        let eos_ids = if ignore_eos { Vec::new() } else { text.eos_ids.clone() };
        let own_stops = common.stop_token_ids.clone().unwrap_or_default();
        let mut stop_token_ids = own_stops.clone();
        stop_token_ids.extend(eos_ids.iter().filter(|id| !own_stops.contains(id)));
        let request = Request {
            prompt: prompt.to_vec(),
            sampling,
            max_tokens,
            min_tokens: common.min_tokens.unwrap_or(0),
            stop_token_ids,
            ignore_eos,
            logprobs: self.logprobs,
            prompt_logprobs: self.prompt_logprobs,
        };
        let options = OutputOptions {
            stops: common.stops(),
            include_stop: common.include_stop_str_in_output.unwrap_or(false),
            skip_special_tokens: common.skip_special_tokens.unwrap_or(true),
            min_tokens: request.min_tokens,
            stop_token_ids: own_stops,
            eos_ids,
        };
        let events = self.model.engine.submit(request).map_err(|error| self.refusal(error))?;
        let decoder = Decoder::new(Arc::clone(&text.tokenizer), options);
        let metrics = Arc::clone(self.metrics);
        Ok(Generation::new(events, decoder, metrics, Arc::clone(self.record)))
    }

    /// A request that is itself larger than the queue would be told to try again for ever.
    fn refusal(&self, error: SubmitError) -> ApiError {
        let places = self.prompts * self.common.n();
        match error {
            SubmitError::QueueFull { limit, .. } if places > limit => ApiError::field(
                self.field,
                format!(
                    "This request needs {places} places in a queue of {limit}. Send at most {limit} prompts times n in \
                     one request, or start the server with a larger --max-queued-requests."
                ),
            ),
            error => error.into(),
        }
    }

    /// Tokens to generate: what was asked for, or the endpoint's default, or the rest of the context.
    fn max_tokens(&self, prompt_tokens: usize) -> Result<usize, ApiError> {
        if prompt_tokens == 0 {
            let field = self.field;
            return Err(ApiError::field(
                field,
                format!("{field} must come to at least one token, found none."),
            ));
        }
        let max_model_len = self.model.engine.max_model_len();
        let asked = self.common.max_tokens();
        let room = max_model_len.saturating_sub(prompt_tokens);
        let max_tokens =
            asked.unwrap_or(self.common.default_max_tokens.map_or(room, |tokens| tokens.min(room)));
        if prompt_tokens > max_model_len || max_tokens > room || (asked.is_none() && room == 0) {
            return Err(ApiError::too_long(self.field, prompt_tokens, asked, max_model_len));
        }
        if self.common.min_tokens.is_some_and(|min_tokens| min_tokens > max_tokens) {
            let message = format!("min_tokens must not be above max_tokens, which is {max_tokens}.");
            return Err(ApiError::field("min_tokens", message));
        }
        Ok(max_tokens)
    }
}
