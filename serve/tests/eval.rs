//! `dsa80 eval` on the fixture `default`, whose own best tokens are the right answers: what it prints, what it writes, what it refuses.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use dsa80_model::checkpoint::Checkpoint;
use dsa80_model::engine::{EngineHandle, Event, Request, TokenLogprobs};
use dsa80_model::launch::{Device, LaunchOptions, launch};
use dsa80_serve::text::{TextFiles, TextModel};
use serde_json::{Value as Json, json};

const QUESTIONS: [&str; 4] = ["What is 17 x 24?", "Sort: 9 4 7", "The", "Count to three"];
const TEXT: &str = "Once upon a time there was a model that nobody had trained.";

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/default")
}

/// A model folder of a test's own.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("dsa80-eval-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        for file in std::fs::read_dir(fixture()).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), folder.join(file.file_name())).unwrap();
        }
        Self(folder)
    }

    fn write(&self, name: &str, contents: &Json) {
        std::fs::write(self.0.join(name), contents.to_string()).unwrap();
    }

    fn eval(&self, args: &[&str]) -> Output {
        eval(&[&["--model", self.0.to_str().unwrap(), "--device", "cpu"], args].concat())
    }

    /// The table, and what was written.
    fn results(&self, args: &[&str]) -> (String, Json) {
        let file = self.0.join("results.json");
        let output = self.eval(&[args, &["--json", file.to_str().unwrap()]].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let json = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        (String::from_utf8(output.stdout).unwrap(), json)
    }

    fn refused(&self, args: &[&str]) -> String {
        refused(self.eval(args))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn eval(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dsa80"));
    command.arg("eval").args(args).env_remove("DSA80_MODEL").env_remove("RUST_LOG").stdin(Stdio::null());
    command.output().unwrap()
}

fn refused(output: Output) -> String {
    assert!(!output.status.success());
    String::from_utf8(output.stderr).unwrap()
}

/// The fixture, asked directly.
struct Asked {
    text: TextModel,
    engine: EngineHandle,
}

impl Asked {
    fn new() -> Self {
        let checkpoint = Arc::new(Checkpoint::open(&fixture()).unwrap());
        let text = TextModel::load(&TextFiles::from_checkpoint(&checkpoint).unwrap()).unwrap();
        let engine =
            launch(&checkpoint, &LaunchOptions { device: Device::Cpu, ..LaunchOptions::default() }).unwrap();
        Self { text, engine }
    }

    fn encode(&self, text: &str) -> Vec<u32> {
        self.text.tokenizer.encode(text, false).unwrap()
    }

    /// The text of the best token after `prompt`, if that is what the tokenizer makes of it.
    fn best(&self, prompt: &[u32]) -> Option<String> {
        let request =
            Request { prompt: prompt.to_vec(), max_tokens: 1, logprobs: Some(1), ..Request::default() };
        let mut events = self.engine.submit(request).unwrap();
        while let Some(event) = events.next_blocking() {
            if let Event::Token { logprobs: Some(TokenLogprobs { top, .. }), .. } = event {
                let text = self.text.tokenizer.decode(&[top[0].0], false);
                return (self.encode(&text) == [top[0].0]).then_some(text);
            }
        }
        panic!("no token")
    }

    /// A conversation whose right replies are one token each: of all numbers that a question can end in, the first that has one.
    fn conversation(&self, questions: &[&str]) -> Vec<String> {
        let (mut parts, mut ids) = (Vec::new(), Vec::new());
        for question in questions {
            let (question, reply) = (0..100)
                .find_map(|number| {
                    let question = format!("{question} {number}");
                    let prompt = [ids.clone(), self.encode(&question)].concat();
                    self.best(&prompt).map(|reply| (question, reply))
                })
                .unwrap();
            ids.extend(self.encode(&question));
            ids.extend(self.encode(&reply));
            parts.extend([question, reply]);
        }
        parts
    }

    fn perplexity(&self, given: &str, text: &str) -> f64 {
        let (start, said) = (self.encode(given), self.encode(text));
        let prompt = [start.clone(), said.clone()].concat();
        let request = Request { prompt, max_tokens: 0, prompt_logprobs: Some(0), ..Request::default() };
        let mut events = self.engine.submit(request).unwrap();
        while let Some(event) = events.next_blocking() {
            if let Event::Prompt(scores) = event {
                let sum: f64 = scores[start.len()..]
                    .iter()
                    .map(|score| f64::from(score.as_ref().unwrap().logprob))
                    .sum();
                return (-sum / said.len() as f64).exp();
            }
        }
        panic!("no scores")
    }
}

/// A folder whose answers are the model's own, but for one that is not; and what transformers is said to have made of them.
fn judged(name: &str) -> (Folder, f64) {
    let (folder, model) = (Folder::new(name), Asked::new());
    let mut own: Vec<_> = QUESTIONS.iter().map(|question| model.conversation(&[question])).collect();
    own[3] = model.conversation(&QUESTIONS[..3]);
    let mut planted = own.clone();
    planted[2][1] = format!("{}{}", planted[2][1], "x");
    let perplexity = model.perplexity("Once", &TEXT[4..]);
    model.engine.shutdown(Duration::ZERO);
    folder.write(
        "prompts.json",
        &json!({"tasks": {"own": own, "planted": planted, "also": own}, "text": [["Once", TEXT[4..]]]}),
    );
    folder.write(
        "hf_bf16.json",
        &json!({
            "dtype": "bfloat16",
            "tasks": {
                "own": {"accuracy": 1.0, "perplexity": 1.5, "right": "111111"},
                "planted": {"accuracy": 0.5, "perplexity": 2.5, "right": "10"},
            },
            "text_perplexity": perplexity * 1.01,
            "draft_acceptance": {"own": 0.75},
        }),
    );
    (folder, perplexity)
}

fn task<'a>(results: &'a Json, name: &str) -> &'a Json {
    results["tasks"].as_array().unwrap().iter().find(|task| task["task"] == name).unwrap()
}

