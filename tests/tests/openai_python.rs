//! The official Python client against the server: `tests/python/openai_client.py`.

use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

use dsa80_tests::server::{ServerOptions, TestServer};

const KEY: &str = "sk-test";

/// The interpreter, if it has the client; otherwise why not.
fn python() -> Result<PathBuf, String> {
    let python = std::env::var_os("DSA80_PYTHON").map_or_else(|| PathBuf::from("python3"), PathBuf::from);
    let found = Command::new(&python)
        .args(["-c", "import openai"])
        .output()
        .map_err(|error| format!("{}: {error}", python.display()))?;
    if found.status.success() {
        return Ok(python);
    }
    let reason = String::from_utf8_lossy(&found.stderr);
    Err(format!("{}: {}", python.display(), reason.lines().last().unwrap_or("import openai failed")))
}

#[test]
fn the_official_python_client_is_content() {
    let python = match python() {
        Ok(python) => python,
        Err(reason) => {
            let message = format!(
                "left out: the checks of the official Python client ({reason}). To run them:\n  \
                 python3 -m venv .venv && .venv/bin/pip install -r tests/python/requirements.txt\n  \
                 DSA80_PYTHON=$PWD/.venv/bin/python cargo test -p dsa80-tests --test openai_python"
            );
            assert!(std::env::var_os("DSA80_REQUIRE_ALL").is_none(), "{message}");
            // Not `println!`, which the test runner keeps to itself when a test passes.
            let _ = writeln!(std::io::stderr(), "{message}");
            return;
        }
    };
    let open = TestServer::start(ServerOptions::default()).unwrap();
    let keyed = TestServer::start(ServerOptions::default().with_key(KEY)).unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/python/openai_client.py");
    let output = Command::new(python)
        .arg(script)
        .args([open.url("/v1"), keyed.url("/v1"), KEY.into()])
        .env("NO_PROXY", "127.0.0.1")
        .output()
        .unwrap();
    println!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}", output.status);
    // The stream that the client closed early is gone, with its pages.
    let stats = dsa80_tests::engine::eventually(open.engine(), |stats| stats.running == 0).unwrap();
    assert_eq!((stats.pages_used, stats.waiting, stats.failed), (0, 0, 0), "{stats:?}");
    assert!(stats.cancelled >= 1, "{stats:?}");
}
