//! What is asked.

use std::fmt::{Display, Formatter};
use std::str::FromStr;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};

use super::Api;
use super::arrivals::Dice;

/// A length in tokens, or any between two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::cli::bench) struct Lengths {
    pub(super) least: usize,
    pub(super) most: usize,
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (least, most) = text.split_once('-').unwrap_or((text, text));
        match (least.trim().parse(), most.trim().parse()) {
            (Ok(least), Ok(most)) if 1 <= least && least <= most => Ok(Self { least, most }),
            _ => Err(format!(
                "expected a number of tokens such as 1024, or two such as 512-2048, found {text:?}"
            )),
        }
    }
}

impl Display for Lengths {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Self { least, most } if least == most => write!(f, "{least}"),
            Self { least, most } => write!(f, "{least}-{most}"),
        }
    }
}

impl Lengths {
    fn draw(self, dice: &mut Dice) -> usize {
        self.least + dice.below(self.most - self.least + 1)
    }
}

/// What prompts are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum PromptKind {
    Ids,
    Words,
}

/// How many tokens a prompt of words comes to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct TokensOfWords {
    /// Of the chat template, and of whatever else comes to every prompt.
    fixed: f64,
    per_word: f64,
}

impl Default for TokensOfWords {
    /// Where nobody has counted.
    fn default() -> Self {
        Self { fixed: 0.0, per_word: 1.0 }
    }
}

impl TokensOfWords {
    /// Words to ask with.
    pub(super) const PROBES: [usize; 2] = [16, 272];

    /// From what the server counted in the [`PROBES`](Self::PROBES). Nothing if more words did not come to more tokens.
    pub(super) fn measured(few: usize, many: usize) -> Option<Self> {
        let [fewer, more] = Self::PROBES.map(|words| words as f64);
        let per_word = (many as f64 - few as f64) / (more - fewer);
        (per_word > 0.0).then(|| Self { fixed: (few as f64 - per_word * fewer).max(0.0), per_word })
    }

    /// Words for so many tokens; at least one.
    fn words(&self, tokens: usize) -> usize {
        (((tokens as f64 - self.fixed) / self.per_word).round() as usize).max(1)
    }
}

/// Requests, by number.
#[derive(Debug, Clone)]
pub(super) struct Workload {
    pub(super) api: Api,
    pub(super) kind: PromptKind,
    pub(super) model: String,
    pub(super) input: Lengths,
    pub(super) output: Lengths,
    pub(super) vocab_size: usize,
    pub(super) ignore_eos: bool,
    pub(super) temperature: Option<f64>,
    pub(super) seed: u64,
    pub(super) tokens_of_words: TokensOfWords,
}

/// A request and what it asks for.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Asked {
    pub(super) body: Json,
    pub(super) input_tokens: usize,
    pub(super) output_tokens: usize,
}

/// Common in English, and in no order.
const WORDS: [&str; 32] = [
    "time", "water", "people", "long", "little", "house", "right", "small", "river", "again", "letter",
    "story", "under", "light", "every", "country", "never", "plant", "between", "father", "city", "earth",
    "thought", "head", "morning", "paper", "music", "travel", "winter", "number", "color", "garden",
];

impl Workload {
    /// The request of this number.
    pub(super) fn request(&self, number: usize) -> Asked {
        let mut dice = Dice::new(self.seed, number as u64);
        let (input, output) = (self.input.draw(&mut dice), self.output.draw(&mut dice));
        let prompt = match self.kind {
            PromptKind::Ids => json!((0..input).map(|_| dice.below(self.vocab_size)).collect::<Vec<_>>()),
            PromptKind::Words => json!(text(self.tokens_of_words.words(input), &mut dice)),
        };
        let mut body = self.body(prompt, output);
        if self.ignore_eos {
            body["ignore_eos"] = json!(true);
        }
        if let Some(temperature) = self.temperature {
            body["temperature"] = json!(temperature);
        }
        Asked { body, input_tokens: input, output_tokens: output }
    }

