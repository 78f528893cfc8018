//! A model judged by its answers: prompts whose replies are known, scored token by token, beside what Hugging Face transformers made of them.

mod compare;
mod files;
mod judge;
mod score;

pub use compare::{Compared, Report, StoredTask, TaskReport, TextReport};
pub use files::{Conversation, Prompts, Reference, ReferenceTask};
pub use judge::{Amount, judge};
pub use score::{Conversations, EvalError, Reply, score};
