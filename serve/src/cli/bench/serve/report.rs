//! What many answers come to.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Api;
use super::client::Answer;
use super::drive::Record;
use super::workload::{Lengths, PromptKind, TokensOfWords};
use crate::cli::bench::environment::Environment;
use crate::cli::bench::spread::digits;
use crate::cli::bench::table::Table;

/// What was asked of whom.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::cli::bench) struct Conditions {
    pub(super) url: String,
    pub(super) api: Api,
    pub(super) model: String,
    /// Of a Poisson process.
    pub(super) request_rate: Option<f64>,
    pub(in crate::cli::bench) concurrency: Option<usize>,
    pub(super) warmup: usize,
    pub(in crate::cli::bench) input_len: Lengths,
    pub(in crate::cli::bench) output_len: Lengths,
    pub(super) ignore_eos: bool,
    pub(super) prompts: PromptKind,
    /// As the server counted them, where prompts are words and it counts.
    pub(super) tokens_of_words: Option<TokensOfWords>,
    pub(super) seed: u64,
}

/// Milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(in crate::cli::bench) struct Latency {
    pub(super) mean: f64,
    pub(in crate::cli::bench) p50: f64,
    pub(super) p90: f64,
    pub(in crate::cli::bench) p99: f64,
    pub(super) max: f64,
}

/// Failures of a kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Failures {
    pub(super) count: usize,
    /// What the first of them said.
    pub(super) first: String,
}

/// One request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct OneRequest {
    sent_s: f64,
    input_tokens: usize,
    /// Generated, if it was answered; otherwise asked for.
    output_tokens: usize,
    first_token_ms: Option<f64>,
    total_ms: f64,
    error: Option<String>,
}

/// A run of `bench serve`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::cli::bench) struct ServeReport {
    pub(in crate::cli::bench) environment: Environment,
    pub(in crate::cli::bench) conditions: Conditions,
    pub(in crate::cli::bench) requests: usize,
    pub(in crate::cli::bench) completed: usize,
    pub(super) errors: BTreeMap<String, Failures>,
    /// From the first request to the end of the last.
    pub(super) seconds: f64,
    pub(super) requests_per_s: f64,
    /// Of completed requests, as the server counted them, or else as they were asked for.
    pub(super) input_tokens: usize,
    pub(super) input_tokens_per_s: f64,
    /// Of completed requests.
    pub(super) output_tokens: usize,
    pub(in crate::cli::bench) output_tokens_per_s: f64,
    /// Completed requests whose tokens the server did not count: pieces of text stand for them.
    pub(super) uncounted: usize,
    /// Completed requests with fewer tokens than were asked for.
    pub(super) shorter: usize,
    pub(in crate::cli::bench) time_to_first_token: Option<Latency>,
    /// From text to text, of all requests together.
    pub(in crate::cli::bench) inter_token_latency: Option<Latency>,
    /// Of a request from its first token to its end, by the number of the other tokens.
    pub(super) time_per_output_token: Option<Latency>,
    pub(super) end_to_end: Option<Latency>,
    /// How much later requests were sent than they were to be.
    pub(super) late: Option<Latency>,
    pub(super) each: Vec<OneRequest>,
}

impl Latency {
    /// Of nothing, nothing. The percentile is the least that so many do not exceed.
    fn of(durations: impl IntoIterator<Item = Duration>) -> Option<Self> {
        let mut ms: Vec<f64> = durations.into_iter().map(|duration| duration.as_secs_f64() * 1e3).collect();
        ms.sort_by(f64::total_cmp);
        let max = *ms.last()?;
        let at = |percent: usize| ms[(ms.len() * percent).div_ceil(100).max(1) - 1];
        let mean = ms.iter().sum::<f64>() / ms.len() as f64;
        Some(Self { mean, p50: at(50), p90: at(90), p99: at(99), max })
    }
}

impl ServeReport {
    pub(super) fn new(environment: Environment, conditions: Conditions, records: &[Record]) -> Self {
        let answered = || records.iter().filter_map(|record| record.outcome.as_ref().ok());
        let with_record = || records.iter().filter_map(|r| r.outcome.as_ref().ok().map(|answer| (r, answer)));
        let mut errors: BTreeMap<String, Failures> = BTreeMap::new();
        for failure in records.iter().filter_map(|record| record.outcome.as_ref().err()) {
            let first = || Failures { count: 0, first: failure.to_string() };
            errors.entry(failure.kind()).or_insert_with(first).count += 1;
        }
        let completed = answered().count();
        let begun = records.iter().map(|record| record.sent).min().unwrap_or_default();
        let ended = records.iter().map(|record| record.ended).max().unwrap_or_default();
        let seconds = ended.saturating_sub(begun).as_secs_f64();
        let per_second = |count: usize| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
        let input_tokens =
            with_record().map(|(record, answer)| answer.input_tokens.unwrap_or(record.input_tokens)).sum();
        let output_tokens = answered().map(|answer| answer.output_tokens).sum();
        Self {
            environment,
            conditions,
            requests: records.len(),
            completed,
            errors,
            seconds,
            requests_per_s: per_second(completed),
            input_tokens,
            input_tokens_per_s: per_second(input_tokens),
            output_tokens,
            output_tokens_per_s: per_second(output_tokens),
            uncounted: answered().filter(|answer| !answer.counted).count(),
            shorter: with_record()
                .filter(|(asked, answer)| answer.output_tokens < asked.output_tokens)
                .count(),
            time_to_first_token: Latency::of(answered().map(|answer| answer.first)),
            inter_token_latency: Latency::of(answered().flat_map(|answer| answer.gaps.iter().copied())),
            time_per_output_token: Latency::of(answered().filter_map(per_output_token)),
            end_to_end: Latency::of(answered().map(|answer| answer.total)),
            late: Latency::of(records.iter().filter_map(|record| record.late)),
            each: records.iter().map(OneRequest::of).collect(),
        }
    }

