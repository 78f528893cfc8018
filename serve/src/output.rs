//! From the tokens of one choice to the text a client sees.

use std::collections::VecDeque;
use std::sync::Arc;

use dsa80_model::engine::{Event, FinishReason, TokenLogprobs};

use crate::text::{StopMatcher, Tokenizer, Utf8Stream};

/// What a request asks of its text.
#[derive(Debug, Clone, Default)]
pub struct OutputOptions {
    /// Strings that end the generation; none of them empty.
    pub stops: Vec<String>,
    /// The stop string, or the text of the stop token, is part of the output.
    pub include_stop: bool,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
    /// Text of the first so many tokens is not searched for stop strings.
    pub min_tokens: usize,
    /// The request's own stop ids.
    pub stop_token_ids: Vec<u32>,
    /// End-of-sequence ids of the model, if they count.
    pub eos_ids: Vec<u32>,
}

/// A generated token.
#[derive(Debug, Clone, PartialEq)]
pub struct GeneratedToken {
    /// Its id.
    pub id: u32,
    /// Characters of generated text before it.
    pub offset: usize,
    /// When asked for.
    pub logprobs: Option<TokenLogprobs>,
}

/// What is new in a choice.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Delta {
    /// Text that is certain.
    pub text: String,
    /// The tokens behind it. Over all deltas every generated token comes once, a stop string's and the
    /// end-of-sequence token included, because `completion_tokens` counts them.
    pub tokens: Vec<GeneratedToken>,
    /// Set in the last delta.
    pub finish: Option<Finish>,
}

/// How a choice ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Finish {
    /// Stop or length.
    pub reason: FinishReason,
    /// Which of the request's own conditions it was.
    pub stop: Option<StopReason>,
}

/// Which condition of the request ended a choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopReason {
    /// A stop string.
    Text(String),
    /// One of `stop_token_ids`.
    Token(u32),
}

/// One of the things that an engine's events come to.
#[derive(Debug, Clone, PartialEq)]
pub enum Piece {
    /// The scored prompt.
    Prompt(Vec<Option<TokenLogprobs>>),
    /// More output.
    Delta(Delta),
    /// The engine gave up.
    Failed(String),
}

/// Turns a choice's events into pieces. Pure: no clock, no channel.
#[derive(Debug)]
pub struct Decoder {
    tokenizer: Arc<Tokenizer>,
    options: OutputOptions,
    utf8: Utf8Stream,
    stops: StopMatcher,
    /// The newest token.
    newest: Option<u32>,
    /// The newest token, if it ends the output unless something follows it: then its text is not shown.
    last: Option<u32>,
    /// Tokens whose text is still held back.
    held: VecDeque<GeneratedToken>,
    characters: usize,
    completion_tokens: usize,
    cached_tokens: usize,
    finished: bool,
}

impl Decoder {
    /// A decoder at the start of a choice.
    pub fn new(tokenizer: Arc<Tokenizer>, options: OutputOptions) -> Self {
        let stops = StopMatcher::new(options.stops.clone(), options.include_stop);
        Self {
            tokenizer,
            options,
            utf8: Utf8Stream::default(),
            stops,
            newest: None,
            last: None,
            held: VecDeque::new(),
            characters: 0,
            completion_tokens: 0,
            cached_tokens: 0,
            finished: false,
        }
    }

    /// Tokens generated so far.
    pub fn completion_tokens(&self) -> usize {
        self.completion_tokens
    }

    /// Prompt tokens found in the prefix cache.
    pub fn cached_tokens(&self) -> usize {
        self.cached_tokens
    }

    /// Whether the last piece was given.
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    /// Takes an event, or the end of them, and returns what can be shown now, if anything.
    pub fn event(&mut self, event: Option<Event>) -> Option<Piece> {
        match event {
            Some(Event::Started { cached_tokens }) => {
                self.cached_tokens = cached_tokens;
                None
            }
            Some(Event::Prompt(scored)) => Some(Piece::Prompt(scored)),
            Some(Event::Token { id, logprobs }) => self.token(id, logprobs).map(Piece::Delta),
            Some(Event::Finished { reason, usage }) => {
                self.cached_tokens = usage.cached_tokens;
                Some(Piece::Delta(self.finish(reason)))
            }
            Some(Event::Failed(message)) => {
                self.finished = true;
                Some(Piece::Failed(message))
            }
            None => {
                self.finished = true;
                Some(Piece::Failed("the engine ended without a word".into()))
            }
        }
    }

