//! Loading, draining, and clients that go away: over real sockets.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dsa80_serve::mock::{self, MockEngine, MockOptions};
use dsa80_serve::{ServedModel, ServerOptions, ServerState, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::client::bytes;

/// Waits until `what` holds.
pub(crate) async fn eventually(what: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !what() {
        assert!(Instant::now() < end, "it did not come true within 10 s");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

struct Running {
    address: String,
    engine: Arc<MockEngine>,
    state: ServerState,
    stop: oneshot::Sender<()>,
    served: JoinHandle<std::io::Result<()>>,
}

impl Running {
    async fn start(mock: MockOptions, options: ServerOptions) -> Self {
        let running = Self::start_loading(mock, options).await;
        running.set_ready();
        running
    }

    async fn start_loading(mock: MockOptions, options: ServerOptions) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let state = ServerState::new(options);
        let (stop, stopped) = oneshot::channel();
        let shutdown = async {
            let _ = stopped.await;
        };
        let served = tokio::spawn(serve(listener, state.clone(), shutdown));
        Self { address, engine: MockEngine::new(mock), state, stop, served }
    }

    fn set_ready(&self) {
        self.state
            .set_ready(ServedModel { text: Arc::new(mock::text_model()), engine: self.engine.handle() });
    }

    /// Sends a request and leaves the connection open.
    async fn open(&self, method: &str, path: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).await.unwrap();
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        stream
    }

    /// Sends a request and reads the answer to its end.
    async fn ask(&self, method: &str, path: &str, body: &str) -> String {
        let mut stream = TcpStream::connect(&self.address).await.unwrap();
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    fn stats(&self) -> dsa80_model::engine::EngineStats {
        self.engine.handle().stats()
    }
}

/// Reads until `what` has come.
async fn read_until(stream: &mut TcpStream, what: &str) -> String {
    let mut read = String::new();
    let mut buffer = [0; 4096];
    while !read.contains(what) {
        let n = stream.read(&mut buffer).await.unwrap();
        assert!(n > 0, "the connection ended before {what:?} came: {read}");
        read.push_str(&String::from_utf8_lossy(&buffer[..n]));
    }
    read
}

fn endless() -> MockOptions {
    MockOptions { scripts: vec![bytes("x")], token_delay: Duration::from_millis(5), ..MockOptions::default() }
}

const ENDLESS: &str = r#"{"prompt": "a", "max_tokens": 900, "ignore_eos": true}"#;
const ENDLESS_STREAM: &str = r#"{"prompt": "a", "max_tokens": 900, "ignore_eos": true, "stream": true}"#;

#[tokio::test]
async fn a_client_that_leaves_a_stream_cancels_it() {
    let server = Running::start(endless(), ServerOptions::default()).await;
    let mut stream = server.open("POST", "/v1/completions", ENDLESS_STREAM).await;
    read_until(&mut stream, "data: ").await;
    assert_eq!(server.stats().running, 1);
    drop(stream);
    eventually(|| server.stats().cancelled == 1 && server.stats().running == 0).await;
    eventually(|| server.state.metrics().render(None).contains("dsa80_http_disconnects_total 1")).await;
    assert!(server.state.metrics().render(None).contains("dsa80_http_requests_in_flight 0"));
}

#[tokio::test]
async fn a_client_that_leaves_before_the_first_token_cancels_it() {
    for body in [ENDLESS, ENDLESS_STREAM] {
        let mock = MockOptions { start_delay: Duration::from_secs(60), ..endless() };
        let server = Running::start(mock, ServerOptions::default()).await;
        let stream = server.open("POST", "/v1/completions", body).await;
        eventually(|| server.stats().running == 1).await;
        drop(stream);
        eventually(|| server.stats().cancelled == 1 && server.stats().running == 0).await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_while_waiting_for_a_whole_answer_cancels_all_its_choices() {
    let server = Running::start(endless(), ServerOptions::default()).await;
    let stream =
        server.open("POST", "/v1/completions", r#"{"prompt": ["a", "b"], "n": 2, "ignore_eos": true}"#).await;
    eventually(|| server.stats().running == 4 && server.stats().generated_tokens > 8).await;
    drop(stream);
    eventually(|| server.stats().cancelled == 4 && server.stats().running == 0).await;
}

#[tokio::test]
async fn a_silent_stream_is_kept_alive() {
    let mock = MockOptions { start_delay: Duration::from_millis(300), ..MockOptions::default() };
    let options = ServerOptions { sse_keep_alive: Duration::from_millis(50), ..ServerOptions::default() };
    let server = Running::start(mock, options).await;
    let answer = server.ask("POST", "/v1/completions", r#"{"prompt": "a", "stream": true}"#).await;
    let first = answer.find(": ping").expect("a comment while nothing else comes");
    assert!(first < answer.find("data: ").unwrap());
    assert!(answer.contains("data: [DONE]"));
}

#[tokio::test]
async fn while_loading_it_listens_and_says_so() {
    let server = Running::start_loading(MockOptions::default(), ServerOptions::default()).await;
    let health = server.ask("GET", "/health", "").await;
    assert!(health.starts_with("HTTP/1.1 503") && health.contains(r#"{"status":"loading"}"#), "{health}");
    for (method, path) in [("POST", "/v1/completions"), ("GET", "/v1/models")] {
        let answer = server.ask(method, path, r#"{"prompt": "a"}"#).await;
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
        assert!(answer.to_ascii_lowercase().contains("retry-after: 2") && answer.contains("model_loading"));
    }
    assert!(server.ask("GET", "/metrics", "").await.starts_with("HTTP/1.1 200"));
    server.set_ready();
    assert!(server.ask("GET", "/health", "").await.contains(r#"{"status":"ready"}"#));
    assert!(server.ask("POST", "/v1/completions", r#"{"prompt": "a"}"#).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn loading_that_failed_is_told() {
    let server = Running::start_loading(MockOptions::default(), ServerOptions::default()).await;
    server.state.set_failed("model.safetensors is cut short");
    let health = server.ask("GET", "/health", "").await;
    assert!(health.starts_with("HTTP/1.1 503") && health.contains("cut short"), "{health}");
    assert!(server.ask("POST", "/v1/completions", r#"{"prompt": "a"}"#).await.contains("engine_failed"));
}

#[tokio::test]
async fn on_the_signal_running_requests_finish_and_new_ones_are_turned_away() {
    let mock = MockOptions {
        scripts: vec![bytes("a long answer")],
        token_delay: Duration::from_millis(30),
        ..endless()
    };
    let server = Running::start(mock, ServerOptions::default()).await;
    let mut stream = server.open("POST", "/v1/completions", r#"{"prompt": "a", "stream": true}"#).await;
    read_until(&mut stream, "data: ").await;
    let (address, state) = (server.address.clone(), server.state.clone());
    server.stop.send(()).unwrap();
    eventually(|| state.health() == dsa80_serve::http::Health::Draining).await;

    let mut late = TcpStream::connect(&address).await.unwrap();
    late.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    late.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("draining"), "{answer}");
    let mut late = TcpStream::connect(&address).await.unwrap();
    late.write_all(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n{\"prompt\": \"a\"}").await.unwrap();
    let mut answer = String::new();
    late.read_to_string(&mut answer).await.unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 503") && answer.to_ascii_lowercase().contains("retry-after"),
        "{answer}"
    );

    let rest = read_until(&mut stream, "data: [DONE]").await;
    assert!(rest.contains(r#""finish_reason":"stop""#), "{rest}");
    drop(stream);
    tokio::time::timeout(Duration::from_secs(10), server.served).await.unwrap().unwrap().unwrap();
    assert!(TcpStream::connect(&address).await.is_err(), "the listener is closed");
}

#[tokio::test]
async fn requests_that_take_longer_than_the_timeout_are_ended() {
    let options = ServerOptions { shutdown_timeout: Duration::from_millis(100), ..ServerOptions::default() };
    let server = Running::start(endless(), options).await;
    let mut stream = server.open("POST", "/v1/completions", ENDLESS_STREAM).await;
    read_until(&mut stream, "data: ").await;
    server.stop.send(()).unwrap();
    let rest = read_until(&mut stream, "data: [DONE]").await;
    assert!(rest.contains(r#""error":{"#) && rest.contains("shut down"), "{rest}");
    drop(stream);
    tokio::time::timeout(Duration::from_secs(10), server.served).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn an_idle_server_stops_at_once_even_with_open_connections() {
    let server = Running::start(MockOptions::default(), ServerOptions::default()).await;
    let _idle = TcpStream::connect(&server.address).await.unwrap();
    let mut kept = server.open("GET", "/health", "").await;
    read_until(&mut kept, "ready").await;
    let begin = Instant::now();
    server.stop.send(()).unwrap();
    server.served.await.unwrap().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
}
