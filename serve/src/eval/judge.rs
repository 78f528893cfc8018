//! A whole report: every task, and the held-back text.

use super::{
    Conversation, Conversations, EvalError, Prompts, Reference, Reply, Report, TaskReport, TextReport, score,
};
use crate::http::ServedModel;

/// How much of a task is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Amount {
    /// Prompts at most.
    pub prompts: usize,
    /// Tokens of them together at most, from the third prompt on.
    pub tokens: usize,
}

impl Amount {
    /// Minutes on a CPU of two cores.
    pub const QUICK: Self = Self { prompts: usize::MAX, tokens: 4096 };
    /// Everything.
    pub const ALL: Self = Self { prompts: usize::MAX, tokens: usize::MAX };
}

/// What `model` makes of `prompts`, beside `reference`. The held-back text is asked whole, because a part of it has another perplexity.
/// `begin` is told what comes next.
///
/// # Errors
/// A prompt that is longer than contexts may be, or that the tokenizer or the engine refuses; the engine fails.
pub fn judge(
    model: &ServedModel,
    prompts: &Prompts,
    reference: Option<&Reference>,
    amount: Amount,
    begin: &mut dyn FnMut(&str),
) -> Result<Report, EvalError> {
    let mut report = Report::default();
    for (task, conversations) in &prompts.tasks {
        begin(task);
        let replies = answers(model, conversations, amount)
            .map_err(|source| EvalError::Task { task: task.clone(), source: Box::new(source) })?;
        report.tasks.push(TaskReport::new(task, &replies, reference));
    }
    begin("text");
    let text = answers(model, &prompts.text, Amount::ALL)
        .map_err(|source| EvalError::Task { task: "text".into(), source: Box::new(source) })?;
    report.text = TextReport::new(&text, reference);
    Ok(report)
}

fn answers(
    model: &ServedModel,
    conversations: &[Conversation],
    amount: Amount,
) -> Result<Vec<Reply>, EvalError> {
    let conversations = Conversations::encode(&model.text.tokenizer, conversations, amount)?;
    let (longest, held) = (conversations.longest(), model.engine.max_model_len());
    if longest > held {
        return Err(EvalError::TooLong { longest, held });
    }
    score(model, &conversations)
}
