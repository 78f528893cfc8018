//! What a request must satisfy before it may wait: everything that could go wrong later is refused here, by
//! name.

use dsa80_reference::SamplingParams;

use super::request::{Request, SubmitError};
use super::step::StepLimits;

/// Checks `request` against what the model can do; `eos_token_ids` lie in its vocabulary.
///
/// # Errors
/// [`SubmitError::Invalid`] and [`SubmitError::TooLong`].
pub(super) fn check(
    request: &Request,
    limits: &StepLimits,
    eos_token_ids: &[u32],
) -> Result<(), SubmitError> {
    if request.prompt.is_empty() {
        return invalid("`prompt` is empty, expected at least one token");
    }
    check_lengths(request, limits)?;
    check_tokens("prompt", request.prompt.iter(), limits)?;
    check_tokens("stop_token_ids", request.stop_token_ids.iter(), limits)?;
    check_tokens("logit_bias", request.sampling.logit_bias.iter().map(|(token, _)| token), limits)?;
    for (field, wanted) in [("logprobs", request.logprobs), ("prompt_logprobs", request.prompt_logprobs)] {
        if let Some(wanted) = wanted.filter(|&wanted| wanted > limits.max_logprobs) {
            return invalid(format!("`{field}` is {wanted}, expected at most {}", limits.max_logprobs));
        }
    }
    check_min_tokens(request, limits, eos_token_ids)?;
    check_sampling(&request.sampling)
}

fn check_lengths(request: &Request, limits: &StepLimits) -> Result<(), SubmitError> {
    let prompt_tokens = request.prompt.len();
    let max_tokens = request.max_tokens;
    if max_tokens == 0 && request.prompt_logprobs.is_none() {
        return invalid(
            "`max_tokens` is 0, expected at least 1 (or 0 with `prompt_logprobs`, which scores the prompt)",
        );
    }
    if prompt_tokens.saturating_add(max_tokens) > limits.max_model_len {
        let max_model_len = limits.max_model_len;
        return Err(SubmitError::TooLong { prompt_tokens, max_tokens, max_model_len });
    }
    // The last token generated is never computed, so it takes no cache row.
    let rows = prompt_tokens + max_tokens.saturating_sub(1);
    let pages = rows.div_ceil(limits.page_size);
    if pages > limits.num_pages {
        return invalid(format!(
            "{prompt_tokens} prompt tokens and {max_tokens} `max_tokens` need {pages} cache pages of {} \
             tokens, but the cache has {}; ask for less, or start the engine with more pages",
            limits.page_size, limits.num_pages
        ));
    }
    Ok(())
}

fn check_tokens<'a>(
    field: &str,
    mut tokens: impl Iterator<Item = &'a u32>,
    limits: &StepLimits,
) -> Result<(), SubmitError> {
    match tokens.find(|&&token| token as usize >= limits.vocab_size) {
        Some(token) => {
            let vocab_size = limits.vocab_size;
            invalid(format!(
                "`{field}` holds token {token}, expected ids below {vocab_size} (the vocabulary)"
            ))
        }
        None => Ok(()),
    }
}

fn check_min_tokens(
    request: &Request,
    limits: &StepLimits,
    eos_token_ids: &[u32],
) -> Result<(), SubmitError> {
    let Request { min_tokens, max_tokens, .. } = *request;
    if min_tokens > max_tokens {
        return invalid(format!(
            "`min_tokens` is {min_tokens}, expected at most `max_tokens` ({max_tokens})"
        ));
    }
    if min_tokens > 0 {
        let mut banned = [&request.stop_token_ids[..], eos_token_ids].concat();
        banned.sort_unstable();
        banned.dedup();
        if banned.len() == limits.vocab_size {
            return invalid(format!(
                "`min_tokens` is {min_tokens}, but `stop_token_ids` and the end-of-sequence ids cover the \
                 whole vocabulary, so that no token may come first"
            ));
        }
    }
    Ok(())
}

