//! The checkpoint's tokenizer, and the bytes that each of its tokens stands for.

use tokenizers::DecoderWrapper;

use super::{TextError, Utf8Stream};

const FILE: &str = "tokenizer.json";

/// A byte-level BPE tokenizer (`tokenizer.json`).
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The bytes of all tokens, one after the other.
    bytes: Vec<u8>,
    /// Token `i` owns `bytes[starts[i]..starts[i + 1]]`.
    starts: Vec<u32>,
    /// Whether token `i` is a special token: what `skip_special_tokens` drops.
    special: Vec<bool>,
}

impl Tokenizer {
    /// Reads `tokenizer.json`. Its truncation and padding are switched off: a server must see every token.
    ///
    /// # Errors
    /// [`TextError::Invalid`] when it cannot be parsed, or when its decoder is not `ByteLevel`: only there
    /// does a token stand for the same bytes wherever it appears, which is what streaming relies on.
    pub fn from_bytes(json: &[u8]) -> Result<Self, TextError> {
        let invalid = |problem: String| TextError::Invalid { file: FILE, problem };
        let mut inner =
            tokenizers::Tokenizer::from_bytes(json).map_err(|error| invalid(error.to_string()))?;
        inner.with_truncation(None).map_err(|error| invalid(error.to_string()))?;
        inner.with_padding(None);
        match inner.get_decoder() {
            Some(DecoderWrapper::ByteLevel(_)) => {}
            Some(other) => {
                let found = serde_json::to_value(other).unwrap_or_default();
                let found = found.get("type").and_then(|kind| kind.as_str()).unwrap_or("an unnamed one");
                return Err(invalid(format!(
                    "the decoder must be ByteLevel (byte-level BPE), found {found}"
                )));
            }
            None => return Err(invalid("the decoder must be ByteLevel (byte-level BPE), found none".into())),
        }
        let mut tokenizer = Self { inner, bytes: Vec::new(), starts: vec![0], special: Vec::new() };
        tokenizer.index().map_err(invalid)?;
        Ok(tokenizer)
    }

    /// Token ids of `text`. `add_special_tokens` applies the tokenizer's own post-processor.
    ///
    /// # Errors
    /// What the tokenizer said, in words.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, String> {
        let encoding = self.inner.encode_fast(text, add_special_tokens).map_err(|error| error.to_string())?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The whole text of `ids`; bytes that are no UTF-8 become U+FFFD, ids without a token nothing.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        let mut stream = Utf8Stream::default();
        let mut text = String::new();
        for &id in ids {
            if !(skip_special_tokens && self.is_special(id)) {
                stream.push(self.token_bytes(id), &mut text);
            }
        }
        stream.finish(&mut text);
        text
    }

    /// The bytes that `id` stands for; none for an id without a token (padding rows of the embedding).
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        let at = |i: usize| self.starts.get(i).map_or(self.bytes.len(), |&start| start as usize);
        &self.bytes[at(id as usize)..at(id as usize + 1)]
    }

    /// The vocabulary's own spelling of `id`.
    pub fn token_string(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token given by the vocabulary's spelling.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether `skip_special_tokens` drops `id`.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// One more than the highest id that has a token.
    pub fn vocab_size(&self) -> usize {
        self.special.len()
    }

    /// Fills the byte table. A token whose characters all belong to the byte alphabet stands for those bytes;
    /// any other (an added token such as `<|user|>` with a space or a CJK character in it) for its own UTF-8:
    /// the rule of the tokenizers crate's `ByteLevel::decode_chain`.
    fn index(&mut self) -> Result<(), String> {
        let alphabet = byte_alphabet();
        let added = self.inner.get_added_tokens_decoder();
        let size = self.inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        for id in 0..size as u32 {
            let token = self.inner.id_to_token(id).unwrap_or_default();
            let start = self.bytes.len();
            for c in token.chars() {
                match alphabet.get(c as usize).copied().flatten() {
                    Some(byte) => self.bytes.push(byte),
                    None => {
                        self.bytes.truncate(start);
                        self.bytes.extend_from_slice(token.as_bytes());
                        break;
                    }
                }
            }
            let end = u32::try_from(self.bytes.len())
                .map_err(|_| "the vocabulary's tokens are longer than 4 GiB together".to_owned())?;
            self.starts.push(end);
            self.special.push(added.get(&id).is_some_and(|token| token.special));
        }
        Ok(())
    }
}

/// GPT-2's byte alphabet, inverted: entry `c` is the byte that the character U+c stands for. Printable
/// Latin-1 stands for itself; the other bytes, in order, are the characters from U+0100 on.
fn byte_alphabet() -> Vec<Option<u8>> {
    let mut table = vec![None; 512];
    let mut next = 256;
    for byte in 0..=u8::MAX {
        if matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) {
            table[usize::from(byte)] = Some(byte);
        } else {
            table[next] = Some(byte);
            next += 1;
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock;

    #[test]
    fn the_byte_table_decodes_as_the_tokenizers_crate_does() {
        let tokenizer = mock::tokenizer();
        let every: Vec<u32> = (0..tokenizer.vocab_size() as u32).collect();
        for skip in [false, true] {
            assert_eq!(tokenizer.decode(&every, skip), tokenizer.inner.decode(&every, skip).unwrap());
            for window in every.windows(3) {
                assert_eq!(tokenizer.decode(window, skip), tokenizer.inner.decode(window, skip).unwrap());
            }
        }
    }

    #[test]
    fn text_comes_back_from_its_ids() {
        let tokenizer = mock::tokenizer();
        for text in ["", "Hello world", "naïve 日本語 🙂‍↔️ \u{7f}\n\t", "<|user|>\nhi"] {
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(tokenizer.decode(&ids, false), text);
        }
    }

    #[test]
    fn an_id_without_a_token_is_empty() {
        let tokenizer = mock::tokenizer();
        assert_eq!(tokenizer.token_bytes(1_000_000), b"");
        assert_eq!(tokenizer.token_bytes(u32::MAX), b"");
        assert!(!tokenizer.is_special(u32::MAX));
    }

    #[test]
    fn another_decoder_is_refused_by_name() {
        let json = String::from_utf8(mock::tokenizer_json()).unwrap().replace(
            r#""decoder":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":false}"#,
            r#""decoder":{"type":"Fuse"}"#,
        );
        let error = Tokenizer::from_bytes(json.as_bytes()).unwrap_err().to_string();
        assert_eq!(error, "tokenizer.json: the decoder must be ByteLevel (byte-level BPE), found Fuse");
    }
}
