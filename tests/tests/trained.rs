//! The trained checkpoint in `fixtures/trained`, INT4 on the oracle, against its own bf16 in HF transformers: by right answers.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::collections::BTreeMap;
use std::path::PathBuf;

use dsa80_model::checkpoint::Checkpoint;
use dsa80_model::runner::Rank;
use dsa80_reference::cpu::Cpu;
use dsa80_serve::text::{TextFiles, TextModel};
use dsa80_tests::distance::{argmax, log_softmax};
use dsa80_tests::{fixture, judge, prompt};
use serde::Deserialize;

const PAGE_SIZE: usize = 16;
/// Prompts of a task that a run without a GPU takes; of a longer list than 512 tokens, fewer.
const PROMPTS: usize = 24;
const LONG_PROMPTS: usize = 2;

/// `prompts.json`: conversations, each cut into what is given and what is to be said, in turns.
#[derive(Deserialize)]
struct Prompts {
    tasks: BTreeMap<String, Vec<Vec<String>>>,
    text: Vec<Vec<String>>,
}

/// `hf_bf16.json`: what HF transformers made of them.
#[derive(Deserialize)]
struct Results {
    tasks: BTreeMap<String, Task>,
    text_perplexity: f64,
    index_topk: usize,
}

#[derive(Deserialize)]
struct Task {
    accuracy: f64,
    /// A digit for each prompt: 1 where every token was right.
    right: String,
}

fn folder() -> PathBuf {
    fixture::root().join("trained")
}

fn read<T: for<'a> Deserialize<'a>>(name: &str) -> T {
    serde_json::from_slice(&std::fs::read(folder().join(name)).unwrap()).unwrap()
}

struct Model {
    text: TextModel,
    rank: Rank<Cpu<f32>>,
    pages: Vec<u32>,
}

/// Teacher-forced over one conversation.
struct Reply {
    /// Every token to be said was the best one.
    right: bool,
    /// The sum of -log p over them, and how many there are.
    loss: f64,
    tokens: usize,
}

impl Model {
    fn load(max_model_len: usize) -> Self {
        let checkpoint = Checkpoint::open(&folder()).unwrap();
        let text = TextModel::load(&TextFiles::from_checkpoint(&checkpoint).unwrap()).unwrap();
        let limits = prompt::limits(max_model_len, PAGE_SIZE, text.vocab_size);
        let rank = judge::load_weights(Cpu::new(), &checkpoint, &limits).unwrap();
        Self { text, rank, pages: prompt::scattered_pages(&limits, 1) }
    }

    fn judge(&mut self, conversation: &[String]) -> Reply {
        let (mut tokens, mut said) = (Vec::new(), Vec::new());
        for (i, part) in conversation.iter().enumerate() {
            let ids = self.text.tokenizer.encode(part, false).unwrap();
            said.extend(ids.iter().map(|_| i % 2 == 1));
            tokens.extend(ids);
        }
        let pieces = prompt::pieces(tokens.len(), 512);
        let run = prompt::run(&mut self.rank, &tokens, &self.pages, PAGE_SIZE, &pieces).unwrap();
        let mut reply = Reply { right: true, loss: 0.0, tokens: 0 };
        for (position, logits) in run.logits.chunks(self.text.vocab_size).enumerate() {
            let next = position + 1;
            if next < tokens.len() && said[next] {
                reply.right &= argmax(logits) == tokens[next] as usize;
                reply.loss -= log_softmax(logits)[tokens[next] as usize];
                reply.tokens += 1;
            }
        }
        reply
    }
}

/// Of the first prompts of every task, about as many are right as in bf16 in HF.
#[test]
fn int4_answers_as_bf16_in_hf_does() {
    let (prompts, results): (Prompts, Results) = (read("prompts.json"), read("hf_bf16.json"));
    let mut model = Model::load(1024);
    for (task, conversations) in &prompts.tasks {
        if matches!(task.as_str(), "needle_2048" | "needle_4096") {
            continue;
        }
        let some =
            &conversations[..conversations.len().min(if task.contains("needle") { 6 } else { PROMPTS })];
        let theirs: Vec<bool> =
            results.tasks[task].right.chars().take(some.len()).map(|c| c == '1').collect();
        let ours: Vec<bool> = some.iter().map(|parts| model.judge(parts).right).collect();
        let count = |right: &[bool]| right.iter().filter(|right| **right).count();
        println!(
            "{task:>16}: INT4 {} of {}, bf16 in HF {} (of all {:.1} %)",
            count(&ours),
            some.len(),
            count(&theirs),
            100.0 * results.tasks[task].accuracy
        );
        // Two of a hundred is the aim; of this many, one is within chance.
        assert!(count(&ours) + 1 >= count(&theirs), "{task}: INT4 {ours:?}, bf16 {theirs:?}");
    }
}

/// A list of 4,096 tokens, of which each token attends to `index_topk`: the value is found.
#[test]
fn needles_are_found_among_sixteen_times_the_selection() {
    let (prompts, results): (Prompts, Results) = (read("prompts.json"), read("hf_bf16.json"));
    let mut model = Model::load(4096);
    assert!(16 * results.index_topk <= 4096);
    let task = &results.tasks["needle_4096"];
    for (conversation, theirs) in
        prompts.tasks["needle_4096"].iter().zip(task.right.chars()).take(LONG_PROMPTS)
    {
        assert_eq!(model.judge(conversation).right, theirs == '1', "{:?}", conversation.last());
    }
}

/// Within 3 % of bf16's.
#[test]
fn perplexity_of_held_back_text() {
    let (prompts, results): (Prompts, Results) = (read("prompts.json"), read("hf_bf16.json"));
    let mut model = Model::load(512);
    let replies: Vec<Reply> = prompts.text.iter().map(|parts| model.judge(parts)).collect();
    let (loss, tokens) =
        replies.iter().fold((0.0, 0), |(loss, tokens), reply| (loss + reply.loss, tokens + reply.tokens));
    let perplexity = (loss / tokens as f64).exp();
    println!("perplexity {perplexity:.4}, bf16 in HF {:.4}", results.text_perplexity);
    assert!((perplexity / results.text_perplexity - 1.0).abs() < 0.03);
}