fn check_sampling(sampling: &SamplingParams) -> Result<(), SubmitError> {
    let SamplingParams {
        temperature,
        top_k: _,
        top_p,
        min_p,
        repetition_penalty,
        frequency_penalty,
        presence_penalty,
        logit_bias,
        seed: _,
    } = sampling;
    // Each range is written so that NaN is outside it.
    let in_range = |field: &str, value: f32, inside: bool, expected: &str| {
        if inside { Ok(()) } else { invalid(format!("`{field}` is {value}, expected {expected}")) }
    };
    let finite = |value: f32| value.is_finite();
    in_range(
        "temperature",
        *temperature,
        *temperature >= 0.0 && finite(*temperature),
        "a finite number of at least 0",
    )?;
    in_range("top_p", *top_p, *top_p > 0.0 && *top_p <= 1.0, "a number above 0 and at most 1")?;
    in_range("min_p", *min_p, (0.0..=1.0).contains(min_p), "a number from 0 to 1")?;
    in_range(
        "repetition_penalty",
        *repetition_penalty,
        *repetition_penalty > 0.0 && finite(*repetition_penalty),
        "a finite number above 0",
    )?;
    for (field, value) in [("frequency_penalty", frequency_penalty), ("presence_penalty", presence_penalty)] {
        in_range(field, *value, (-2.0..=2.0).contains(value), "a number from -2 to 2")?;
    }
    for (_, bias) in logit_bias {
        in_range("logit_bias", *bias, (-100.0..=100.0).contains(bias), "biases from -100 to 100")?;
    }
    Ok(())
}

