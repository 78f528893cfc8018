//! Bytes to text as they come, never splitting a character.

/// Turns a stream of byte pieces into the text that `String::from_utf8_lossy` gives for all of them together,
/// holding back the beginning of a character until the rest of it arrives.
#[derive(Debug, Clone, Default)]
pub struct Utf8Stream {
    /// The beginning of a character: at most three bytes.
    pending: Vec<u8>,
}

impl Utf8Stream {
    /// Appends to `text` what is certain now that `bytes` have arrived.
    pub fn push(&mut self, bytes: &[u8], text: &mut String) {
        if self.pending.is_empty() {
            let rest = settle(bytes, text);
            self.pending.extend_from_slice(rest);
        } else {
            let mut joined = std::mem::take(&mut self.pending);
            joined.extend_from_slice(bytes);
            self.pending = settle(&joined, text).to_vec();
        }
    }

    /// Ends the stream: a character that never became whole is one U+FFFD.
    pub fn finish(&mut self, text: &mut String) {
        if !self.pending.is_empty() {
            self.pending.clear();
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

/// Appends all of `bytes` that is certain, and returns the beginning of a character that is left over.
fn settle<'a>(mut bytes: &'a [u8], text: &mut String) -> &'a [u8] {
    loop {
        let chunk = match std::str::from_utf8(bytes) {
            Ok(valid) => {
                text.push_str(valid);
                return &[];
            }
            Err(error) => error,
        };
        let (valid, rest) = bytes.split_at(chunk.valid_up_to());
        text.push_str(&String::from_utf8_lossy(valid));
        match chunk.error_len() {
            Some(bad) => {
                text.push(char::REPLACEMENT_CHARACTER);
                bytes = &rest[bad..];
            }
            None => return rest,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whole characters of every length, characters cut short, stray continuation bytes, overlong and
    /// surrogate forms.
    const HARD: &[u8] = b"a\xC3\xA9\xE6\x97\xA5\xF0\x9F\x99\x82\x80\xC3z\xE6\x97\xF0\x9F\x99\xF0\x9F\xFF\xC0\xAF\xED\xA0\x80\xEF\xBF\xBD\xF0\x9F";

    fn through(pieces: &[&[u8]]) -> String {
        let mut stream = Utf8Stream::default();
        let mut text = String::new();
        for piece in pieces {
            stream.push(piece, &mut text);
            assert!(stream.pending.len() < 4);
        }
        stream.finish(&mut text);
        text
    }

    #[test]
    fn every_split_in_two_or_three_gives_the_same_text() {
        let whole = String::from_utf8_lossy(HARD);
        for i in 0..=HARD.len() {
            for j in i..=HARD.len() {
                assert_eq!(through(&[&HARD[..i], &HARD[i..j], &HARD[j..]]), whole, "{i} {j}");
            }
        }
    }

    #[test]
    fn every_chunk_size_gives_the_same_text() {
        let whole = String::from_utf8_lossy(HARD);
        for size in [1, 2, 3, 5, 7, 11] {
            let pieces: Vec<&[u8]> = HARD.chunks(size).collect();
            assert_eq!(through(&pieces), whole, "{size}");
        }
    }

    #[test]
    fn a_character_appears_only_when_it_is_whole() {
        let mut stream = Utf8Stream::default();
        let mut text = String::new();
        for (byte, after) in "日🙂".bytes().zip(["", "", "日", "日", "日", "日", "日🙂"]) {
            stream.push(&[byte], &mut text);
            assert_eq!(text, after);
        }
    }
}
