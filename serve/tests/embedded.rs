//! The checkpoint in `fixtures/default`: its chat template and tokenizer against transformers' own output,
//! and the real binary, from start to SIGTERM.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::path::Path;

use dsa80_model::checkpoint::Checkpoint;
use dsa80_serve::openai::ChatMessage;
use dsa80_serve::text::{RenderOptions, TextFiles, TextModel};
use serde_json::Value as Json;

fn folder() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/default")
}

fn model() -> TextModel {
    TextModel::load(&TextFiles::from_checkpoint(&Checkpoint::open(&folder()).unwrap()).unwrap()).unwrap()
}

/// Every conversation renders to the text, and the text to the ids, that transformers gives: as JSON, and
/// after having been read as a request's messages.
#[test]
fn chats_render_and_tokenise_as_transformers_does() {
    let model = model();
    let golden: Json =
        serde_json::from_slice(&std::fs::read(folder().join("chat_golden.json")).unwrap()).unwrap();
    let golden = golden.as_array().unwrap();
    assert!(golden.len() >= 10);
    for case in golden {
        let mut kwargs = case["kwargs"].as_object().unwrap().clone();
        let options = RenderOptions {
            add_generation_prompt: kwargs.remove("add_generation_prompt") == Some(Json::Bool(true)),
            continue_final_message: kwargs.remove("continue_final_message") == Some(Json::Bool(true)),
            tools: kwargs.remove("tools"),
            kwargs,
        };
        let sent = case["messages"].as_array().unwrap();
        let parsed: Vec<ChatMessage> = serde_json::from_value(case["messages"].clone()).unwrap();
        let parsed: Vec<Json> =
            parsed.iter().map(|message| message.for_template("messages").unwrap()).collect();
        for messages in [sent, &parsed] {
            let text = model.template().unwrap().render(messages, &options).unwrap();
            assert_eq!(text, case["text"].as_str().unwrap(), "{case}");
            let ids = model.tokenizer.encode(&text, false).unwrap();
            assert_eq!(serde_json::json!(ids), case["ids"], "{case}");
            assert_eq!(model.tokenizer.decode(&ids, false), text);
        }
    }
}

#[test]
fn its_end_of_sequence_ids_and_defaults_are_found() {
    let model = model();
    assert_eq!(model.eos_ids.len(), 3, "GLM ends a turn in three ways");
    assert!(model.eos_ids.iter().all(|&id| model.tokenizer.is_special(id)));
    assert_eq!(model.vocab_size, 768);
    assert_eq!(model.defaults.top_p, Some(0.95));
}

#[cfg(unix)]
mod binary {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::TcpStream;
    use std::process::{Child, Command, Output, Stdio};
    use std::time::{Duration, Instant};

    use super::{Json, folder};

    /// On the CPU unless `args` say otherwise: what a test shows must not depend on the machine.
    fn dsa80(args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dsa80"));
        let runs_a_model = args.first().is_some_and(|first| ["serve", "generate"].contains(first));
        let device = (runs_a_model && !args.contains(&"--device")).then_some(["--device", "cpu"]);
        command.args(args).args(device.into_iter().flatten());
        command.env_remove("DSA80_MODEL").env_remove("DSA80_API_KEY").env_remove("RUST_LOG");
        command
    }

    fn output(args: &[&str]) -> Output {
        dsa80(args).stdin(Stdio::null()).output().unwrap()
    }

