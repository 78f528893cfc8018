//! `dsa80 generate`

use std::io::{ErrorKind, Read, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use clap::Args;
use dsa80_model::distributed::Place;
use serde_json::json;

use super::args::ModelArgs;
use super::load::load;
use super::rank;
use crate::http::ServedModel;
use crate::metrics::Metrics;
use crate::openai::{Common, StopList};
use crate::output::Piece;
use crate::record::RequestRecord;
use crate::submit::Plan;
use crate::text::RenderOptions;

#[derive(Debug, Args)]
pub(super) struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// The prompt; without it, standard input is read.
    #[arg(value_name = "PROMPT")]
    positional: Option<String>,

    /// The prompt, as an option.
    #[arg(long, conflicts_with = "positional")]
    prompt: Option<String>,

    /// The prompt is the text itself, not a user's message through the chat template.
    #[arg(long, conflicts_with_all = ["system", "no_thinking"])]
    raw: bool,

    /// A system message before the prompt.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,

    /// Tell the chat template not to let the model think first.
    #[arg(long)]
    no_thinking: bool,

    /// Tokens to generate at most; by default until the model stops, or the context is full.
    #[arg(long, short = 'n', value_name = "N")]
    max_tokens: Option<usize>,

    /// 0 always takes the most probable token.
    #[arg(long, short)]
    temperature: Option<f32>,

    /// Keep the smallest set of tokens that reaches this probability.
    #[arg(long)]
    top_p: Option<f32>,

    /// Keep the k most probable tokens.
    #[arg(long)]
    top_k: Option<i64>,

    /// Drop tokens less probable than this share of the most probable one.
    #[arg(long)]
    min_p: Option<f32>,

    /// Divides the logits of tokens already seen; 1 is off.
    #[arg(long)]
    repetition_penalty: Option<f32>,

    /// Lowers a token's logit each time it is generated.
    #[arg(long, allow_hyphen_values = true)]
    frequency_penalty: Option<f32>,

    /// Lowers the logit of every token that was generated.
    #[arg(long, allow_hyphen_values = true)]
    presence_penalty: Option<f32>,

    /// Makes the answer repeatable; random without it.
    #[arg(long)]
    seed: Option<i64>,

    /// A string that ends the answer; may be repeated.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,

    /// Go on past the model's end-of-sequence token.
    #[arg(long)]
    ignore_eos: bool,

    /// Show special tokens too.
    #[arg(long)]
    show_special_tokens: bool,

    /// Do not print the line with counts and speed at the end.
    #[arg(long, short)]
    quiet: bool,
}

pub(super) fn run(args: GenerateArgs) -> anyhow::Result<ExitCode> {
    let common = args.common();
    common.validate()?;
    if let Some(place) = Place::from_env()? {
        bail!(
            "`generate` runs in one process, and this is rank {} of {} (RANK, WORLD_SIZE): use `serve`",
            place.rank,
            place.world_size
        );
    }
    let prompt = match args.prompt.as_ref().or(args.positional.as_ref()) {
        Some(prompt) => prompt.clone(),
        None => {
            let mut text = String::new();
            std::io::stdin()
                .read_to_string(&mut text)
                .context("cannot read the prompt from standard input")?;
            text
        }
    };
    let model = load(&args.model, None).inspect_err(|_| {
        // What a start has left behind may be stuck in a driver, which then does not let the process go.
        rank::end_within(Duration::from_secs(10));
    })?;
    let ids = args.encode(&model, &prompt)?;
    let record = Arc::new(RequestRecord::new("generate".into()));
    let plan = Plan {
        metrics: &Arc::new(Metrics::default()),
        model: &model,
        record: &record,
        sampling: common.sampling(&model.text)?,
        common: &common,
        logprobs: None,
        prompt_logprobs: None,
        field: "prompt",
        prompts: 1,
    };
    let mut generation = plan.submit(&ids)?.pop().context("no generation")?;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let first = runtime.block_on(async {
        let mut first = None;
        while let Some(piece) = generation.next().await {
            match piece {
                Piece::Delta(delta) => {
                    first.get_or_insert_with(Instant::now);
                    if !show(&delta.text)? {
                        break;
                    }
                }
                Piece::Failed(message) => return Err(anyhow!(message)),
                Piece::Prompt(_) => {}
            }
        }
        show("\n")?;
        anyhow::Ok(first)
    })?;
    if !args.quiet {
        let (prompt_tokens, completion_tokens, first_ms, _) = record.summary();
        let seconds = first.map_or(0.0, |first| first.elapsed().as_secs_f64());
        let rate = completion_tokens.saturating_sub(1) as f64 / seconds.max(1e-9);
        let first_ms = first_ms.unwrap_or(0.0);
        writeln!(
            std::io::stderr(),
            "[{prompt_tokens} prompt tokens, first token after {first_ms:.0} ms; {completion_tokens} generated, {rate:.1} a second]"
        )?;
    }
    model.engine.shutdown(std::time::Duration::ZERO);
    Ok(ExitCode::SUCCESS)
}

/// Prints, and tells whether anybody still reads.
fn show(text: &str) -> anyhow::Result<bool> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("cannot write the answer"),
    }
}

impl GenerateArgs {
    /// The options as the fields of a request, so that they are checked by the same rules.
    fn common(&self) -> Common {
        Common {
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            seed: self.seed,
            stop: Some(StopList::Many(self.stop.clone())),
            ignore_eos: Some(self.ignore_eos),
            skip_special_tokens: Some(!self.show_special_tokens),
            ..Common::default()
        }
    }

    fn encode(&self, model: &ServedModel, prompt: &str) -> anyhow::Result<Vec<u32>> {
        let tokenizer = &model.text.tokenizer;
        if self.raw {
            return tokenizer.encode(prompt, true).map_err(|error| anyhow!(error));
        }
        let system = self.system.iter().map(|text| json!({"role": "system", "content": text}));
        let messages: Vec<_> = system.chain([json!({"role": "user", "content": prompt})]).collect();
        let mut options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
        if self.no_thinking {
            options.kwargs.insert("enable_thinking".into(), json!(false));
        }
        let text = model.text.template().and_then(|template| template.render(&messages, &options));
        tokenizer
            .encode(&text.context("use --raw, or another prompt")?, false)
            .map_err(|error| anyhow!(error))
    }
}
