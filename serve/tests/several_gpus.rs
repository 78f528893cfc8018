//! `tests/several_gpus.sh`, dry: all that it does on GPUs, with ranks of the CPU and the fixture `default`.

#![cfg(unix)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A folder of this test alone.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("dsa80-several-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.0.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// The script with `ranks`, and what it says.
    fn run(&self, ranks: &str, environment: &[(&str, &str)]) -> (Option<i32>, String) {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut command = Command::new("bash");
        command.arg(root.join("tests/several_gpus.sh")).arg(ranks).arg(&self.0);
        for name in ["DSA80_MODEL", "DSA80_API_KEY", "RUST_LOG", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LAYERS"]
        {
            command.env_remove(name);
        }
        let small = [
            ("DSA80", env!("CARGO_BIN_EXE_dsa80")),
            ("DEVICE", "cpu"),
            ("CONFIG", "fixtures/default/config.json"),
            ("BATCH", "1,2"),
            ("CONTEXT", "64"),
            ("CHUNK", "16"),
            ("ROWS", "1,8"),
            ("RUNS", "2"),
            ("STREAMS", "1 3"),
            ("INPUT", "24"),
            ("OUTPUT", "400"),
            ("SERVE", "--max-model-len 1024 --max-num-seqs 4"),
            ("LOAD", "2"),
            ("LIMIT", "120"),
            ("DEADLINE", "20"),
        ];
        let output =
            command.envs(small).envs(environment.iter().copied()).stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        (output.status.code(), said.into_owned())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn every_part_is_done_and_leaves_its_results() {
    let folder = Folder::new("all");
    // More tokens than the tokenizer has.
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/default/config.json");
    let config = std::fs::read_to_string(config).unwrap();
    let larger = config.replace("\"vocab_size\": 768", "\"vocab_size\": 4096");
    assert_ne!(larger, config);
    std::fs::write(folder.0.join("config.json"), larger).unwrap();
    let (status, said) = folder.run("2", &[("CONFIG", folder.0.join("config.json").to_str().unwrap())]);
    assert_eq!(status, Some(0), "{said}");
    let summary = folder.read("summary.md");
    for words in [
        "A start with 5 layers, 2 ranks",
        "| weights and caches |",
        "and gatherings, 2 ranks",
        "Steps of 2 ranks of 2, 5 layers",
        "| decode, 2 sequences, context 64 |",
        "Served, 24 tokens in and 400 out",
        "| 3 | 6 of 6 |",
    ] {
        assert!(summary.contains(words), "{words:?} is not in\n{summary}");
    }
    assert!(folder.read("step.json").contains("\"model\": \"model\""), "a folder's name alone");
    // Every token of a random model has a text.
    let served: serde_json::Value = serde_json::from_str(&folder.read("serve_1.json")).unwrap();
    assert_eq!((&served["output_tokens"], &served["uncounted"]), (&800.into(), &0.into()));
    assert!(served["inter_token_latency"]["p50"].as_f64() > Some(0.0), "{}", served["inter_token_latency"]);
    let fault: serde_json::Value = serde_json::from_str(&folder.read("fault.json")).unwrap();
    assert_eq!(fault["fault"], "rank 1 of 2 killed under load");
    assert!(fault["all_ended_after_ms"].as_f64() < Some(20e3), "{fault}");
    assert!(said.contains("rank 1 has closed its connection"), "{said}");
    let restart: serde_json::Value = serde_json::from_str(&folder.read("restart.json")).unwrap();
    assert_eq!((&restart["completed"], &restart["errors"]), (&2.into(), &serde_json::json!({})));
}

#[test]
fn what_fails_is_said_and_the_rest_is_done() {
    let folder = Folder::new("fails");
    std::fs::write(folder.0.join("start.json"), "of another run").unwrap();
    // Three ranks do not divide the model: sums do not mind.
    let (status, said) = folder.run("3", &[("PARTS", "start collectives nothing")]);
    assert_eq!(status, Some(1), "{said}");
    for words in ["FAILED: start (rc 1)", "collectives: rc 0", "FAILED: nothing (no such part"] {
        assert!(said.contains(words), "{said}");
    }
    assert!(folder.read("collectives.json").contains("\"tp\": 3"));
    assert!(!folder.0.join("start.json").exists(), "what another run left is no result of this one");
    let (status, said) = folder.run("none", &[]);
    assert!(status == Some(2) && said.contains("RANKS FOLDER"), "{status:?}: {said}");
}
