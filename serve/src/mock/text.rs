//! A byte-level BPE tokenizer of 256 bytes, a few merges and a few special tokens, and a chat template for
//! it.

use serde_json::json;

use crate::text::{TextFiles, TextModel, Tokenizer};

/// The end-of-sequence token, `<|end|>`.
pub const EOS: u32 = 256 + MERGES.len() as u32;

/// An id inside the vocabulary that no token belongs to, as the padding rows of real embeddings.
pub const NOT_A_TOKEN: u32 = VOCAB_SIZE as u32 - 1;

/// The embedding's rows.
pub const VOCAB_SIZE: usize = 320;

/// Special tokens, from [`EOS`] on. `<think>` is added but not special, as in GLM.
const ADDED: [(&str, bool); 5] = [
    ("<|end|>", true),
    ("<|user|>", true),
    ("<|assistant|>", true),
    ("<|system|>", true),
    ("<think>", false),
];

/// Merged pairs: short words, and the first bytes of characters, so that tokens end inside them.
const MERGES: [(&[u8], &[u8]); 14] = [
    (b"H", b"e"),
    (b"l", b"l"),
    (b"He", b"ll"),
    (b"Hell", b"o"),
    (b" ", b"w"),
    (b"o", b"r"),
    (b" w", b"or"),
    (b"l", b"d"),
    (b" wor", b"ld"),
    (b"\xE6", b"\x97"),
    (b"\xF0", b"\x9F"),
    (b"\xF0\x9F", b"\x99"),
    (b"t", b"h"),
    (b"th", b"e"),
];

const TEMPLATE: &str = "\
{%- if tools -%}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}{%- endif -%}
{%- for message in messages -%}
{{ '<|' + message.role + '|>' }}{% if message.content is string %}{{ message.content }}\
{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}{% endif -%}";

/// `tokenizer.json`.
///
/// # Panics
/// Never: the JSON is built from constants.
pub fn tokenizer_json() -> Vec<u8> {
    let spell = |bytes: &[u8]| -> String { bytes.iter().map(|&byte| spelling(byte)).collect() };
    let mut vocab = serde_json::Map::new();
    for byte in 0..=u8::MAX {
        vocab.insert(spell(&[byte]), json!(byte));
    }
    let mut merges = Vec::new();
    for (i, (left, right)) in MERGES.iter().enumerate() {
        merges.push(json!([spell(left), spell(right)]));
        vocab.insert(spell(&[*left, *right].concat()), json!(256 + i));
    }
    let added: Vec<_> = ADDED
        .iter()
        .enumerate()
        .map(|(i, (content, special))| {
            json!({"id": EOS as usize + i, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": special})
        })
        .collect();
    let byte_level = |use_regex| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level(true), "post_processor": null, "decoder": byte_level(false),
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": merges},
    });
    tokenizer.to_string().into_bytes()
}

/// All text files of the stand-in checkpoint.
pub fn text_files() -> TextFiles {
    let config = json!({"vocab_size": VOCAB_SIZE, "eos_token_id": EOS});
    TextFiles {
        config: Some(config.to_string().into_bytes().into()),
        tokenizer: Some(tokenizer_json().into()),
        tokenizer_config: Some(json!({"eos_token": "<|end|>"}).to_string().into_bytes().into()),
        generation_config: None,
        chat_template: Some(TEMPLATE.as_bytes().into()),
    }
}

/// The stand-in checkpoint's text side.
///
/// # Panics
/// Never: it is built from constants, and a test loads it.
#[expect(clippy::expect_used, reason = "constants, loaded by a test")]
pub fn text_model() -> TextModel {
    TextModel::load(&text_files()).expect("the constants make a valid model")
}

/// The stand-in tokenizer.
///
/// # Panics
/// Never: it is built from constants, and a test loads it.
#[expect(clippy::expect_used, reason = "constants, loaded by a test")]
pub fn tokenizer() -> Tokenizer {
    Tokenizer::from_bytes(&tokenizer_json()).expect("the constants make a valid tokenizer")
}

/// A byte in GPT-2's alphabet.
fn spelling(byte: u8) -> char {
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(&byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|earlier| !printable(earlier)).count() as u32;
    char::from_u32(256 + rank).unwrap_or(char::REPLACEMENT_CHARACTER)
}
