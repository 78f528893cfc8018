//! One request as a client makes it, and whether the answer is whole.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use futures::StreamExt;
use serde_json::Value;

use super::job::{Job, Manner};

/// How a request came out, as it should.
#[derive(Debug)]
pub(crate) enum Outcome {
    Complete {
        /// Of every choice.
        texts: Vec<String>,
        /// Of all choices.
        tokens: usize,
    },
    /// The client did not wait for the end.
    Left,
    Refused,
}

/// One choice as it grows.
#[derive(Debug, Default)]
struct Choice {
    text: String,
    finish: Option<String>,
}

pub(crate) async fn run(http: &reqwest::Client, url: &str, job: &Job) -> Result<Outcome> {
    let request = http.post(url).header("content-type", "application/json").body(job.body.clone());
    let answer = async { read(request.send().await?, job).await };
    match job.manner {
        Manner::LeaveAfter(micros) => match tokio::time::timeout(Duration::from_micros(micros), answer).await
        {
            Ok(outcome) => outcome,
            Err(_) => Ok(Outcome::Left),
        },
        // No request takes nearly as long.
        _ => tokio::time::timeout(Duration::from_secs(120), answer).await.context("no end in sight")?,
    }
}

async fn read(response: reqwest::Response, job: &Job) -> Result<Outcome> {
    let status = response.status().as_u16();
    if job.manner == Manner::BeRefused {
        let body = response.text().await?;
        ensure!(matches!(status, 400 | 404), "{status}: {body}");
        let body: Value = serde_json::from_str(&body).with_context(|| body.clone())?;
        ensure!(body["error"]["message"].as_str().is_some_and(|message| !message.is_empty()), "{body}");
        return Ok(Outcome::Refused);
    }
    if status != 200 {
        bail!("{status}: {}", response.text().await?);
    }
    let (choices, usage) = match job.stream {
        true => match stream(response, job).await? {
            Some(read) => read,
            None => return Ok(Outcome::Left),
        },
        false => {
            let mut choices: Vec<Choice> = Vec::new();
            let body: Value = response.json().await?;
            take(&body, &mut choices)?;
            (choices, body["usage"].clone())
        }
    };
    whole(choices, &usage, job)
}

/// All choices of a stream and its counts; nothing if the client left before the end.
async fn stream(response: reqwest::Response, job: &Job) -> Result<Option<(Vec<Choice>, Value)>> {
    let (mut choices, mut usage, mut chunks, mut done) = (Vec::new(), Value::Null, 0, false);
    let (mut body, mut rest) = (response.bytes_stream(), Vec::new());
    while let Some(bytes) = body.next().await {
        rest.extend_from_slice(&bytes?);
        while let Some(end) = rest.windows(2).position(|pair| pair == b"\n\n") {
            let event: Vec<u8> = rest.drain(..end + 2).collect();
            let event = std::str::from_utf8(&event[..end])?;
            // A comment keeps a silent connection open.
            let Some(data) = event.strip_prefix("data: ") else {
                ensure!(event.starts_with(':'), "{event}");
                continue;
            };
            ensure!(!done, "{data} after the end");
            if data == "[DONE]" {
                done = true;
                continue;
            }
            let chunk: Value = serde_json::from_str(data).with_context(|| data.to_owned())?;
            take(&chunk, &mut choices)?;
            if !chunk["usage"].is_null() {
                usage = chunk["usage"].clone();
            }
            chunks += 1;
            if matches!(job.manner, Manner::LeaveAt(last) if chunks >= last) {
                return Ok(None);
            }
        }
    }
    ensure!(done && rest.is_empty(), "a stream that ends in the middle, after {chunks} chunks");
    Ok(Some((choices, usage)))
}

/// Adds what an answer, or a chunk of one, says.
fn take(answer: &Value, choices: &mut Vec<Choice>) -> Result<()> {
    ensure!(answer.get("error").is_none(), "{answer}");
    for piece in answer["choices"].as_array().context("no choices")? {
        let index = piece["index"].as_u64().context("no index")? as usize;
        if choices.len() <= index {
            choices.resize_with(index + 1, Choice::default);
        }
        let choice = &mut choices[index];
        ensure!(choice.finish.is_none(), "a choice goes on after its end: {answer}");
        let text = [&piece["text"], &piece["message"]["content"], &piece["delta"]["content"]];
        choice.text.extend(text.into_iter().filter_map(Value::as_str));
        choice.finish = piece["finish_reason"].as_str().map(str::to_owned);
    }
    Ok(())
}

fn whole(choices: Vec<Choice>, usage: &Value, job: &Job) -> Result<Outcome> {
    ensure!(choices.len() == job.choices, "{} choices of {}", choices.len(), job.choices);
    for choice in &choices {
        let expected: &[&str] = if job.runs_to_the_end { &["length"] } else { &["length", "stop"] };
        let finish = choice.finish.as_deref().context("a choice without an end")?;
        ensure!(expected.contains(&finish), "{finish} is none of {expected:?}");
    }
    let tokens = usage["completion_tokens"].as_u64().context("no usage")? as usize;
    let most = job.max_tokens * job.choices;
    let least = if job.runs_to_the_end { most } else { job.choices };
    ensure!((least..=most).contains(&tokens), "{tokens} tokens, expected {least} to {most}");
    let sum = usage["prompt_tokens"].as_u64().context("no usage")? as usize + tokens;
    ensure!(usage["total_tokens"].as_u64() == Some(sum as u64), "{usage}");
    Ok(Outcome::Complete { texts: choices.into_iter().map(|choice| choice.text).collect(), tokens })
}
