//! Log-probabilities in the three shapes that clients know.

use dsa80_model::engine::TokenLogprobs;
use serde::Serialize;
use serde_json::{Map, Value as Json, json};

use crate::text::Tokenizer;

/// The chat shape.
#[derive(Debug, Default, Serialize)]
pub struct ChatLogprobs {
    /// One entry for each generated token.
    pub content: Vec<TokenEntry>,
    /// Always null.
    pub refusal: Option<Vec<TokenEntry>>,
}

/// A token with its alternatives.
#[derive(Debug, Serialize)]
pub struct TokenEntry {
    /// Its text; see [`TokenNames`].
    pub token: String,
    /// Its log-probability.
    pub logprob: f32,
    /// Its bytes, from which text can be put together where tokens end inside a character.
    pub bytes: Vec<u8>,
    /// The best tokens at its place.
    pub top_logprobs: Vec<TopEntry>,
}

/// An alternative.
#[derive(Debug, Serialize)]
pub struct TopEntry {
    /// Its text.
    pub token: String,
    /// Its log-probability.
    pub logprob: f32,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// The shape of text completions: four lists of equal length.
#[derive(Debug, Default, Serialize)]
pub struct CompletionLogprobs {
    /// Where each token begins in the choice's text, in characters.
    pub text_offset: Vec<usize>,
    /// Log-probabilities; null for a prompt's first token.
    pub token_logprobs: Vec<Option<f32>>,
    /// The tokens' texts.
    pub tokens: Vec<String>,
    /// The best tokens at each place and the token itself, by text, best first.
    pub top_logprobs: Vec<Option<Map<String, Json>>>,
}

impl CompletionLogprobs {
    /// Adds `later`'s entries at the end.
    pub fn append(&mut self, later: Self) {
        self.text_offset.extend(later.text_offset);
        self.token_logprobs.extend(later.token_logprobs);
        self.tokens.extend(later.tokens);
        self.top_logprobs.extend(later.top_logprobs);
    }
}

/// How tokens are spelled in a response.
#[derive(Debug, Clone, Copy)]
pub struct TokenNames<'a> {
    /// Knows the bytes.
    pub tokenizer: &'a Tokenizer,
    /// `return_tokens_as_token_ids`.
    pub as_ids: bool,
}

impl TokenNames<'_> {
    /// The token's text; `token_id:N` if asked for or if it has none; `bytes:\xNN...` if it is not whole
    /// characters, so that different tokens stay different.
    pub fn name(&self, id: u32) -> String {
        let bytes = self.tokenizer.token_bytes(id);
        if self.as_ids || bytes.is_empty() {
            return format!("token_id:{id}");
        }
        match std::str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => bytes.iter().fold("bytes:".to_owned(), |name, byte| format!("{name}\\x{byte:02x}")),
        }
    }

    /// A generated token in the chat shape.
    pub fn chat_entry(&self, id: u32, logprobs: &TokenLogprobs) -> TokenEntry {
        let bytes = |id| self.tokenizer.token_bytes(id).to_vec();
        let top = logprobs.top.iter();
        TokenEntry {
            token: self.name(id),
            logprob: finite(logprobs.logprob),
            bytes: bytes(id),
            top_logprobs: top
                .map(|&(id, logprob)| TopEntry {
                    token: self.name(id),
                    logprob: finite(logprob),
                    bytes: bytes(id),
                })
                .collect(),
        }
    }

    /// Appends a token to the completion shape. Without `logprobs` it is a prompt's first.
    pub fn push(
        &self,
        lists: &mut CompletionLogprobs,
        id: u32,
        offset: usize,
        logprobs: Option<&TokenLogprobs>,
    ) {
        lists.text_offset.push(offset);
        lists.tokens.push(self.name(id));
        lists.token_logprobs.push(logprobs.map(|logprobs| finite(logprobs.logprob)));
        lists.top_logprobs.push(logprobs.map(|logprobs| {
            let mut top = Map::new();
            for &(id, logprob) in &logprobs.top {
                top.entry(self.name(id)).or_insert_with(|| number(logprob));
            }
            top.entry(self.name(id)).or_insert_with(|| number(logprobs.logprob));
            top
        }));
    }
}

/// vLLM's `prompt_logprobs`: null for the first token, then objects from token id to its log-probability, its
/// rank where it is known (among the best asked for), and its text.
pub fn prompt_logprobs(tokenizer: &Tokenizer, prompt: &[u32], scored: &[Option<TokenLogprobs>]) -> Json {
    let names = TokenNames { tokenizer, as_ids: false };
    let entry = |id: u32, logprob: f32, rank: Option<usize>| json!({"logprob": number(logprob), "rank": rank, "decoded_token": names.name(id)});
    let place = |(&id, scored): (&u32, &Option<TokenLogprobs>)| {
        scored.as_ref().map(|scored| {
            let mut place = Map::new();
            for (rank, &(id, logprob)) in scored.top.iter().enumerate() {
                place.insert(id.to_string(), entry(id, logprob, Some(rank + 1)));
            }
            place.entry(id.to_string()).or_insert_with(|| entry(id, scored.logprob, None));
            place
        })
    };
    json!(prompt.iter().zip(scored).map(place).collect::<Vec<_>>())
}

/// The shortest digits that come back as the same f32, which is how serde writes an f32 too: clients compare
/// a token's own log-probability with the best one by `==`.
fn number(logprob: f32) -> Json {
    json!(finite(logprob).to_string().parse::<f64>().ok())
}

/// JSON has no infinity; vLLM's stand-in for it.
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock;

    #[test]
    fn names_of_whole_and_partial_characters_and_of_no_token() {
        let tokenizer = mock::tokenizer();
        let names = TokenNames { tokenizer: &tokenizer, as_ids: false };
        let hello = tokenizer.encode("Hello", false).unwrap()[0];
        assert_eq!(names.name(hello), "Hello");
        assert_eq!(names.name(0xE6), "bytes:\\xe6");
        assert_eq!(names.name(mock::EOS), "<|end|>");
        assert_eq!(names.name(mock::NOT_A_TOKEN), "token_id:319");
        assert_eq!(TokenNames { as_ids: true, ..names }.name(hello), format!("token_id:{hello}"));
    }

    #[test]
    fn the_token_itself_is_always_among_the_alternatives() {
        let tokenizer = mock::tokenizer();
        let names = TokenNames { tokenizer: &tokenizer, as_ids: false };
        let mut lists = CompletionLogprobs::default();
        let logprobs =
            TokenLogprobs { logprob: -3.1, top: vec![(65, -0.1), (66, f32::NEG_INFINITY)], draft: None };
        names.push(&mut lists, 67, 5, Some(&logprobs));
        names.push(&mut lists, 68, 6, None);
        assert_eq!(
            serde_json::to_string(&lists).unwrap(),
            r#"{"text_offset":[5,6],"token_logprobs":[-3.1,null],"tokens":["C","D"],"top_logprobs":[{"A":-0.1,"B":-9999.0,"C":-3.1},null]}"#
        );
    }
}
