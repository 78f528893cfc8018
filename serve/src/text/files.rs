//! The text files of a checkpoint, wherever they come from.

use std::borrow::Cow;

use dsa80_model::checkpoint::Checkpoint;

use super::TextError;

/// The bytes of the files that say how text becomes tokens. Absent files are `None`.
#[derive(Debug, Clone, Default)]
pub struct TextFiles {
    /// `config.json`: the vocabulary's size and the end-of-sequence ids are read from it.
    pub config: Option<Cow<'static, [u8]>>,
    /// `tokenizer.json`.
    pub tokenizer: Option<Cow<'static, [u8]>>,
    /// `tokenizer_config.json`: special tokens, and the chat template where it has no file of its own.
    pub tokenizer_config: Option<Cow<'static, [u8]>>,
    /// `generation_config.json`: default sampling, and further end-of-sequence ids.
    pub generation_config: Option<Cow<'static, [u8]>>,
    /// `chat_template.jinja`.
    pub chat_template: Option<Cow<'static, [u8]>>,
}

impl TextFiles {
    /// Reads them from a checkpoint.
    ///
    /// # Errors
    /// [`TextError::Unreadable`] for a file that is there and cannot be read.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self, TextError> {
        let read = |name| checkpoint.file(name).map_err(|error| TextError::Unreadable(Box::new(error)));
        Ok(Self {
            config: read("config.json")?,
            tokenizer: read("tokenizer.json")?,
            tokenizer_config: read("tokenizer_config.json")?,
            generation_config: read("generation_config.json")?,
            chat_template: read("chat_template.jinja")?,
        })
    }
}