fn invalid(message: impl Into<String>) -> Result<(), SubmitError> {
    Err(SubmitError::Invalid(message.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: StepLimits = StepLimits {
        page_size: 4,
        num_pages: 5,
        cache_dtype: dsa80_reference::DType::Act,
        max_batch_tokens: 8,
        max_batch_seqs: 8,
        max_model_len: 32,
        vocab_size: 10,
        max_logprobs: 20,
    };

    fn request() -> Request {
        Request { prompt: vec![1, 2, 3], max_tokens: 4, ..Request::default() }
    }

    fn message(request: Request) -> String {
        match check(&request, &LIMITS, &[0]) {
            Err(SubmitError::Invalid(message)) => message,
            other => panic!("expected Invalid, found {other:?} for {request:?}"),
        }
    }

    #[test]
    fn a_plain_request_passes_and_so_do_the_edges_of_every_range() {
        assert_eq!(check(&request(), &LIMITS, &[0]), Ok(()));
        for edge in [
            SamplingParams { temperature: 0.0, top_p: 1.0, min_p: 0.0, ..SamplingParams::default() },
            SamplingParams { min_p: 1.0, frequency_penalty: -2.0, ..SamplingParams::default() },
            SamplingParams { presence_penalty: 2.0, ..SamplingParams::default() },
            SamplingParams { logit_bias: vec![(9, -100.0), (0, 100.0)], ..SamplingParams::default() },
        ] {
            assert_eq!(check(&Request { sampling: edge, ..request() }, &LIMITS, &[0]), Ok(()));
        }
        let full = Request { logprobs: Some(20), prompt_logprobs: Some(20), min_tokens: 4, ..request() };
        assert_eq!(check(&full, &LIMITS, &[0]), Ok(()));
    }

    #[test]
    fn an_empty_prompt_is_refused() {
        assert!(message(Request { prompt: vec![], ..request() }).contains("`prompt` is empty"));
    }

    #[test]
    fn tokens_outside_the_vocabulary_are_refused_by_field() {
        let text = message(Request { prompt: vec![1, 10], ..request() });
        assert_eq!(text, "`prompt` holds token 10, expected ids below 10 (the vocabulary)");
        assert!(message(Request { stop_token_ids: vec![11], ..request() }).starts_with("`stop_token_ids`"));
        let sampling = SamplingParams { logit_bias: vec![(10, 1.0)], ..SamplingParams::default() };
        assert!(message(Request { sampling, ..request() }).starts_with("`logit_bias`"));
    }

    #[test]
    fn sampling_parameters_outside_their_range_are_refused_by_name() {
        let refuse = |field: &str, values: &[f32], set: fn(&mut SamplingParams, f32)| {
            for &value in values {
                let mut sampling = SamplingParams::default();
                set(&mut sampling, value);
                let text = message(Request { sampling, ..request() });
                assert!(text.starts_with(&format!("`{field}` is {value}, expected ")), "{text}");
            }
        };
        const NAN: f32 = f32::NAN;
        const INFINITY: f32 = f32::INFINITY;
        refuse("temperature", &[-0.1, NAN, INFINITY], |p, v| p.temperature = v);
        refuse("top_p", &[0.0, 1.01, -1.0, NAN], |p, v| p.top_p = v);
        refuse("min_p", &[-0.1, 1.01, NAN], |p, v| p.min_p = v);
        refuse("repetition_penalty", &[0.0, -1.0, NAN, INFINITY], |p, v| p.repetition_penalty = v);
        refuse("frequency_penalty", &[-2.1, 2.1, NAN], |p, v| p.frequency_penalty = v);
        refuse("presence_penalty", &[-2.1, 2.1, NAN], |p, v| p.presence_penalty = v);
        refuse("logit_bias", &[-101.0, 101.0, NAN], |p, v| p.logit_bias = vec![(1, v)]);
    }

    #[test]
    fn too_many_logprobs_are_refused() {
        let text = message(Request { logprobs: Some(21), ..request() });
        assert_eq!(text, "`logprobs` is 21, expected at most 20");
        assert!(message(Request { prompt_logprobs: Some(21), ..request() }).starts_with("`prompt_logprobs`"));
    }

    #[test]
    fn nothing_to_generate_needs_a_prompt_to_score() {
        assert!(message(Request { max_tokens: 0, ..request() }).starts_with("`max_tokens` is 0"));
        let scoring = Request { max_tokens: 0, prompt_logprobs: Some(0), ..request() };
        assert_eq!(check(&scoring, &LIMITS, &[0]), Ok(()));
    }

    #[test]
    fn min_tokens_must_be_possible() {
        assert!(message(Request { min_tokens: 5, ..request() }).contains("at most `max_tokens` (4)"));
        let all = Request { min_tokens: 1, stop_token_ids: (1..10).collect(), ..request() };
        assert!(message(all.clone()).contains("cover the whole vocabulary"));
        assert_eq!(check(&Request { min_tokens: 0, ..all }, &LIMITS, &[0]), Ok(()));
    }

    #[test]
    fn a_context_beyond_the_model_is_too_long() {
        let too_long = |prompt_tokens, max_tokens| {
            let request = Request { prompt: vec![1; prompt_tokens], max_tokens, ..Request::default() };
            check(&request, &LIMITS, &[0])
        };
        let error = |prompt_tokens, max_tokens| {
            Err(SubmitError::TooLong { prompt_tokens, max_tokens, max_model_len: 32 })
        };
        assert_eq!(too_long(3, 30), error(3, 30));
        assert_eq!(too_long(33, 1), error(33, 1));
        assert_eq!(too_long(3, usize::MAX), error(3, usize::MAX));
    }

    #[test]
    fn a_context_beyond_the_cache_is_refused_with_the_arithmetic() {
        // 5 pages of 4 tokens: the 21st token may be generated, for its own row is never needed.
        let with = |max_tokens| Request { max_tokens, ..request() };
        assert_eq!(check(&with(18), &LIMITS, &[0]), Ok(()));
        assert_eq!(
            message(with(19)),
            "3 prompt tokens and 19 `max_tokens` need 6 cache pages of 4 tokens, but the cache has 5; \
             ask for less, or start the engine with more pages"
        );
    }
}
