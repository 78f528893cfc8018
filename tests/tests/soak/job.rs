//! The requests of a soak, by number: the same in every run.

use serde_json::{Value, json};

use super::MAX_MODEL_LEN;

const VOCAB: u64 = 740;
/// Prompts that are asked again and again, without chance.
pub(crate) const GREEDY_PROMPTS: usize = 6;

/// What the client does with the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manner {
    /// Reads it, in one piece or as a stream.
    Read,
    /// Leaves so many microseconds after it has asked.
    LeaveAfter(u64),
    /// Leaves after so many chunks of the stream.
    LeaveAt(usize),
    /// Is told that it cannot be had.
    BeRefused,
}

#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) path: &'static str,
    /// As it is sent.
    pub(crate) body: String,
    pub(crate) stream: bool,
    pub(crate) manner: Manner,
    pub(crate) choices: usize,
    pub(crate) max_tokens: usize,
    /// Nothing but `max_tokens` ends it.
    pub(crate) runs_to_the_end: bool,
    /// Which of the prompts without chance it is.
    pub(crate) greedy: Option<usize>,
}

/// Numbers that look random, from a number (splitmix64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % bound) as usize
    }

    /// Most are short, some long.
    fn prompt_len(&mut self) -> usize {
        match self.below(20) {
            0..=13 => 1 + self.below(48),
            14..=17 => 40 + self.below(80),
            18 => 120 + self.below(60),
            _ => 180 + self.below(40),
        }
    }

    fn max_tokens(&mut self) -> usize {
        match self.below(10) {
            0..=6 => 1 + self.below(16),
            7..=8 => 16 + self.below(32),
            _ => 40 + self.below(60),
        }
    }
}

/// The request of this number.
pub(crate) fn job(index: usize) -> Job {
    let mut dice = Dice(index as u64);
    match dice.below(100) {
        0..=11 => return greedy(dice.below(GREEDY_PROMPTS as u64), dice.below(2) == 0),
        12..=17 => return refused(&mut dice),
        _ => {}
    }
    let (prompt_len, max_tokens) = (dice.prompt_len(), dice.max_tokens());
    let choices = if dice.below(8) == 0 { 2 + dice.below(2) } else { 1 };
    let (temperature, top_p) = ([0.0, 0.7, 1.0, 1.5][dice.below(4)], [1.0, 0.9][dice.below(2)]);
    let mut fields = json!({
        "max_tokens": max_tokens, "n": choices, "seed": index, "temperature": temperature, "top_p": top_p,
    });
    let mut add = |name: &str, value: Value| fields[name] = value;
    let runs_to_the_end = match dice.below(4) {
        0 => false,
        1 => {
            // Likely in any text.
            add("stop", json!(["e", "\u{e9}t", " "]));
            false
        }
        _ => {
            add("ignore_eos", json!(true));
            true
        }
    };
    if dice.below(5) == 0 {
        add("repetition_penalty", json!(1.2));
        add("presence_penalty", json!(0.4));
    }
    let chat = dice.below(4) == 0;
    match dice.below(8) {
        0 if chat => {
            add("logprobs", json!(true));
            add("top_logprobs", json!(2));
        }
        0 => add("logprobs", json!(3)),
        _ => {}
    }
    if chat {
        let words = ["river", "17", "x", "Grüße", "why", "\u{1f680}"];
        let text: Vec<&str> = (0..1 + prompt_len / 8).map(|_| words[dice.below(6)]).collect();
        add("messages", json!([{"role": "user", "content": text.join(" ")}]));
    } else {
        // Requests of a kind begin alike.
        let stem = dice.below(5) as u64;
        let common = prompt_len / 2;
        let ids = (0..prompt_len).map(|i| match i < common {
            true => (i as u64 * 37 + stem * 101) % VOCAB,
            false => dice.below(VOCAB) as u64,
        });
        let ids: Vec<u64> = ids.collect();
        fields["prompt"] = json!(ids);
    }
    let manner = match dice.below(100) {
        0..=9 => Manner::LeaveAfter(dice.below(4000) as u64),
        10..=21 => Manner::LeaveAt(1 + dice.below(8)),
        _ => Manner::Read,
    };
    let stream = matches!(manner, Manner::LeaveAt(_)) || dice.below(5) < 3;
    let path = if chat { "/v1/chat/completions" } else { "/v1/completions" };
    finish(path, fields, Job { manner, choices, max_tokens, runs_to_the_end, ..plain(stream) })
}

/// A prompt whose answer is always the same.
pub(crate) fn greedy(prompt: usize, stream: bool) -> Job {
    let ids: Vec<usize> =
        (0..[5, 17, 40, 64, 96, 150][prompt]).map(|i| (i * 31 + prompt * 57) % VOCAB as usize).collect();
    let max_tokens = 12;
    let fields = json!({"prompt": ids, "max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": true});
    let job = Job { max_tokens, runs_to_the_end: true, greedy: Some(prompt), ..plain(stream) };
    finish("/v1/completions", fields, job)
}

/// As long as a context can be.
pub(crate) fn longest() -> Job {
    let max_tokens = 8;
    let ids: Vec<usize> = (0..MAX_MODEL_LEN - max_tokens).map(|i| i * 13 % VOCAB as usize).collect();
    let fields = json!({"prompt": ids, "max_tokens": max_tokens, "ignore_eos": true});
    finish("/v1/completions", fields, Job { max_tokens, runs_to_the_end: true, ..plain(false) })
}

/// What no server should take.
fn refused(dice: &mut Dice) -> Job {
    let stream = dice.below(2) == 0;
    let long: Vec<usize> = vec![7; MAX_MODEL_LEN + 1 + dice.below(500)];
    let fields = match dice.below(7) {
        0 => json!({"prompt": long, "max_tokens": 1}),
        1 => json!({"prompt": [1, 2, 3], "max_tokens": MAX_MODEL_LEN}),
        2 => json!({"prompt": [1, 2, 1_000_000]}),
        3 => json!({"prompt": "a", "temperature": -1.0}),
        4 => json!({"prompt": "a", "model": "another"}),
        5 => json!({"prompt": "a", "n": 0}),
        _ => json!({"max_tokens": 3}),
    };
    let mut job = finish("/v1/completions", fields, Job { manner: Manner::BeRefused, ..plain(stream) });
    if dice.below(6) == 0 {
        job.body.truncate(job.body.len() / 2);
    }
    job
}

fn plain(stream: bool) -> Job {
    Job {
        path: "",
        body: String::new(),
        stream,
        manner: Manner::Read,
        choices: 1,
        max_tokens: 0,
        runs_to_the_end: false,
        greedy: None,
    }
}

fn finish(path: &'static str, mut fields: Value, job: Job) -> Job {
    if job.stream {
        fields["stream"] = json!(true);
        fields["stream_options"] = json!({"include_usage": true});
    }
    Job { path, body: fields.to_string(), ..job }
}