    /// One token after so many words.
    pub(super) fn probe(&self, words: usize) -> Asked {
        let prompt = json!(text(words, &mut Dice::new(self.seed, u64::MAX - words as u64)));
        Asked { body: self.body(prompt, 1), input_tokens: words, output_tokens: 1 }
    }

    fn body(&self, prompt: Json, output: usize) -> Json {
        let mut body = json!({
            "model": self.model,
            "max_tokens": output,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        match self.api {
            Api::Chat => body["messages"] = json!([{"role": "user", "content": prompt}]),
            Api::Completions => body["prompt"] = prompt,
        }
        body
    }
}

fn text(words: usize, dice: &mut Dice) -> String {
    let words: Vec<&str> = (0..words).map(|_| WORDS[dice.below(WORDS.len())]).collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(api: Api, kind: PromptKind) -> Workload {
        Workload {
            api,
            kind,
            model: "m".into(),
            input: Lengths { least: 20, most: 40 },
            output: Lengths { least: 3, most: 3 },
            vocab_size: 100,
            ignore_eos: false,
            temperature: None,
            seed: 5,
            tokens_of_words: TokensOfWords { fixed: 10.0, per_word: 2.0 },
        }
    }

    #[test]
    fn lengths_are_numbers_or_ranges() {
        let lengths = |text: &str| text.parse::<Lengths>();
        assert_eq!(lengths("8192"), Ok(Lengths { least: 8192, most: 8192 }));
        assert_eq!(lengths("16-512"), Ok(Lengths { least: 16, most: 512 }));
        assert_eq!([lengths("16-512"), lengths("7")].map(|l| l.unwrap().to_string()), ["16-512", "7"]);
        for text in ["", "0", "-5", "9-3", "a", "1-", "1-2-3"] {
            assert!(lengths(text).is_err(), "{text}");
        }
    }

    #[test]
    fn prompts_of_ids_are_as_long_as_drawn_and_the_same_for_the_same_seed() {
        let load = workload(Api::Completions, PromptKind::Ids);
        let requests: Vec<Asked> = (0..200).map(|number| load.request(number)).collect();
        for asked in &requests {
            let ids = asked.body["prompt"].as_array().unwrap();
            assert_eq!(ids.len(), asked.input_tokens);
            assert!(ids.iter().all(|id| id.as_u64().unwrap() < 100));
            assert_eq!((asked.output_tokens, &asked.body["max_tokens"]), (3, &json!(3)));
        }
        let lengths: Vec<usize> = requests.iter().map(|asked| asked.input_tokens).collect();
        assert_eq!((lengths.iter().min(), lengths.iter().max()), (Some(&20), Some(&40)));
        assert_ne!(requests[0].body["prompt"], requests[1].body["prompt"]);
        assert_eq!(load.request(7), requests[7]);
        assert_ne!(Workload { seed: 6, ..load }.request(7), requests[7]);
    }

    #[test]
    fn only_what_is_asked_for_is_in_the_body() {
        let load = workload(Api::Chat, PromptKind::Words);
        let keys = |body: &Json| body.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ");
        let asked = load.request(0);
        assert_eq!(keys(&asked.body), "model max_tokens stream stream_options messages");
        let words = asked.body["messages"][0]["content"].as_str().unwrap().split(' ').count();
        assert_eq!(words, ((asked.input_tokens as f64 - 10.0) / 2.0).round() as usize);
        let more = Workload { ignore_eos: true, temperature: Some(0.5), ..load }.request(0);
        assert_eq!(keys(&more.body), format!("{} ignore_eos temperature", keys(&asked.body)));
    }

    #[test]
    fn words_are_measured_by_two_prompts() {
        let [few, many] = TokensOfWords::PROBES.map(|words| 9 + 3 * words);
        let measured = TokensOfWords::measured(few, many).unwrap();
        assert_eq!(measured, TokensOfWords { fixed: 9.0, per_word: 3.0 });
        assert_eq!([309, 9, 2].map(|tokens| measured.words(tokens)), [100, 1, 1]);
        assert_eq!(TokensOfWords::measured(50, 50), None);
    }
}