    fn token(&mut self, id: u32, logprobs: Option<TokenLogprobs>) -> Option<Delta> {
        let mut fresh = String::new();
        if let Some(before) = self.last.take() {
            // It did not end the output after all.
            self.spell(before, &mut fresh);
        }
        self.completion_tokens += 1;
        self.newest = Some(id);
        self.held.push_back(GeneratedToken { id, offset: self.characters + fresh.chars().count(), logprobs });
        let ends = self.options.eos_ids.contains(&id) || self.options.stop_token_ids.contains(&id);
        if ends && !self.options.include_stop {
            self.last = Some(id);
        } else {
            self.spell(id, &mut fresh);
        }
        self.show(&fresh)
    }

    fn finish(&mut self, reason: FinishReason) -> Delta {
        self.finished = true;
        let mut fresh = String::new();
        if reason == FinishReason::Length
            && let Some(last) = self.last
        {
            // Length came first: the token is output like any other.
            self.spell(last, &mut fresh);
        }
        self.utf8.finish(&mut fresh);
        let mut delta = self.show(&fresh).unwrap_or_default();
        if delta.finish.is_none() {
            delta.text.push_str(&self.stops.finish());
            delta.tokens.extend(self.held.drain(..));
            let own = |id: &u32| reason == FinishReason::Stop && self.options.stop_token_ids.contains(id);
            let stop = self.newest.filter(own).map(StopReason::Token);
            delta.finish = Some(Finish { reason, stop });
        }
        delta
    }

    /// Adds the text of `id`, as far as it is certain.
    fn spell(&mut self, id: u32, fresh: &mut String) {
        if !(self.options.skip_special_tokens && self.tokenizer.is_special(id)) {
            self.utf8.push(self.tokenizer.token_bytes(id), fresh);
        }
    }

    /// Passes fresh text through the stop strings.
    fn show(&mut self, fresh: &str) -> Option<Delta> {
        self.characters += fresh.chars().count();
        if fresh.is_empty() {
            return None;
        }
        let stopped = if self.completion_tokens <= self.options.min_tokens {
            crate::text::Stopped { text: fresh.to_owned(), matched: None }
        } else {
            self.stops.push(fresh)
        };
        let finish = stopped.matched.map(|index| Finish {
            reason: FinishReason::Stop,
            stop: self.options.stops.get(index).cloned().map(StopReason::Text),
        });
        if stopped.text.is_empty() && finish.is_none() {
            return None;
        }
        self.finished |= finish.is_some();
        Some(Delta { text: stopped.text, tokens: self.held.drain(..).collect(), finish })
    }
}

#[cfg(test)]
mod tests {
    use dsa80_model::engine::Usage;

    use super::*;
    use crate::mock;

    const TEXT: &str = "Hello world, 日曜日 🙂🙃 the end\n\nnever";

    fn options() -> OutputOptions {
        OutputOptions { skip_special_tokens: true, eos_ids: vec![mock::EOS], ..OutputOptions::default() }
    }

    /// All that a choice's tokens come to: the text, the reason, the tokens' offsets.
    fn run(
        options: OutputOptions,
        tokens: &[u32],
        reason: FinishReason,
    ) -> (String, Finish, Vec<GeneratedToken>) {
        let mut decoder = Decoder::new(Arc::new(mock::tokenizer()), options);
        let mut text = String::new();
        let mut out = Vec::new();
        let tokens = tokens.iter().map(|&id| Event::Token { id, logprobs: None });
        for event in tokens.chain([Event::Finished { reason, usage: Usage::default() }]) {
            if let Some(Piece::Delta(delta)) = decoder.event(Some(event)) {
                assert!(!delta.text.contains('\u{FFFD}'), "a character was split");
                text.push_str(&delta.text);
                out.extend(delta.tokens);
                if let Some(finish) = delta.finish {
                    assert!(decoder.is_finished());
                    return (text, finish, out);
                }
            }
        }
        panic!("no finish");
    }

    /// Different tokens for the same text: as the tokenizer cuts it, and byte by byte.
    fn spellings(text: &str) -> [Vec<u32>; 2] {
        [mock::tokenizer().encode(text, false).unwrap(), text.bytes().map(u32::from).collect()]
    }

