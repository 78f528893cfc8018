//! A model judged by its answers: prompts whose replies are known, scored token by token, beside what Hugging Face transformers made of them.

mod compare;
mod files;
mod score;

pub use compare::{Compared, Report, StoredTask, TaskReport, TextReport};
pub use files::{Conversation, Prompts, Reference, ReferenceTask};
pub use score::{Conversations, EvalError, Reply, score};
