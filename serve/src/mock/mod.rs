//! A stand-in for model and engine: a small tokenizer and an engine that recites a script. The server's tests
//! run against it with no weights and no arithmetic, on the same interfaces as the real thing.

mod engine;
mod text;

pub use engine::{MockEngine, MockOptions, logprob_of};
pub use text::{EOS, NOT_A_TOKEN, VOCAB_SIZE, text_files, text_model, tokenizer, tokenizer_json};
