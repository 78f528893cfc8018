//! Replies under teacher forcing: given every token before, is the right one the model's best?

use std::collections::VecDeque;

use dsa80_model::checkpoint::CheckpointError;
use dsa80_model::engine::{EngineHandle, Event, EventStream, Request, SubmitError, TokenLogprobs};

use super::{Amount, Conversation};
use crate::http::ServedModel;
use crate::text::Tokenizer;

/// Conversations that are with the engine at once, so that its steps are full.
const AT_ONCE: usize = 8;

/// Prompts of a task, however long they are.
const FEWEST: usize = 2;

/// Why a model cannot be judged.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// Nothing to judge it by.
    #[error(
        "{0} has no prompts.json, by which a model is judged: --model names a folder that has one, as `fixtures/train/export.py --prompts` \
         writes it (fixtures/train/README.md)"
    )]
    NoPrompts(
        /// The model's folder.
        String,
    ),
    /// A file that is not what is expected.
    #[error("{folder}: {file} is not as fixtures/train/README.md describes it: {problem}")]
    Damaged {
        /// The model's folder.
        folder: String,
        /// The file's name.
        file: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// A file that cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A text that the tokenizer refuses.
    #[error("the tokenizer refuses a prompt: {0}")]
    Tokenizer(
        /// Its reason.
        String,
    ),
    /// A prompt that no context holds.
    #[error(
        "a prompt has {longest} tokens, but contexts end at {held}: raise --max-model-len, or memory for the caches"
    )]
    TooLong {
        /// Its tokens.
        longest: usize,
        /// The longest context.
        held: usize,
    },
    /// Where something went wrong.
    #[error("task `{task}`")]
    Task {
        /// The task.
        task: String,
        /// What.
        source: Box<EvalError>,
    },
    /// A prompt that the engine refuses.
    #[error("the engine does not take a prompt")]
    Submit(#[from] SubmitError),
    /// The engine has failed.
    #[error("the engine has failed: {0}")]
    Engine(
        /// Its reason.
        String,
    ),
}

/// What came of one conversation.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Reply {
    /// Tokens of the whole conversation.
    pub context: usize,
    /// Every token that is to be said was the best one: greedy decoding would write it.
    pub right: bool,
    /// The sum of -log p over what is to be said.
    pub loss: f64,
    /// Its tokens.
    pub said: usize,
    /// Of those tokens, the ones for which there was a draft.
    pub drafted: usize,
    /// Drafts that were the model's own best token.
    pub accepted: usize,
}

/// Conversations as token ids.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Conversations(Vec<Encoded>);

#[derive(Debug, Clone, PartialEq)]
struct Encoded {
    ids: Vec<u32>,
    /// Which of them are to be said.
    said: Vec<bool>,
}

impl Conversations {
    /// The first of `conversations`: as many as `amount` says.
    ///
    /// # Errors
    /// The tokenizer refuses a text.
    pub fn encode(
        tokenizer: &Tokenizer,
        conversations: &[Conversation],
        amount: Amount,
    ) -> Result<Self, EvalError> {
        let (mut encoded, mut sum): (Vec<Encoded>, usize) = (Vec::new(), 0);
        for conversation in conversations.iter().take(amount.prompts) {
            let one = Encoded::new(tokenizer, conversation)?;
            sum = sum.saturating_add(one.ids.len());
            if sum > amount.tokens && encoded.len() >= FEWEST {
                break;
            }
            encoded.push(one);
        }
        Ok(Self(encoded))
    }

    /// The most tokens that one of them has.
    pub fn longest(&self) -> usize {
        self.0.iter().map(|encoded| encoded.ids.len()).max().unwrap_or(0)
    }
}

impl Encoded {
    fn new(tokenizer: &Tokenizer, conversation: &[String]) -> Result<Self, EvalError> {
        let (mut ids, mut said) = (Vec::new(), Vec::new());
        for (part, text) in conversation.iter().enumerate() {
            ids.extend(tokenizer.encode(text, false).map_err(EvalError::Tokenizer)?);
            // What is given and what is to be said take turns.
            said.resize(ids.len(), part % 2 == 1);
        }
        Ok(Self { ids, said })
    }

    fn submit(&self, engine: &EngineHandle) -> Result<EventStream, SubmitError> {
        engine.submit(Request {
            prompt: self.ids.clone(),
            max_tokens: 0,
            prompt_logprobs: Some(1),
            ..Request::default()
        })
    }

