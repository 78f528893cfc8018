//! What a model folder holds to be judged by.

use std::collections::BTreeMap;

use dsa80_model::checkpoint::Checkpoint;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value as Json;

use super::EvalError;

const PROMPTS: &str = "prompts.json";
const REFERENCE: &str = "hf_bf16.json";

/// A conversation cut into what is given and what is to be said, in turns, beginning with the former.
pub type Conversation = Vec<String>;

/// `prompts.json`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Prompts {
    /// By task, in the file's order.
    pub tasks: Vec<(String, Vec<Conversation>)>,
    /// Held-back text, of which all but the beginning is to be said.
    pub text: Vec<Conversation>,
}

/// `hf_bf16.json`: what transformers made of the same prompts, in bf16, before the model was quantised.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct Reference {
    /// By task.
    pub tasks: BTreeMap<String, ReferenceTask>,
    /// Of all the held-back text.
    pub text_perplexity: Option<f64>,
    /// By task, how often the MTP layer's draft was what the model itself said next, in bf16 in the trainer: transformers leaves it out.
    #[serde(default)]
    pub draft_acceptance: BTreeMap<String, f64>,
}

/// One task in transformers.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct ReferenceTask {
    /// A digit for each prompt, those of `prompts.json` first: 1 where every token of the reply was the best one.
    pub right: String,
    /// Of what was to be said.
    pub perplexity: Option<f64>,
}

/// The file as it is written.
#[derive(Deserialize)]
struct Written {
    tasks: serde_json::Map<String, Json>,
    #[serde(default)]
    text: Vec<Conversation>,
}

impl Prompts {
    /// Reads them from a model's folder.
    ///
    /// # Errors
    /// They are not there, or not what is expected.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self, EvalError> {
        let folder = checkpoint.name();
        let bytes = checkpoint.file(PROMPTS)?.ok_or_else(|| EvalError::NoPrompts(folder.to_owned()))?;
        let written: Written = parse(folder, PROMPTS, &bytes)?;
        let task = |(name, prompts): (String, Json)| {
            let prompts = serde_path_to_error::deserialize(prompts)
                .map_err(|error| damaged(folder, PROMPTS, format!("tasks.{name}: {error}")))?;
            Ok((name, prompts))
        };
        let tasks = written.tasks.into_iter().map(task).collect::<Result<_, EvalError>>()?;
        let prompts = Self { tasks, text: written.text };
        prompts.check().map_err(|problem| damaged(folder, PROMPTS, problem))?;
        Ok(prompts)
    }

    fn check(&self) -> Result<(), String> {
        let text = std::iter::once(("text", &self.text)).filter(|(_, text)| !text.is_empty());
        let tasks = self.tasks.iter().map(|(name, prompts)| (name.as_str(), prompts));
        for (name, conversations) in tasks.chain(text) {
            if conversations.is_empty() {
                return Err(format!("tasks.{name} has no prompts"));
            }
            if let Some(index) = conversations.iter().position(|parts| parts.len() < 2) {
                return Err(format!(
                    "prompt {index} of `{name}` has {} parts, expected at least 2: what is given, and what is to be said",
                    conversations[index].len()
                ));
            }
            let empty = |parts: &Conversation| parts.iter().position(String::is_empty);
            let first = conversations.iter().enumerate().find_map(|(at, parts)| Some((at, empty(parts)?)));
            if let Some((index, part)) = first {
                return Err(format!("prompt {index} of `{name}`: part {part} is empty, expected text"));
            }
        }
        if self.tasks.is_empty() { Err("`tasks` is empty, expected at least one".into()) } else { Ok(()) }
    }
}

impl Reference {
    /// Reads it from a model's folder; `None` if there is none.
    ///
    /// # Errors
    /// It cannot be read, or is not what is expected.
    pub fn read(checkpoint: &Checkpoint) -> Result<Option<Self>, EvalError> {
        let Some(bytes) = checkpoint.file(REFERENCE)? else { return Ok(None) };
        let reference: Self = parse(checkpoint.name(), REFERENCE, &bytes)?;
        reference.check().map_err(|problem| damaged(checkpoint.name(), REFERENCE, problem))?;
        Ok(Some(reference))
    }

    fn check(&self) -> Result<(), String> {
        let odd = |task: &ReferenceTask| {
            task.right.is_empty() || task.right.chars().any(|digit| !matches!(digit, '0' | '1'))
        };
        match self.tasks.iter().find(|(_, task)| odd(task)) {
            Some((name, task)) => {
                Err(format!("tasks.{name}.right is {:?}, expected a 0 or a 1 for each prompt", task.right))
            }
            None => Ok(()),
        }
    }
}

impl ReferenceTask {
    /// Whether each prompt was answered right.
    pub fn right(&self) -> impl Iterator<Item = bool> {
        self.right.chars().map(|digit| digit == '1')
    }
}

fn parse<T: DeserializeOwned>(folder: &str, file: &'static str, bytes: &[u8]) -> Result<T, EvalError> {
    let reader = &mut serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut *reader)
        .map_err(|error| damaged(folder, file, error.to_string()))?;
    reader.end().map_err(|error| damaged(folder, file, error.to_string()))?;
    Ok(value)
}

fn damaged(folder: &str, file: &'static str, problem: String) -> EvalError {
    EvalError::Damaged { folder: folder.to_owned(), file, problem }
}