    #[test]
    fn any_tokens_of_the_same_text_give_the_same_text() {
        for tokens in spellings(TEXT) {
            let (text, finish, out) = run(options(), &tokens, FinishReason::Length);
            assert_eq!(text, TEXT);
            assert_eq!(finish, Finish { reason: FinishReason::Length, stop: None });
            assert_eq!(out.iter().map(|token| token.id).collect::<Vec<_>>(), tokens);
        }
    }

    #[test]
    fn stop_strings_end_it_wherever_tokens_end() {
        for (stop, include, want) in [
            ("\n\n", false, "Hello world, 日曜日 🙂🙃 the end"),
            ("\n\n", true, "Hello world, 日曜日 🙂🙃 the end\n\n"),
            ("🙃 t", false, "Hello world, 日曜日 🙂"),
            ("H", false, ""),
            ("曜", true, "Hello world, 日曜"),
        ] {
            for tokens in spellings(TEXT) {
                let options = OutputOptions {
                    stops: vec!["zzz".into(), stop.into()],
                    include_stop: include,
                    ..options()
                };
                let (text, finish, out) = run(options, &tokens, FinishReason::Length);
                assert_eq!(text, want, "{stop:?}");
                assert_eq!(finish.stop, Some(StopReason::Text(stop.into())));
                assert_eq!(out.iter().map(|token| token.id).collect::<Vec<_>>(), tokens[..out.len()]);
            }
        }
    }

    #[test]
    fn the_end_of_sequence_token_counts_but_does_not_show() {
        for skip in [true, false] {
            let options = OutputOptions { skip_special_tokens: skip, ..options() };
            let (text, finish, out) = run(options, &[72, 105, mock::EOS], FinishReason::Stop);
            assert_eq!((text.as_str(), finish.stop, out.len()), ("Hi", None, 3));
        }
        let options = OutputOptions { skip_special_tokens: false, include_stop: true, ..options() };
        assert_eq!(run(options, &[72, mock::EOS], FinishReason::Stop).0, "H<|end|>");
    }

    #[test]
    fn a_stop_id_is_named_and_its_text_left_out() {
        let options = OutputOptions { stop_token_ids: vec![105], ..options() };
        let (text, finish, _) = run(options.clone(), &[72, 105], FinishReason::Stop);
        assert_eq!((text.as_str(), finish.stop), ("H", Some(StopReason::Token(105))));
        // Where the engine went on, or stopped for length, it was a token like any other.
        assert_eq!(run(options.clone(), &[72, 105, 33], FinishReason::Length).0, "Hi!");
        let (text, finish, _) = run(options, &[72, 105], FinishReason::Length);
        assert_eq!((text.as_str(), finish.stop), ("Hi", None));
    }

    #[test]
    fn special_tokens_in_the_middle_show_only_when_asked() {
        let tokens = [72, mock::EOS + 1, 105];
        assert_eq!(run(options(), &tokens, FinishReason::Length).0, "Hi");
        let options = OutputOptions { skip_special_tokens: false, ..options() };
        assert_eq!(run(options, &tokens, FinishReason::Length).0, "H<|user|>i");
    }

    #[test]
    fn stop_strings_do_not_count_before_min_tokens() {
        let tokens = spellings("a.b.c")[1].clone();
        let options = OutputOptions { stops: vec![".".into()], min_tokens: 2, ..options() };
        assert_eq!(run(options, &tokens, FinishReason::Length).0, "a.b");
    }

    #[test]
    fn offsets_count_characters() {
        let tokens: Vec<u32> = "a日b".bytes().map(u32::from).collect();
        let (_, _, out) = run(options(), &tokens, FinishReason::Length);
        assert_eq!(out.iter().map(|token| token.offset).collect::<Vec<_>>(), [0, 1, 1, 1, 2]);
    }

    #[test]
    fn an_engine_that_fails_or_vanishes_is_an_error() {
        let mut decoder = Decoder::new(Arc::new(mock::tokenizer()), options());
        assert_eq!(decoder.event(Some(Event::Failed("x".into()))), Some(Piece::Failed("x".into())));
        let mut decoder = Decoder::new(Arc::new(mock::tokenizer()), options());
        assert!(matches!(decoder.event(None), Some(Piece::Failed(_))));
        assert!(decoder.is_finished());
    }
}