    /// `scores` has an entry for every token; nothing comes before the first.
    fn judge(&self, scores: &[Option<TokenLogprobs>]) -> Reply {
        let best = |score: &TokenLogprobs| score.top.first().map(|&(token, _)| token);
        let mut reply = Reply { context: self.ids.len(), right: true, ..Reply::default() };
        let mut draft = None;
        for (at, score) in scores.iter().enumerate() {
            let drafted = draft.take();
            let Some(score) = score else { continue };
            draft = score.draft;
            if !self.said[at] {
                continue;
            }
            reply.drafted += usize::from(drafted.is_some());
            reply.accepted += usize::from(drafted.is_some() && drafted == best(score));
            reply.right &= best(score) == Some(self.ids[at]);
            reply.loss -= f64::from(score.logprob);
            reply.said += 1;
        }
        // Text that the tokenizer makes nothing of is no answer.
        reply.right &= reply.said > 0;
        reply
    }
}

/// What `model` makes of every conversation, in order.
///
/// # Errors
/// One that the engine refuses, being too long for it, say; or the engine fails.
pub fn score(model: &ServedModel, conversations: &Conversations) -> Result<Vec<Reply>, EvalError> {
    let mut replies = Vec::with_capacity(conversations.0.len());
    let mut running: VecDeque<(&Encoded, EventStream)> = VecDeque::with_capacity(AT_ONCE);
    let judged = |(encoded, events): (&Encoded, EventStream)| {
        scores(events, encoded.ids.len()).map(|scores| encoded.judge(&scores))
    };
    for encoded in &conversations.0 {
        if running.len() == AT_ONCE {
            replies.extend(running.pop_front().map(judged).transpose()?);
        }
        let events = loop {
            match encoded.submit(&model.engine) {
                // A short queue is for fewer at once.
                Err(full @ SubmitError::QueueFull { .. }) => {
                    let first = running.pop_front().ok_or(full)?;
                    replies.push(judged(first)?);
                }
                submitted => break submitted?,
            }
        };
        running.push_back((encoded, events));
    }
    for rest in running {
        replies.push(judged(rest)?);
    }
    Ok(replies)
}

fn scores(mut events: EventStream, tokens: usize) -> Result<Vec<Option<TokenLogprobs>>, EvalError> {
    let mut scores = Vec::new();
    while let Some(event) = events.next_blocking() {
        match event {
            Event::Prompt(scored) => scores = scored,
            Event::Failed(reason) => return Err(EvalError::Engine(reason)),
            Event::Finished { .. } if scores.len() == tokens => return Ok(scores),
            Event::Started { .. } | Event::Token { .. } | Event::Finished { .. } => {}
        }
    }
    Err(EvalError::Engine(format!("it scored {} of {tokens} tokens of a prompt and ended", scores.len())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scored(best: u32, draft: Option<u32>) -> Option<TokenLogprobs> {
        Some(TokenLogprobs { logprob: -0.5, top: vec![(best, -0.5)], draft })
    }

    #[test]
    fn what_is_said_counts_and_a_draft_counts_where_the_next_token_is_said() {
        let encoded = Encoded { ids: vec![1, 2, 3, 4, 5], said: vec![false, false, true, true, false] };
        // The best are 9, 3, 4, 9; drafted behind 2: 3, behind 3: 7, behind 4: 9.
        let mut scores =
            vec![None, scored(9, Some(3)), scored(3, Some(7)), scored(4, Some(9)), scored(9, None)];
        let reply = Reply { context: 5, right: true, loss: 1.0, said: 2, drafted: 2, accepted: 1 };
        assert_eq!(encoded.judge(&scores), reply);
        // A draft is accepted where it is the model's own next token, also a wrong one.
        scores[3] = scored(7, None);
        assert_eq!(encoded.judge(&scores), Reply { right: false, accepted: 2, ..reply });
        scores[2] = scored(3, None);
        assert_eq!(encoded.judge(&scores), Reply { right: false, drafted: 1, accepted: 1, ..reply });
        let silent = Encoded { ids: vec![1, 2], said: vec![false; 2] };
        assert!(!silent.judge(&[None, scored(2, None)]).right, "nothing is said");
    }
}