    fn stdout(args: &[&str]) -> String {
        let output = output(args);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Ends the child even if the test fails.
    struct Server(Child, String);

    impl Drop for Server {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    impl Server {
        fn start(args: &[&str]) -> Self {
            let mut child =
                dsa80(&["serve", "--port", "0"]).args(args).stderr(Stdio::piped()).spawn().unwrap();
            let mut log = BufReader::new(child.stderr.take().unwrap());
            let mut line = String::new();
            while !line.contains("listening on http://") {
                line.clear();
                assert!(log.read_line(&mut line).unwrap() > 0, "the server ended before it listened");
            }
            let address = line.split("http://").nth(1).unwrap().split([',', ' ']).next().unwrap().to_owned();
            // The rest of the log is read away, lest the pipe fill up.
            std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
            Self(child, address)
        }

        fn ask(&self, request: &str, body: &str) -> String {
            let mut stream = TcpStream::connect(&self.1).unwrap();
            let length = body.len();
            write!(
                stream,
                "{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
                 Content-Length: {length}\r\n\r\n{body}"
            )
            .unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        }

        fn wait_ready(&self) {
            let end = Instant::now() + Duration::from_secs(60);
            while !self.ask("GET /health", "").starts_with("HTTP/1.1 200") {
                assert!(Instant::now() < end, "not ready in time");
                std::thread::sleep(Duration::from_millis(20));
            }
        }

        fn terminate(mut self) -> Option<i32> {
            let pid = self.0.id().to_string();
            assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
            self.0.wait().unwrap().code()
        }
    }

    #[test]
    fn serve_answers_and_ends_with_zero_on_sigterm() {
        let server = Server::start(&["--served-model-name", "tiny"]);
        server.wait_ready();
        let body = r#"{"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "seed": 1}"#;
        let answer = server.ask("POST /v1/chat/completions", body);
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let json: Json = serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap();
        assert!(json["usage"]["completion_tokens"].as_u64().unwrap() >= 1);
        assert_eq!(server.terminate(), Some(0));
    }

    #[test]
    fn bench_serve_measures_the_default_model() {
        let server = Server::start(&["--max-num-seqs", "4"]);
        server.wait_ready();
        let file = std::env::temp_dir().join(format!("dsa80-bench-serve-{}.json", std::process::id()));
        let url = format!("http://{}", server.1);
        let load = "--num-requests 12 --warmup 1 --input-len 20-60 --output-len 8 --ignore-eos --seed 3";
        for (more, prompt_tokens) in
            [("--concurrency 4", 20..=60), ("--request-rate 40 --endpoint chat", 10..=80)]
        {
            let args = ["bench", "serve", "--base-url", &url, "--json", file.to_str().unwrap()];
            let words: Vec<&str> = args.into_iter().chain(load.split(' ')).chain(more.split(' ')).collect();
            let text = stdout(&words);
            let report: Json = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
            std::fs::remove_file(&file).unwrap();
            assert_eq!(
                (&report["completed"], &report["uncounted"], &report["shorter"]),
                (&12.into(), &0.into(), &0.into()),
                "{text}"
            );
            assert_eq!(report["output_tokens"], 96, "{text}");
            for request in report["each"].as_array().unwrap() {
                assert!(prompt_tokens.contains(&request["input_tokens"].as_u64().unwrap()), "{request}");
            }
            for latency in ["time_to_first_token", "inter_token_latency", "end_to_end"] {
                let (p50, p99) = (&report[latency]["p50"], &report[latency]["p99"]);
                assert!(p50.as_f64().unwrap() <= p99.as_f64().unwrap(), "{latency}: {report}");
            }
            assert!(report["environment"]["command"].as_str().unwrap().contains("bench serve"), "{report}");
            assert!(text.contains("12 of 12 requests completed") && text.contains("errors: none"), "{text}");
        }
        let refused =
            output(&["bench", "serve", "--base-url", &url, "--model", "another", "--num-requests", "2"]);
        assert_eq!(refused.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&refused.stdout).contains("2 http 404"), "{refused:?}");
    }

    #[test]
    fn serve_with_a_folder_that_is_none_fails_with_a_message() {
        let output = output(&["serve", "--port", "0", "--model", "/nonexistent/model"]);
        assert_eq!(output.status.code(), Some(1));
        let log = String::from_utf8(output.stderr).unwrap();
        assert!(log.contains("error: ") && log.contains("/nonexistent/model"), "{log}");
    }

    #[test]
    fn an_adapter_that_is_not_there_is_refused_and_auto_goes_on_to_the_cpu() {
        let with = |device: &str, dtype: &str| {
            let options = ["--device", device, "--dtype", dtype];
            let mut command =
                dsa80(&[&["generate", "x", "-n", "2", "--log-level", "info"], &options[..]].concat());
            // With it neither CUDA nor wgpu finds a GPU that may be here.
            command.env("CUDA_VISIBLE_DEVICES", "").env("DSA80_WGPU_ADAPTER", "of no such name");
            let output = command.stdin(Stdio::null()).output().unwrap();
            (output.status.code(), String::from_utf8(output.stderr).unwrap())
        };
        let (code, log) = with("wgpu", "auto");
        assert_eq!(code, Some(1), "{log}");
        assert!(log.contains("--device wgpu: ") && log.contains("or use --device cpu"), "{log}");
        let (code, log) = with("auto", "auto");
        assert_eq!(code, Some(0), "{log}");
        assert!(log.contains("device: cpu (auto: no cuda: ") && log.contains("; no wgpu: "), "{log}");
        let (code, log) = with("auto", "f32");
        assert_eq!(code, Some(0), "{log}");
        assert!(log.contains("no cuda: its kernels compute in bf16, and --dtype is f32"), "{log}");
        let (code, log) = with("auto", "bf16");
        assert_eq!(code, Some(1), "{log}");
        assert!(log.contains("the device is the CPU, which computes in f32"), "{log}");
    }

    #[test]
    fn generate_repeats_itself_under_a_seed_and_takes_the_prompt_three_ways() {
        let args = ["--seed", "7", "-n", "8", "--quiet", "--ignore-eos"];
        let with = |prompt: &[&str]| stdout(&[&["generate"], prompt, &args[..]].concat());
        let text = with(&["Hello"]);
        assert!(text.ends_with('\n') && text.len() > 1);
        assert_eq!(with(&["--prompt", "Hello"]), text);
        let mut child = dsa80(&[&["generate"], &args[..]].concat())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(b"Hello").unwrap();
        assert_eq!(String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap(), text);
        assert_ne!(with(&["Hello", "--raw"]), text, "without the chat template");
        assert_eq!(output(&["generate", "x", "--top-p", "3"]).status.code(), Some(1));
    }

    #[test]
    fn inspect_tells_what_is_there_and_what_fits() {
        let dir = folder();
        let dir = dir.to_str().unwrap();
        let embedded = stdout(&["inspect", "--tp", "2", "--memory", "1"]);
        assert!(embedded.contains("Memory of each of 2 ranks"), "{embedded}");
        assert!(embedded.contains("With 1 GiB: "), "{embedded}");

        let whole: Json = serde_json::from_str(&stdout(&["inspect", dir, "--json"])).unwrap();
        let half: Json = serde_json::from_str(&stdout(&["inspect", dir, "--json", "--tp", "2"])).unwrap();
        let weights = |report: &Json| report["rank"]["weight_bytes"].as_u64().unwrap();
        assert!(weights(&half) < weights(&whole));
        let parts = whole["rank"]["weights"].as_object().unwrap();
        assert_eq!(parts.values().map(|bytes| bytes.as_u64().unwrap()).sum::<u64>(), weights(&whole));
        assert!(whole["file_bytes"].as_u64().unwrap() >= weights(&whole) / 2);

        let refused = output(&["inspect", dir, "--tp", "3"]);
        assert_eq!(refused.status.code(), Some(1));
        assert!(stdout(&["inspect", dir, "--memory", "0.0001"]).contains("do not hold the weights"));
    }

    #[test]
    fn inspect_reads_a_config_without_weights() {
        let dir = std::env::temp_dir().join(format!("dsa80-inspect-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::copy(folder().join("config.json"), dir.join("config.json")).unwrap();
        let text = stdout(&["inspect", dir.to_str().unwrap()]);
        std::fs::remove_dir_all(&dir).unwrap();
        assert!(text.contains("config.json only"), "{text}");
    }
}
