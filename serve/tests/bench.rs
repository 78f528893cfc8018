//! `dsa80 bench` on the CPU, with the config of the fixture `default`: what it prints, what it writes, what it refuses.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value as Json;

fn model() -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/default");
    folder.to_str().unwrap().to_owned()
}

fn bench(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dsa80"));
    command.arg("bench").args(args).env_remove("DSA80_MODEL").env_remove("RUST_LOG").stdin(Stdio::null());
    command.output().unwrap()
}

fn refused(args: &[&str]) -> String {
    let output = bench(args);
    assert!(!output.status.success(), "{args:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// A file of this test alone, and what was written there.
struct Results(PathBuf);

impl Results {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("dsa80-bench-{}-{name}.json", std::process::id())))
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }

    /// Runs a command that writes here; what it prints, and what it wrote.
    fn of(&self, args: &[&str]) -> (String, Json) {
        let output = bench(&[args, &["--json", self.path()]].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let json = serde_json::from_slice(&std::fs::read(&self.0).unwrap()).unwrap();
        (String::from_utf8(output.stdout).unwrap(), json)
    }
}

impl Drop for Results {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Steps and sums of two ranks, which a projection puts together.
#[test]
fn steps_and_collectives_become_a_projection() {
    let (steps, sums, projection) = (Results::new("step"), Results::new("sums"), Results::new("projection"));
    let model = model();
    let measure =
        ["step", "--model", &model, "--device", "cpu", "--tp", "2", "--runs", "3", "--git", "abc123"];
    let sizes = ["--batch", "1,4", "--context", "128", "--chunk", "32"];
    let (text, json) = steps.of(&[&measure[..], &sizes].concat());
    for words in ["rank 0 of 2", "decode, 4 sequences, context 128", "prefill, 32 new tokens", "tokens/s"] {
        assert!(text.contains(words), "{text}");
    }
    assert_eq!(json["environment"]["git"], "abc123");
    assert!(json["environment"]["gpu"].is_null() && json["environment"]["cpu_threads"].as_u64() > Some(0));
    let cases = json["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 3);
    for case in cases {
        assert!(case["step_ms"]["median"].as_f64() > Some(0.0) && case["step_ms"]["runs"] == 3, "{case}");
        assert!(case["device_ms"].is_null() && case["kernels"].as_array().unwrap().is_empty(), "{case}");
        assert!(case["tokens_per_s"].as_f64() > Some(0.0), "{case}");
    }
    // Four sequences read the same weights as one, more experts, and four times the rows.
    let read = |case: usize, what: &str| cases[case]["read"][what].as_u64().unwrap();
    assert_eq!(read(0, "weights"), read(1, "weights"));
    assert!(read(0, "experts") < read(1, "experts"));
    assert_eq!(4 * read(0, "latents"), read(1, "latents"));
    assert_eq!(4 * read(0, "index_keys"), read(1, "index_keys"));

    let hidden = json["settings"]["hidden_size"].to_string();
    let sizes = ["--rows", "1,32", "--hidden", &hidden, "--runs", "3"];
    let (text, json) = sums.of(&[&["collectives", "--device", "cpu", "--tp", "2"][..], &sizes].concat());
    assert!(text.contains("no link is measured"), "{text}");
    let group = &json["groups"][0];
    assert_eq!((&group["name"], &group["measures_a_link"]), (&"threads".into(), &false.into()));
    for (kind, fused) in [("all_reduce", false), ("all_reduce_norm", false), ("all_gather", false)] {
        let sizes = group[kind].as_array().unwrap();
        assert_eq!(sizes.len(), 2);
        for size in sizes {
            let check = &size["check"];
            assert!(
                check["holds"] == true && check["identical"] == true && check["repeats"] == true,
                "{size}"
            );
            assert!(check["worst"].as_f64() < Some(0.01) && size["fused"] == fused, "{size}");
        }
    }
    assert!(text.contains("then residual add and norm") && json["crossover"].is_null(), "{text}");

    let project = ["project", "--step", steps.path(), "--collectives", sums.path(), "--gpu", "same"];
    let (text, json) = projection.of(&project);
    assert!(text.starts_with("A projection") && text.contains("NO LINK WAS MEASURED"), "{text}");
    assert_eq!(json["what"], "projection");
    for case in json["cases"].as_array().unwrap() {
        let ms = |part: &str| case[part].as_f64().unwrap();
        assert!(ms("collectives_ms") > 0.0 && ms("rank_ms") > 0.0, "{case}");
        assert!(
            (ms("step_ms") - ms("rank_ms") - ms("collectives_ms") - ms("host_ms")).abs() < 1e-9,
            "{case}"
        );
    }
    let without =
        refused(&["project", "--step", steps.path(), "--collectives", sums.path(), "--gpu", "a100"]);
    assert!(without.contains("only --gpu same can be projected"), "{without}");
    let swapped = refused(&["project", "--step", sums.path(), "--collectives", sums.path()]);
    assert!(swapped.contains("is not what is expected here"), "{swapped}");
}

/// Two ranks of four that step together, and what their collectives add.
#[test]
fn live_ranks_have_their_collectives_in_their_steps() {
    let (steps, sums, projection) = (Results::new("live"), Results::new("sums4"), Results::new("projected"));
    let model = model();
    let measure = ["step", "--model", &model, "--device", "cpu", "--tp", "4", "--rank", "1", "--live", "2"];
    let sizes = ["--runs", "3", "--batch", "2", "--context", "64", "--chunk", "16"];
    let (text, json) = steps.of(&[&measure[..], &sizes].concat());
    assert_eq!(json["settings"]["gathered"].as_array().unwrap().len(), 2);
    for words in
        ["ranks 1 to 2 of 4", "together (threads)", "collectives add", "% of the step", "lost to ranks"]
    {
        assert!(text.contains(words), "{text}");
    }
    let settings = &json["settings"];
    assert_eq!((&settings["live"], &settings["between"]), (&2.into(), &"threads".into()));
    let cases = json["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 2);
    for case in cases {
        let (step, of) = (case["step_ms"]["median"].as_f64().unwrap(), &case["collectives"]);
        let number = |name: &str| of[name].as_f64().unwrap();
        let alone = of["alone_ms"]["median"].as_f64().unwrap();
        assert!(alone > 0.0 && (number("added_ms") - (step - alone)).abs() < 1e-9, "{case}");
        assert!((number("share") - number("added_ms") / step).abs() < 1e-9, "{case}");
        let waits = &case["waits"];
        let lost = waits["lost_ms"]["median"].as_f64().unwrap();
        assert!(lost >= 0.0 && waits["collectives_ms"]["median"].as_f64() > Some(0.0), "{case}");
        assert_eq!(waits["of_ranks_ms"].as_array().unwrap().len(), 2);
        // Without a clock of the device nothing tells the host from it, and nothing is published of this model.
        assert!(case["shares"].is_null() && case["published"].is_null(), "{case}");
    }
    // What was measured with its collectives needs no file of theirs, and another file says more.
    let project = ["project", "--step", steps.path(), "--gpu", "same"];
    let (text, json) = projection.of(&project);
    assert!(text.contains("what they added between 2 ranks"), "{text}");
    let projected = |json: &Json, case: usize, part: &str| json["cases"][case][part].as_f64().unwrap();
    for (index, case) in cases.iter().enumerate() {
        let of = &case["collectives"];
        assert_eq!(Some(projected(&json, index, "rank_ms")), of["alone_ms"]["median"].as_f64());
        let added = of["added_ms"].as_f64().unwrap().max(0.0);
        assert_eq!(projected(&json, index, "collectives_ms"), added);
    }
    let hidden = settings["hidden_size"].to_string();
    let sizes = ["--rows", "1,32", "--hidden", &hidden, "--runs", "3"];
    sums.of(&[&["collectives", "--device", "cpu", "--tp", "4"][..], &sizes].concat());
    let (text, _) = projection.of(&[&project[..], &["--collectives", sums.path()]].concat());
    assert!(text.contains("by threads between 4 ranks"), "{text}");

    let alone = ["step", "--model", &model, "--device", "cpu", "--tp", "2", "--runs", "1", "--context", "64"];
    steps.of(&[&alone[..], &["--batch", "1", "--chunk", "0"]].concat());
    let without = refused(&["project", "--step", steps.path(), "--gpu", "same"]);
    assert!(without.contains("--collectives"), "{without}");
    let five = refused(&[&measure[..7], &["--live", "5", "--context", "64", "--chunk", "16"]].concat());
    assert!(five.contains("--live 5: expected 1 to 4 ranks"), "{five}");
}

#[test]
fn loading_is_compared_with_a_plain_read() {
    let results = Results::new("load");
    let model = model();
    let (text, json) =
        results.of(&["load", "--model", &model, "--device", "cpu", "--tp", "2", "--rank", "1"]);
    assert!(text.contains("rank 1 of 2") && text.contains("loading reaches"), "{text}");
    let number = |json: &Json| json.as_f64().unwrap();
    let bytes = number(&json["bytes"]);
    assert!(bytes > 0.0 && bytes < number(&json["file_bytes"]));
    // The beginning of every file, rounded up to whole bytes.
    assert!((number(&json["plain"]["bytes"]) - bytes).abs() < 16.0, "{json}");
    let phases = ["opening", "preparing", "reading", "waiting", "finishing"];
    assert!(phases.iter().all(|phase| number(&json["seconds"][phase]) >= 0.0), "{json}");
    let share = number(&json["gb_s"]) / number(&json["plain"]["gb_s"]);
    assert!((number(&json["share"]) / share - 1.0).abs() < 1e-6, "{json}");
    assert_eq!(json["page_cache"], "as it was");
    if cfg!(target_os = "linux") {
        let (_, json) = results.of(&["load", "--model", &model, "--device", "cpu", "--drop-cache"]);
        assert_eq!(json["page_cache"], "dropped");
    }
}

#[test]
fn what_cannot_be_measured_is_refused_with_what_can() {
    let model = model();
    let step = |args: &[&str]| {
        refused(
            &[&["step", "--model", &model, "--device", "cpu", "--tp", "2", "--context", "128"], args]
                .concat(),
        )
    };
    for (args, words) in [
        (&["--chunk", "32", "--batch", "65"][..], "64 sequences at most"),
        (&["--chunk", "129"], "longer than --context 128"),
        (&["--chunk", "0", "--batch", "0"], "nothing to measure"),
        (&["--chunk", "32", "--context", "0"], "expected 1 to 8192 tokens"),
        (&["--chunk", "32", "--rank", "2"], "--rank 2: there are 2 ranks"),
        (&["--chunk", "32", "--kv-cache-memory", "1K"], "--kv-cache-memory"),
    ] {
        let error = step(args);
        assert!(error.contains(words), "{args:?}: {error}");
    }
    assert!(refused(&["step", "--device", "cpu"]).contains("use --model DIR"));
    assert!(refused(&["collectives", "--device", "cpu", "--tp", "1"]).contains("expected at least 2"));
    let empty = std::env::temp_dir();
    assert!(refused(&["load", "--model", empty.join("nowhere").to_str().unwrap()]).contains("cannot read"));
}
