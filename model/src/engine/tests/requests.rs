//! One request at a time: what it yields, and when it ends.

use dsa80_reference::SamplingParams;

use super::*;

/// The tokens that the model gives behind `prompt` when nothing stops it.
fn stream(prompt: &[u32], count: usize) -> Vec<u32> {
    tokens(&mock::expected(&request(prompt.iter().copied(), count), &[], limits().vocab_size))
}

fn run(request: Request) -> Client {
    let mut bench = Bench::new(limits(), true);
    let mut client = bench.submit(request);
    bench.drain();
    client.assert_expected();
    assert_eq!(bench.stats().pages_used, 0);
    client
}

#[test]
fn max_tokens_ends_with_length() {
    let mut client = run(request([5, 6, 7], 9));
    assert_eq!(client.finish(), Some(FinishReason::Length));
    assert_eq!(client.tokens(), stream(&[5, 6, 7], 9));
    assert_eq!(client.usage(), Usage { prompt_tokens: 3, completion_tokens: 9, cached_tokens: 0 });
}

#[test]
fn a_stop_token_ends_with_stop_and_is_the_last_token() {
    let free = stream(&[5, 6, 7], 9);
    let stop = free[4];
    let first = free.iter().position(|&token| token == stop).unwrap();
    let mut client = run(Request { stop_token_ids: vec![stop], ..request([5, 6, 7], 9) });
    assert_eq!(client.finish(), Some(FinishReason::Stop));
    assert_eq!(client.tokens(), free[..=first]);
}

/// A prompt behind which an end-of-sequence id comes within a few tokens.
fn prompt_before_eos() -> (Vec<u32>, usize) {
    (2..50)
        .find_map(|token| {
            let at = stream(&[token], 20).iter().position(|token| EOS.contains(token))?;
            (at >= 2).then(|| (vec![token], at))
        })
        .expect("some prompt leads to an end")
}

#[test]
fn end_of_sequence_ends_with_stop_unless_it_is_ignored() {
    let (prompt, at) = prompt_before_eos();
    let mut client = run(Request { ignore_eos: false, ..request(prompt.clone(), 30) });
    assert_eq!(client.finish(), Some(FinishReason::Stop));
    assert_eq!(client.tokens().len(), at + 1);
    let mut client = run(request(prompt, 30));
    assert_eq!(client.finish(), Some(FinishReason::Length));
    assert_eq!(client.tokens().len(), 30);
}

#[test]
fn min_tokens_bans_the_end_until_then() {
    let (prompt, at) = prompt_before_eos();
    let with = |min_tokens| Request { ignore_eos: false, min_tokens, ..request(prompt.clone(), 30) };
    assert_eq!(run(with(at)).tokens().len(), at + 1, "the first token that may be the end");
    let mut client = run(with(at + 1));
    assert!(!EOS.contains(&client.tokens()[at]), "banned there");
    assert!(client.tokens().len() > at + 1);
    assert_eq!(run(with(30)).finish(), Some(FinishReason::Length));
}

#[test]
fn generated_tokens_carry_logprobs_only_when_asked() {
    let with = |logprobs| run(Request { logprobs, ..request([9, 8], 3) });
    let entries = |client: &mut Client| -> Vec<Option<usize>> {
        client
            .read()
            .iter()
            .filter_map(|event| match event {
                Event::Token { logprobs, .. } => Some(logprobs.as_ref().map(|l| l.top.len())),
                _ => None,
            })
            .collect()
    };
    assert_eq!(entries(&mut with(None)), [None; 3]);
    assert_eq!(entries(&mut with(Some(0))), [Some(0); 3]);
    assert_eq!(entries(&mut with(Some(5))), [Some(5); 3]);
}

#[test]
fn a_scored_prompt_comes_before_the_first_token() {
    // 21 tokens: three chunks of the budget of 8.
    let mut client = run(Request { prompt_logprobs: Some(2), ..request(2..23, 4) });
    let Event::Prompt(scores) = &client.read()[1] else { panic!("{:?}", client.events) };
    assert_eq!(scores.len(), 21);
    assert_eq!(scores.iter().position(Option::is_none), Some(0));
    assert!(scores[1..].iter().all(Option::is_some));
    assert_eq!(client.tokens().len(), 4);
}

#[test]
fn a_prompt_can_be_scored_without_generating() {
    for prompt in [2..3, 2..10, 2..23] {
        let mut client = run(Request { prompt_logprobs: Some(0), ..request(prompt, 0) });
        assert!(matches!(
            client.read(),
            [Event::Started { .. }, Event::Prompt(_), Event::Finished { reason: FinishReason::Length, .. }]
        ));
    }
}

#[test]
fn scoring_computes_the_whole_prompt_again() {
    let mut bench = Bench::new(limits(), true);
    bench.submit(request(2..23, 1));
    bench.drain();
    let mut scored = bench.submit(Request { prompt_logprobs: Some(1), ..request(2..23, 2) });
    bench.drain();
    scored.assert_expected();
    assert_eq!(scored.usage().cached_tokens, 0);
    let mut plain = bench.submit(request(2..23, 2));
    bench.drain();
    plain.assert_expected();
    assert_eq!(plain.usage().cached_tokens, 20);
}

#[test]
fn each_penalty_hands_the_output_to_the_sampler_and_nothing_else_does() {
    let default = SamplingParams::default;
    for (sampling, wanted) in [
        (SamplingParams { repetition_penalty: 1.1, ..default() }, true),
        (SamplingParams { frequency_penalty: 0.5, ..default() }, true),
        (SamplingParams { presence_penalty: -0.5, ..default() }, true),
        (SamplingParams { temperature: 0.0, top_k: 3, logit_bias: vec![(1, 2.0)], ..default() }, false),
    ] {
        let mut bench = Bench::new(limits(), true);
        let mut client = bench.submit(Request { sampling: sampling.clone(), ..request([4, 4, 4], 5) });
        bench.drain();
        client.assert_expected();
        let log = bench.model.log.lock().unwrap();
        let last = &log[log.len() - 1].targets[0];
        assert_eq!(*last.params, sampling);
        assert_eq!(last.output.len(), if wanted { 4 } else { 0 }, "{sampling:?}");
    }
}

#[test]
fn the_seed_chooses_the_tokens() {
    let with = |seed| {
        let sampling = SamplingParams { seed, ..SamplingParams::default() };
        run(Request { sampling, ..request([4, 4, 4], 12) }).tokens()
    };
    assert_eq!(with(7), with(7));
    assert_ne!(with(7), with(8));
}

#[test]
fn a_context_can_be_filled_to_the_last_token() {
    let limits = StepLimits { max_model_len: 20, num_pages: 5, ..limits() };
    let mut bench = Bench::new(limits, true);
    let mut client = bench.submit(request(2..10, 12));
    bench.drain();
    client.assert_expected();
    assert_eq!(client.tokens().len(), 12);
}