    /// For the terminal.
    pub(super) fn text(&self) -> String {
        let Self { environment, conditions, requests, completed, seconds, .. } = self;
        let Conditions { url, model, input_len, output_len, warmup, seed, .. } = conditions;
        let pace = match (conditions.request_rate, conditions.concurrency) {
            (Some(rate), _) => format!("{rate} requests a second (Poisson)"),
            (None, clients) => format!("{} at a time", clients.unwrap_or(1)),
        };
        let mut text = format!(
            "{model} at {url}: {pace}, {input_len} tokens in, {output_len} out, {warmup} to warm up, seed {seed}\n{}\n\n\
             {completed} of {requests} requests completed in {seconds:.2} s: {} requests/s\n\
             {} tokens in, {} tokens/s; {} tokens out, {} tokens/s\n\n",
            environment.words(),
            digits(self.requests_per_s),
            self.input_tokens,
            digits(self.input_tokens_per_s),
            self.output_tokens,
            digits(self.output_tokens_per_s),
        );
        let mut table = Table::new(1, ["ms", "mean", "p50", "p90", "p99", "max"]);
        for (name, latency) in [
            ("time to first token", self.time_to_first_token),
            ("inter-token latency", self.inter_token_latency),
            ("time per output token", self.time_per_output_token),
            ("end to end", self.end_to_end),
        ] {
            if let Some(Latency { mean, p50, p90, p99, max }) = latency {
                let [mean, p50, p90, p99, max] = [mean, p50, p90, p99, max].map(digits);
                table.row([name.to_owned(), mean, p50, p90, p99, max]);
            }
        }
        text.push_str(&table.text(""));
        text.push_str(&format!("\nerrors: {}\n", self.errors_in_words()));
        for (condition, note) in self.notes() {
            if condition {
                text.push_str(&format!("{note}\n"));
            }
        }
        text
    }

    fn notes(&self) -> [(bool, String); 4] {
        let conditions = &self.conditions;
        let late = self.late.map_or(0.0, |late| late.p99);
        [
            (
                self.uncounted > 0,
                format!(
                    "{} answers came without usage: pieces of text stand for their tokens",
                    self.uncounted
                ),
            ),
            (
                self.shorter > 0,
                format!(
                    "{} answers ended before the length that was asked for{}",
                    self.shorter,
                    if conditions.ignore_eos { "" } else { "; --ignore-eos asks for all of it" }
                ),
            ),
            (
                conditions.prompts == PromptKind::Words && conditions.tokens_of_words.is_none(),
                "the server did not say how many tokens words come to: a word stands for one".into(),
            ),
            (
                // As much as a timer may be off, and more than that says that the client is too slow for the load.
                late > 5.0,
                format!(
                    "requests were sent late by {late:.1} ms (p99): this machine does not keep up with the load"
                ),
            ),
        ]
    }

    /// Every kind with its count, and what the first of it said.
    pub(super) fn errors_in_words(&self) -> String {
        if self.errors.is_empty() {
            return "none".into();
        }
        let kinds =
            self.errors.iter().map(|(kind, Failures { count, first })| format!("{count} {kind} ({first})"));
        kinds.collect::<Vec<_>>().join(", ")
    }
}

/// Of an answer of several tokens.
fn per_output_token(answer: &Answer) -> Option<Duration> {
    let others = u32::try_from(answer.output_tokens.checked_sub(1)?).ok().filter(|&others| others > 0)?;
    Some((answer.total - answer.first) / others)
}

impl OneRequest {
    fn of(record: &Record) -> Self {
        let answer = record.outcome.as_ref().ok();
        Self {
            sent_s: record.sent.as_secs_f64(),
            input_tokens: answer.and_then(|answer| answer.input_tokens).unwrap_or(record.input_tokens),
            output_tokens: answer.map_or(record.output_tokens, |answer| answer.output_tokens),
            first_token_ms: answer.map(|answer| answer.first.as_secs_f64() * 1e3),
            total_ms: (record.ended - record.sent).as_secs_f64() * 1e3,
            error: record.outcome.as_ref().err().map(ToString::to_string),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let ms = |count: u64| (1..=count).rev().map(Duration::from_millis);
        let Latency { mean, p50, p90, p99, max } = Latency::of(ms(200)).unwrap();
        assert_eq!([mean, p50, p90, p99, max], [100.5, 100.0, 180.0, 198.0, 200.0]);
        let Latency { mean, p50, p90, p99, max } = Latency::of(ms(1)).unwrap();
        assert_eq!([mean, p50, p90, p99, max], [1.0; 5]);
        let Latency { p50, p90, .. } = Latency::of(ms(3)).unwrap();
        assert_eq!([p50, p90], [2.0, 3.0]);
        assert_eq!(Latency::of([]), None);
    }

    #[test]
    fn the_first_token_is_no_part_of_the_time_of_the_others() {
        let [first, total] = [30, 130].map(Duration::from_millis);
        let answer = |output_tokens| Answer {
            first,
            gaps: vec![],
            total,
            input_tokens: None,
            output_tokens,
            counted: true,
        };
        assert_eq!(per_output_token(&answer(11)), Some(Duration::from_millis(10)));
        assert_eq!(per_output_token(&answer(1)), None);
    }
}
