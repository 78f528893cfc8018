//! All that is known of a checkpoint besides its weights.

use std::sync::Arc;

use serde_json::Value as Json;

use super::chat_template::{special_tokens, template_in_tokenizer_config};
use super::generation_config::eos_ids;
use super::{ChatTemplate, GenerationDefaults, RenderError, TextError, TextFiles, Tokenizer};

/// Tokenizer, chat template and defaults of one checkpoint.
#[derive(Debug)]
pub struct TextModel {
    /// The tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// The chat template, if the checkpoint has one.
    pub chat_template: Option<ChatTemplate>,
    /// Sampling defaults.
    pub defaults: GenerationDefaults,
    /// End-of-sequence ids of `config.json` and `generation_config.json` together.
    pub eos_ids: Vec<u32>,
    /// Rows of the embedding: every valid token id is below it.
    pub vocab_size: usize,
}

impl TextModel {
    /// Reads the files.
    ///
    /// # Errors
    /// [`TextError`] names the file and what is wrong with it.
    pub fn load(files: &TextFiles) -> Result<Self, TextError> {
        let json = files.tokenizer.as_deref().ok_or(TextError::Missing {
            file: "tokenizer.json",
            purpose: "turn text into tokens (a slow tokenizer's own files are not read)",
        })?;
        let tokenizer = Tokenizer::from_bytes(json)?;
        let config = parse("config.json", files.config.as_deref())?;
        let tokenizer_config = parse("tokenizer_config.json", files.tokenizer_config.as_deref())?;
        let generation_config = parse("generation_config.json", files.generation_config.as_deref())?;
        let source = match files.chat_template.as_deref() {
            Some(bytes) => Some(String::from_utf8(bytes.to_vec()).map_err(|error| TextError::Invalid {
                file: "chat_template.jinja",
                problem: format!("not UTF-8: {error}"),
            })?),
            None => template_in_tokenizer_config(&tokenizer_config),
        };
        let chat_template =
            source.map(|source| ChatTemplate::new(&source, special_tokens(&tokenizer_config))).transpose()?;
        let mut ids = eos_ids(&config);
        ids.extend(eos_ids(&generation_config));
        ids.sort_unstable();
        ids.dedup();
        let vocab_size = config["vocab_size"].as_u64().map_or(tokenizer.vocab_size(), |size| size as usize);
        Ok(Self {
            tokenizer: Arc::new(tokenizer),
            chat_template,
            defaults: GenerationDefaults::from_json(&generation_config),
            eos_ids: ids,
            vocab_size,
        })
    }

    /// The chat template.
    ///
    /// # Errors
    /// When the checkpoint has none.
    pub fn template(&self) -> Result<&ChatTemplate, RenderError> {
        self.chat_template.as_ref().ok_or_else(|| {
            RenderError(
                "this model has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); \
                 use /v1/completions"
                    .into(),
            )
        })
    }
}

fn parse(file: &'static str, bytes: Option<&[u8]>) -> Result<Json, TextError> {
    match bytes {
        None => Ok(Json::Null),
        Some(bytes) => serde_json::from_slice(bytes)
            .map_err(|error| TextError::Invalid { file, problem: format!("not JSON: {error}") }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock;

    #[test]
    fn eos_ids_of_both_configs_and_sampling_defaults() {
        let mut files = mock::text_files();
        files.config = Some(br#"{"vocab_size": 999, "eos_token_id": [5, 3]}"#.into());
        files.generation_config =
            Some(br#"{"eos_token_id": 4, "temperature": 0.6, "top_p": 0.9, "top_k": -1}"#.into());
        let model = TextModel::load(&files).unwrap();
        assert_eq!(model.eos_ids, [3, 4, 5]);
        assert_eq!(model.vocab_size, 999);
        assert_eq!(
            model.defaults,
            GenerationDefaults {
                temperature: Some(0.6),
                top_p: Some(0.9),
                top_k: Some(0),
                ..GenerationDefaults::default()
            }
        );
    }

    #[test]
    fn each_missing_or_broken_file_is_named() {
        let fails = |change: fn(&mut TextFiles)| {
            let mut files = mock::text_files();
            change(&mut files);
            TextModel::load(&files).unwrap_err().to_string()
        };
        assert!(fails(|f| f.tokenizer = None).starts_with("tokenizer.json is missing"));
        assert!(fails(|f| f.tokenizer = Some(b"{}".into())).starts_with("tokenizer.json: "));
        assert!(fails(|f| f.config = Some(b"{".into())).starts_with("config.json: not JSON"));
        assert!(fails(|f| f.chat_template = Some(b"{% if".into())).contains("does not parse"));
        assert!(fails(|f| f.chat_template = Some(b"\xff".into())).contains("not UTF-8"));
        assert!(fails(|f| f.generation_config = Some(b"?".into())).starts_with("generation_config.json"));
    }

    #[test]
    fn a_model_without_template_says_so() {
        let mut files = mock::text_files();
        files.chat_template = None;
        let model = TextModel::load(&files).unwrap();
        assert!(model.template().unwrap_err().to_string().contains("no chat template"));
    }
}
