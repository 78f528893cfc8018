//! `dsa80 bench serve`

mod arrivals;
mod client;
mod drive;
mod events;
mod report;
#[cfg(test)]
mod tests;
mod workload;

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use self::client::Endpoint;
use self::drive::{Pace, drive};
use self::report::Conditions;
pub(super) use self::report::{Latency, ServeReport};
use self::workload::{Lengths, PromptKind, TokensOfWords, Workload};
use super::environment::Environment;
use super::{ReportArgs, print};

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// The server's address, with or without /v1. Plain HTTP.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8000")]
    base_url: String,

    /// Which of the two to ask.
    #[arg(long, value_enum, default_value = "completions")]
    endpoint: Api,

    /// The model's name; by default the first that the server lists.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,

    /// The key that the server asks for.
    #[arg(long, value_name = "KEY", env = "DSA80_API_KEY", hide_env_values = true)]
    api_key: Option<String>,

    /// Requests a second on average, at random moments (a Poisson process), however many are not answered yet.
    #[arg(long, value_name = "R", conflicts_with = "concurrency", value_parser = rate)]
    request_rate: Option<f64>,

    /// So many requests at a time: the next is sent when one has been answered. Default: 1.
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    concurrency: Option<usize>,

    /// Requests that are measured.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = at_least_one)]
    num_requests: usize,

    /// Requests before those, one after the other.
    #[arg(long, value_name = "N", default_value_t = 2)]
    warmup: usize,

    /// Tokens of a prompt: a number, or A-B for any number between them.
    #[arg(long, value_name = "TOKENS", default_value = "1024")]
    input_len: Lengths,

    /// Tokens to generate at most, in the same way.
    #[arg(long, value_name = "TOKENS", default_value = "128")]
    output_len: Lengths,

    /// Ask the server to go on past the end of an answer, so that answers are as long as asked for. dsa80, vLLM and SGLang can; OpenAI refuses
    /// it.
    #[arg(long)]
    ignore_eos: bool,

    /// What prompts are made of: ids (exact lengths; for completions on servers that take token ids) or words (of which the server is asked at
    /// the start how many tokens they come to). Default: ids for completions, words for chat.
    #[arg(long, value_enum)]
    prompts: Option<PromptKind>,

    /// With ids: they are below this.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = at_least_one)]
    vocab_size: usize,

    /// The sampling temperature; by default the server's.
    #[arg(long, value_name = "T")]
    temperature: Option<f64>,

    /// Prompts, lengths and arrivals are the same for the same seed.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    /// Seconds after which a request is given up.
    #[arg(long, value_name = "SECONDS", default_value_t = 600.0, value_parser = rate)]
    timeout: f64,

    /// Seconds that a server which is still loading (HTTP 503) is waited for at most, before the first request; 0: it is not asked whether it is.
    #[arg(long, value_name = "SECONDS", default_value_t = 1800)]
    wait: u64,

    #[command(flatten)]
    report: ReportArgs,
}

/// Which of OpenAI's two ways to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Api {
    Chat,
    Completions,
}

pub(super) fn run(args: &ServeArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Runtime::new().context("cannot start the async runtime")?;
    let report = runtime.block_on(measure(args))?;
    print(&report.text())?;
    args.report.write(&report)?;
    if report.completed == 0 {
        bail!("no request was answered in full ({})", report.errors_in_words());
    }
    Ok(())
}

async fn measure(args: &ServeArgs) -> anyhow::Result<ServeReport> {
    let kind = args.prompts.unwrap_or(match args.endpoint {
        Api::Completions => PromptKind::Ids,
        Api::Chat => PromptKind::Words,
    });
    ensure!(
        (kind, args.endpoint) != (PromptKind::Ids, Api::Chat),
        "--prompts ids is for --endpoint completions: messages are text; use --prompts words"
    );
    let timeout = Duration::try_from_secs_f64(args.timeout).context("--timeout")?;
    let mut endpoint = Endpoint::new(&args.base_url, args.endpoint, args.api_key.clone(), timeout)?;
    endpoint.wait(Duration::from_secs(args.wait)).await?;
    endpoint.model = match &args.model {
        Some(model) => model.clone(),
        None => endpoint.first_model().await?,
    };
    let mut workload = Workload {
        api: args.endpoint,
        kind,
        model: endpoint.model.clone(),
        input: args.input_len,
        output: args.output_len,
        vocab_size: args.vocab_size,
        ignore_eos: args.ignore_eos,
        temperature: args.temperature,
        seed: args.seed,
        tokens_of_words: TokensOfWords::default(),
    };
    let tokens_of_words = match kind {
        PromptKind::Ids => None,
        PromptKind::Words => measured_words(&endpoint, &workload).await?,
    };
    workload.tokens_of_words = tokens_of_words.unwrap_or_default();
    // Prompts of their own, lest what is measured find them in a prefix cache.
    let warm = drive(&endpoint, &workload, Pace::Concurrency(1), args.num_requests, args.warmup).await;
    if let Some(Err(failure)) = warm.first().map(|record| &record.outcome) {
        tracing::warn!("the first warm-up request failed: {failure}");
    }
    let pace = args.pace();
    let records = drive(&endpoint, &workload, pace, 0, args.num_requests).await;
    let conditions = Conditions {
        url: endpoint.url.clone(),
        api: args.endpoint,
        model: endpoint.model.clone(),
        request_rate: args.request_rate,
        concurrency: match pace {
            Pace::Concurrency(clients) => Some(clients),
            Pace::Rate { .. } => None,
        },
        warmup: args.warmup,
        input_len: args.input_len,
        output_len: args.output_len,
        ignore_eos: args.ignore_eos,
        prompts: kind,
        tokens_of_words,
        seed: args.seed,
    };
    Ok(ServeReport::new(Environment::of(None, args.report.git.as_deref()), conditions, &records))
}

/// What words come to, by asking for the first token after few of them and after many. Nothing, where the server does not count.
async fn measured_words(endpoint: &Endpoint, workload: &Workload) -> anyhow::Result<Option<TokensOfWords>> {
    let mut counts = Vec::new();
    for words in TokensOfWords::PROBES {
        let answer = endpoint.ask(workload.probe(words)).await;
        let answer = answer.context("asking how many tokens words come to")?;
        counts.extend(answer.input_tokens);
    }
    Ok(match counts[..] {
        [few, many] => TokensOfWords::measured(few, many),
        _ => None,
    })
}

impl ServeArgs {
    fn pace(&self) -> Pace {
        match self.request_rate {
            Some(rate) => Pace::Rate { rate, seed: self.seed },
            None => Pace::Concurrency(self.concurrency.unwrap_or(1)),
        }
    }
}

fn rate(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|rate: &f64| rate.is_finite() && *rate > 0.0);
    number.ok_or_else(|| format!("expected a number above 0, found {text:?}"))
}

fn at_least_one(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|&number| number > 0);
    number.ok_or_else(|| format!("expected a whole number of at least 1, found {text:?}"))
}