#[test]
fn a_models_own_answers_are_right_and_a_planted_one_is_not() {
    let (folder, perplexity) = judged("own");
    let (table, results) = folder.results(&["--git", "abc123"]);
    let names: Vec<_> = results["tasks"].as_array().unwrap().iter().map(|task| &task["task"]).collect();
    assert_eq!(names, ["own", "planted", "also"], "in the file's order");
    let own = task(&results, "own");
    assert_eq!((&own["right"], &own["accuracy"], &own["prompts"]), (&json!("1111"), &json!(1.0), &json!(4)));
    assert!(own["context"].as_f64().unwrap() > 2.0 && own["perplexity"].as_f64().unwrap() > 1.0);
    let stored = &own["stored"];
    assert_eq!((&stored["prompts"], &stored["draft_acceptance"]), (&json!(6), &json!(0.75)));
    assert_eq!(
        stored["compared"],
        json!({"prompts": 4, "accuracy": 1.0, "stored_accuracy": 1.0, "differ": 0})
    );

    let planted = task(&results, "planted");
    assert_eq!((&planted["right"], &planted["accuracy"]), (&json!("1101"), &json!(0.75)));
    let compared = json!({"prompts": 2, "accuracy": 1.0, "stored_accuracy": 0.5, "differ": 1});
    assert_eq!(planted["stored"]["compared"], compared);
    assert_eq!(task(&results, "also")["stored"], Json::Null, "transformers was not asked");

    let found = results["text"]["perplexity"].as_f64().unwrap();
    assert!((found / perplexity - 1.0).abs() < 1e-4, "{found}, and the engine says {perplexity}");
    assert_eq!(results["environment"]["git"], "abc123");
    assert_eq!((&results["device"], &results["tp"]), (&json!("cpu"), &json!(1)));
    let row = table.lines().find(|line| line.starts_with("planted")).unwrap();
    let cells: Vec<_> = row.split_whitespace().collect();
    assert_eq!(cells[3..10], ["75.0", "%", "50.0", "%", "1", "50.0", "%"], "{table}");
    assert!(table.contains("in HF bf16, -0.99 %"), "{table}");
}

#[test]
fn ranks_caches_in_8_bits_a_short_queue_and_fewer_prompts() {
    let (folder, perplexity) = judged("ranks");
    let (_, two) = folder.results(&["--tp", "2", "--prompts", "3"]);
    assert_eq!((&task(&two, "own")["right"], &two["tp"]), (&json!("111"), &json!(2)));
    let (_, queue_of_one) = folder.results(&["--max-queued-requests", "1"]);
    assert_eq!(
        (&task(&queue_of_one, "own")["right"], &task(&queue_of_one, "also")["right"]),
        (&json!("1111"), &json!("1111"))
    );
    let (_, eight) = folder.results(&["--kv-cache-dtype", "fp8", "--long"]);
    assert_eq!((&task(&eight, "own")["prompts"], &eight["kv_cache_dtype"]), (&json!(4), &json!("fp8")));
    let found = eight["text"]["perplexity"].as_f64().unwrap();
    let apart = (found / perplexity - 1.0).abs();
    assert!(apart > 1e-6 && apart < 0.05, "8 bits change something, and not much: {found}, {perplexity}");
}

