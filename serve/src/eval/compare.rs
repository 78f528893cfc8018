//! Replies in numbers, beside those of transformers.

use serde::{Deserialize, Serialize};

use super::{Reference, ReferenceTask, Reply};

/// What a model's answers come to.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Report {
    /// In the order of `prompts.json`.
    pub tasks: Vec<TaskReport>,
    /// Of the held-back text, where there is some.
    pub text: Option<TextReport>,
}

/// One task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskReport {
    /// Its name.
    pub task: String,
    /// Conversations that were asked.
    pub prompts: usize,
    /// Tokens of a conversation, in the mean.
    pub context: f64,
    /// The share of them that was answered right.
    pub accuracy: f64,
    /// A digit for each: 1 where every token of the reply was the best one.
    pub right: String,
    /// Of what was to be said.
    pub perplexity: f64,
    /// How often a draft was what the model itself said next, where there were drafts.
    pub draft_acceptance: Option<f64>,
    /// Transformers in bf16, where its results are stored.
    pub stored: Option<StoredTask>,
}

/// One task in transformers, in bf16.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StoredTask {
    /// All that it was asked.
    pub prompts: usize,
    /// The share of them that it answered right.
    pub accuracy: f64,
    /// Over all of them.
    pub perplexity: Option<f64>,
    /// Over all of them.
    pub draft_acceptance: Option<f64>,
    /// Those prompts that both were asked.
    pub compared: Option<Compared>,
}

/// Over the same prompts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Compared {
    /// How many there are.
    pub prompts: usize,
    /// The share that the model answered right.
    pub accuracy: f64,
    /// The share that transformers answered right.
    pub stored_accuracy: f64,
    /// Prompts that one of them answered right and the other did not.
    pub differ: usize,
}

/// The held-back text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TextReport {
    /// Texts.
    pub prompts: usize,
    /// Tokens that were to be said.
    pub tokens: usize,
    /// Of those.
    pub perplexity: f64,
    /// Transformers', over all of the text.
    pub stored_perplexity: Option<f64>,
}

impl TaskReport {
    /// What `replies` to the first prompts of `task` come to.
    pub fn new(task: &str, replies: &[Reply], reference: Option<&Reference>) -> Self {
        let right: Vec<bool> = replies.iter().map(|reply| reply.right).collect();
        let sum = |of: fn(&Reply) -> usize| replies.iter().map(of).sum::<usize>();
        let drafted = sum(|reply| reply.drafted);
        let stored = reference.and_then(|reference| {
            let draft_acceptance = reference.draft_acceptance.get(task).copied();
            Some(StoredTask::new(reference.tasks.get(task)?, &right, draft_acceptance))
        });
        Self {
            task: task.to_owned(),
            prompts: replies.len(),
            context: share(sum(|reply| reply.context), replies.len()),
            accuracy: accuracy(&right),
            right: right.iter().map(|right| if *right { '1' } else { '0' }).collect(),
            perplexity: perplexity(replies),
            draft_acceptance: (drafted > 0).then(|| share(sum(|reply| reply.accepted), drafted)),
            stored,
        }
    }
}

impl StoredTask {
    fn new(task: &ReferenceTask, right: &[bool], draft_acceptance: Option<f64>) -> Self {
        let theirs: Vec<bool> = task.right().collect();
        let both = right.len().min(theirs.len());
        let compared = (both > 0).then(|| Compared {
            prompts: both,
            accuracy: accuracy(&right[..both]),
            stored_accuracy: accuracy(&theirs[..both]),
            differ: right.iter().zip(&theirs).filter(|(ours, theirs)| ours != theirs).count(),
        });
        Self {
            prompts: theirs.len(),
            accuracy: accuracy(&theirs),
            perplexity: task.perplexity,
            draft_acceptance,
            compared,
        }
    }
}

impl TextReport {
    /// What `replies` to held-back text come to; `None` where there is none.
    pub fn new(replies: &[Reply], reference: Option<&Reference>) -> Option<Self> {
        (!replies.is_empty()).then(|| Self {
            prompts: replies.len(),
            tokens: replies.iter().map(|reply| reply.said).sum(),
            perplexity: perplexity(replies),
            stored_perplexity: reference.and_then(|reference| reference.text_perplexity),
        })
    }
}

fn perplexity(replies: &[Reply]) -> f64 {
    let (loss, said) =
        replies.iter().fold((0.0, 0), |(loss, said), reply| (loss + reply.loss, said + reply.said));
    (loss / said.max(1) as f64).exp()
}

fn accuracy(right: &[bool]) -> f64 {
    share(right.iter().filter(|right| **right).count(), right.len())
}

fn share(part: usize, whole: usize) -> f64 {
    part as f64 / whole.max(1) as f64
}
