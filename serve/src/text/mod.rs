//! From messages and text to token ids, and back.

mod chat_template;
mod detokenizer;
mod files;
mod generation_config;
mod model;
mod stop;
mod tojson;
mod tokenizer;

use dsa80_model::checkpoint::CheckpointError;

pub use chat_template::{ChatTemplate, RenderError, RenderOptions};
pub use detokenizer::Utf8Stream;
pub use files::TextFiles;
pub use generation_config::GenerationDefaults;
pub use model::TextModel;
pub use stop::{StopMatcher, Stopped};
pub use tokenizer::Tokenizer;

/// A checkpoint's text files that cannot be used: which file, what was expected, what was found.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file that must be there is not.
    #[error("{file} is missing from the checkpoint; it is needed to {purpose}")]
    Missing {
        /// The file's name.
        file: &'static str,
        /// What it is needed for.
        purpose: &'static str,
    },
    /// A file is there and cannot be read.
    #[error(transparent)]
    Unreadable(Box<CheckpointError>),
    /// A file is there but says something that is not understood.
    #[error("{file}: {problem}")]
    Invalid {
        /// The file's name.
        file: &'static str,
        /// What was expected and what was found.
        problem: String,
    },
}