/// What is quick has as many prompts as come to some number of tokens.
#[test]
fn long_tasks_have_fewer_prompts_unless_all_are_asked_for() {
    let folder = Folder::new("long");
    let conversation = ["7 ".repeat(900), "8".into()];
    folder.write("prompts.json", &json!({"tasks": {"needle": vec![conversation; 6]}}));
    let (_, quick) = folder.results(&[]);
    let (_, long) = folder.results(&["--long"]);
    let prompts = |results: &Json| task(results, "needle")["prompts"].as_u64().unwrap();
    assert!((1..6).contains(&prompts(&quick)), "{}", prompts(&quick));
    assert_eq!((prompts(&long), &long["text"]), (6, &Json::Null));
    let message = folder.refused(&["--max-model-len", "64"]);
    assert!(message.contains("task `needle`") && message.contains("raise --max-model-len"), "{message}");
}

#[test]
fn what_is_missing_or_damaged_is_said() {
    let folder = Folder::new("damaged");
    let message = folder.refused(&[]);
    assert!(
        message.contains(folder.0.to_str().unwrap()) && message.contains("has no prompts.json"),
        "{message}"
    );
    assert!(message.contains("fixtures/train/export.py"), "{message}");
    for (prompts, words) in [
        (json!({"text": []}), "missing field `tasks`"),
        (json!({"tasks": {}}), "`tasks` is empty"),
        (json!({"tasks": {"add": []}}), "tasks.add has no prompts"),
        (json!({"tasks": {"add": [["1 + 1"]]}}), "prompt 0 of `add` has 1 parts"),
        (json!({"tasks": {"add": [["1 + 1", 2]]}}), "tasks.add: [0][1]: invalid type: integer"),
        (json!({"tasks": {"add": [["1", "2"]]}, "text": [["a"]]}), "prompt 0 of `text` has 1 parts"),
        (json!({"tasks": {"add": [["1", "2"], ["1 + 1", ""]]}}), "prompt 1 of `add`: part 1 is empty"),
        (json!({"tasks": {"add": [["", "2"]]}}), "prompt 0 of `add`: part 0 is empty"),
    ] {
        folder.write("prompts.json", &prompts);
        let message = folder.refused(&[]);
        assert!(message.contains("prompts.json is not as ") && message.contains(words), "{message}");
    }
    folder.write("prompts.json", &json!({"tasks": {"add": [["1", "2"]]}}));
    for (reference, words) in [
        (json!({"tasks": {"add": {"right": 1}}}), "tasks.add.right"),
        (json!({"tasks": {"add": {"right": "1?"}}}), "tasks.add.right is \"1?\", expected a 0 or a 1"),
        (json!({"tasks": {"add": {"right": ""}}}), "tasks.add.right is \"\""),
        (json!({}), "missing field `tasks`"),
    ] {
        folder.write("hf_bf16.json", &reference);
        let message = folder.refused(&[]);
        assert!(message.contains("hf_bf16.json is not as ") && message.contains(words), "{message}");
    }
    std::fs::write(folder.0.join("hf_bf16.json"), "{\"tasks\": {}} x").unwrap();
    let message = folder.refused(&[]);
    assert!(message.contains("trailing characters"), "{message}");
    let message = folder.refused(&["--long", "--prompts", "3"]);
    assert!(message.contains("cannot be used with"), "{message}");
}

/// The model in the binary has its prompts with it, and answers what the README asks.
#[test]
fn the_embedded_model_knows_what_17_x_24_is() {
    let output = eval(&["--device", "cpu", "--prompts", "1"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let table = String::from_utf8(output.stdout).unwrap();
    let row = table.lines().find(|line| line.starts_with("multiply ")).unwrap();
    let cells: Vec<_> = row.split_whitespace().collect();
    assert_eq!(cells[3..5], ["100.0", "%"], "{table}");
    let mut command = Command::new(env!("CARGO_BIN_EXE_dsa80"));
    command.args(["generate", "What is 17 x 24?", "--device", "cpu", "--temperature", "0", "--quiet"]);
    let answer = command.env_remove("DSA80_MODEL").output().unwrap().stdout;
    assert!(String::from_utf8_lossy(&answer).contains("408"), "{}", String::from_utf8_lossy(&answer));
}
