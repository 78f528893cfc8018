//! Ranks that are processes: they answer as one process does, and one that fails takes the others down with its reason, at once.

#![cfg(unix)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use serde_json::Value as Json;

/// Far beyond what anything here takes.
const LONG: Duration = Duration::from_secs(120);

/// A process of `dsa80 serve`, with what it says. Ended when it is dropped.
struct Process {
    child: Child,
    log: Receiver<String>,
    seen: String,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Process {
    fn start(args: &[&str], environment: &[(&str, String)]) -> Self {
        Self::start_by(Command::new(env!("CARGO_BIN_EXE_dsa80")), args, environment)
    }

    /// As another program starts it.
    fn start_by(mut command: Command, args: &[&str], environment: &[(&str, String)]) -> Self {
        command.args(["serve", "--device", "cpu", "--port", "0"]).args(args);
        for name in ["DSA80_MODEL", "DSA80_API_KEY", "RUST_LOG", "RANK", "WORLD_SIZE", "LOCAL_RANK"] {
            command.env_remove(name);
        }
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (lines, log): (Sender<String>, _) = channel();
        std::thread::spawn(move || {
            stderr.lines().map_while(Result::ok).try_for_each(|line| lines.send(line))
        });
        Self { child, log, seen: String::new() }
    }

    /// The line that contains `words`.
    fn says(&mut self, words: &str) -> String {
        let end = Instant::now() + LONG;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let Ok(line) = self.log.recv_timeout(left) else {
                panic!("never said {words:?}:\n{}", self.seen)
            };
            self.seen.push_str(&line);
            self.seen.push('\n');
            if line.contains(words) {
                return line;
            }
        }
    }

    fn address(&mut self) -> String {
        let line = self.says("ready: http://");
        line.split("http://").nth(1).unwrap().split('/').next().unwrap().to_owned()
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    }

    /// Its status and everything that it has said, once it has ended, which must be within `patience`.
    fn ends_within(mut self, patience: Duration) -> (ExitStatus, String) {
        let end = Instant::now() + patience;
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < end, "still there after {patience:?}:\n{}", self.seen);
            std::thread::sleep(Duration::from_millis(10));
        }
        let status = self.child.wait().unwrap();
        let rest: Vec<String> = self.log.iter().collect();
        let seen = std::mem::take(&mut self.seen);
        (status, seen + &rest.join("\n"))
    }
}

/// All ranks, in rank order, each with further arguments.
fn start_ranks(args: &[&[&str]]) -> Vec<Process> {
    // Free now; nobody else should take it in the moment until rank 0 does.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let environment = |rank: usize| {
        [
            ("RANK", rank.to_string()),
            ("WORLD_SIZE", args.len().to_string()),
            ("LOCAL_RANK", rank.to_string()),
            ("MASTER_ADDR", "127.0.0.1".to_owned()),
            ("MASTER_PORT", port.to_string()),
        ]
    };
    (0..).zip(args).map(|(rank, args)| Process::start(args, &environment(rank))).collect()
}

fn ask(address: &str, body: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    let length = body.len();
    write!(
        stream,
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Sampled tokens with their log-probabilities, of two prompts at once.
fn sample(address: &str) -> Json {
    let body = r#"{"prompt": ["The quick brown fox jumps over the lazy dog", "17 x 24 ="], "max_tokens": 24, "seed": 7,
        "temperature": 0.9, "top_p": 0.95, "logprobs": 3, "ignore_eos": true}"#;
    let answer = ask(address, body).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let mut answer: Json = serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    answer["choices"].take()
}

/// More than can be generated before something happens to it.
const ENDLESS: &str =
    r#"{"prompt": "Once upon a time", "max_tokens": 8000, "ignore_eos": true, "stream": true}"#;

/// A stream that generates already, and its end.
struct Stream(BufReader<TcpStream>);

impl Stream {
    fn start(address: &str) -> Self {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        let length = ENDLESS.len();
        write!(
            stream,
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n\r\n{ENDLESS}"
        )
        .unwrap();
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        while !line.starts_with("data: ") {
            line.clear();
            assert!(reader.read_line(&mut line).unwrap() > 0, "the stream ended before it began");
        }
        Self(reader)
    }

    fn rest(mut self) -> String {
        let mut rest = String::new();
        self.0.read_to_string(&mut rest).unwrap();
        rest
    }
}

#[test]
fn two_processes_answer_as_two_threads_do() {
    let mut alone = Process::start(&["--tp", "2"], &[]);
    let expected = sample(&alone.address());
    let mut ranks = start_ranks(&[&[], &["--max-queued-requests", "7"]]);
    let address = ranks[0].address();
    // To the last bit of every log-probability.
    assert_eq!(sample(&address), expected);
    let (second, first) = (ranks.pop().unwrap(), ranks.pop().unwrap());
    // As launchers do: to all, and those that are not rank 0 first.
    second.signal("-TERM");
    first.signal("-TERM");
    for rank in [first, second] {
        let (status, log) = rank.ends_within(LONG);
        assert_eq!(status.code(), Some(0), "{log}");
    }
}

#[test]
fn a_rank_that_is_killed_while_generating_ends_the_requests_and_all_other_ranks() {
    let mut ranks = start_ranks(&[&[], &[], &[], &[]]);
    let stream = Stream::start(&ranks[0].address());
    let killed = Instant::now();
    ranks[1].signal("-KILL");
    let rest = stream.rest();
    let answered = killed.elapsed();
    assert!(rest.contains("rank 1 has closed its connection"), "{rest}");
    assert!(answered < Duration::from_secs(10), "{answered:?}");
    for (rank, process) in ranks.into_iter().enumerate().filter(|(rank, _)| *rank != 1) {
        let (status, log) = process.ends_within(Duration::from_secs(20));
        assert_eq!(status.code(), Some(1), "rank {rank}: {log}");
        assert!(log.contains("rank 1 has closed its connection"), "rank {rank}: {log}");
    }
}

#[test]
fn a_rank_that_is_killed_while_nothing_is_asked_ends_the_others_too() {
    let mut ranks = start_ranks(&[&[], &[]]);
    ranks[0].says("ready: http://");
    ranks[1].signal("-KILL");
    let (status, log) = ranks.remove(0).ends_within(Duration::from_secs(20));
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("error: the engine stopped: rank 1 has closed its connection"), "{log}");
}

#[test]
fn a_rank_that_hangs_in_a_step_ends_all_at_the_deadline() {
    let deadline: &[&str] = &["--step-timeout", "3"];
    let mut ranks = start_ranks(&[deadline, deadline]);
    let stream = Stream::start(&ranks[0].address());
    let stopped = Instant::now();
    ranks[1].signal("-STOP");
    let rest = stream.rest();
    let answered = stopped.elapsed();
    let words = "a step has not finished within 3s (--step-timeout); rank 1 has not come to a collective";
    assert!(rest.contains(words), "{rest}");
    assert!(answered > Duration::from_secs(2) && answered < Duration::from_secs(12), "{answered:?}");
    let second = ranks.pop().unwrap();
    let (status, log) = ranks.remove(0).ends_within(Duration::from_secs(20));
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains(words), "{log}");
    // When it goes on, it finds out.
    second.signal("-CONT");
    let (status, log) = second.ends_within(Duration::from_secs(20));
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains(words), "{log}");
}

#[test]
fn rank_0_that_is_killed_ends_the_others() {
    let mut ranks = start_ranks(&[&[], &[]]);
    let _stream = Stream::start(&ranks[0].address());
    ranks[0].signal("-KILL");
    let (status, log) = ranks.remove(1).ends_within(Duration::from_secs(20));
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("rank 0 has closed its connection"), "{log}");
}

/// The environment of each of four ranks on two machines of two, of which rank 0 is to be found at `master`.
fn on_two_machines(rank: usize, master: &str, port: u16) -> [(&'static str, String); 6] {
    [
        ("RANK", rank.to_string()),
        ("WORLD_SIZE", "4".to_owned()),
        ("LOCAL_RANK", (rank % 2).to_string()),
        ("LOCAL_WORLD_SIZE", "2".to_owned()),
        ("MASTER_ADDR", master.to_owned()),
        ("MASTER_PORT", port.to_string()),
    ]
}

/// Every machine counts its own ranks; rank 0's address is one of several that its machine has.
#[test]
fn local_ranks_repeat_from_machine_to_machine() {
    let master = "127.0.0.2";
    let port = TcpListener::bind((master, 0)).unwrap().local_addr().unwrap().port();
    let start = |rank| Process::start(&[], &on_two_machines(rank, master, port));
    let mut ranks: Vec<_> = [3, 2, 1, 0].map(start).into();
    let address = ranks[3].address();
    let mut alone = Process::start(&["--tp", "4"], &[]);
    assert_eq!(sample(&address), sample(&alone.address()));
    // Rank 2 is the first of its machine.
    ranks[1].signal("-KILL");
    let (status, log) = ranks.remove(3).ends_within(Duration::from_secs(20));
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("rank 2 has closed its connection"), "{log}");
}

/// Two machines with a cable between them, and one to here: network namespaces of this machine.
#[cfg(target_os = "linux")]
struct Machines {
    names: [String; 2],
}

#[cfg(target_os = "linux")]
impl Machines {
    /// On each, `node0` is the first, as such machines have it: to itself an address of its loopback.
    fn start() -> Self {
        let names = [0, 1].map(|node| format!("dsa80-{}-{node}", std::process::id()));
        for (name, host) in names.iter().zip(["127.0.1.1 node0", "10.253.1.1 node0"]) {
            let dir = format!("/etc/netns/{name}");
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(format!("{dir}/hosts"), format!("{host}\n127.0.0.1 localhost\n")).unwrap();
        }
        let [first, second] = &names;
        let here = format!("d80-{}", std::process::id());
        for line in [
            format!("netns add {first}"),
            format!("netns add {second}"),
            format!("-n {first} link set lo up"),
            format!("-n {second} link set lo up"),
            format!("link add {here} type veth peer name here netns {first}"),
            format!("address add 10.253.0.254/24 dev {here}"),
            format!("link set {here} up"),
            format!("-n {first} address add 10.253.0.1/24 dev here"),
            format!("-n {first} link set here up"),
            format!("-n {first} link add cable type veth peer name cable netns {second}"),
            format!("-n {first} address add 10.253.1.1/24 dev cable"),
            format!("-n {second} address add 10.253.1.2/24 dev cable"),
            format!("-n {first} link set cable up"),
            format!("-n {second} link set cable up"),
        ] {
            Self::ip(&line);
        }
        Self { names }
    }

    fn ip(line: &str) {
        let status = Command::new("ip").args(line.split(' ')).status();
        assert!(status.is_ok_and(|status| status.success()), "`ip {line}` needs iproute2 and root");
    }

    fn rank(&self, rank: usize) -> Process {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[rank / 2], env!("CARGO_BIN_EXE_dsa80")]);
        Process::start_by(command, &["--host", "0.0.0.0"], &on_two_machines(rank, "node0", 29500))
    }
}

#[cfg(target_os = "linux")]
impl Drop for Machines {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "delete", name]).status();
            let _ = std::fs::remove_dir_all(format!("/etc/netns/{name}"));
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
#[ignore = "needs root and iproute2: network namespaces"]
fn ranks_on_two_machines_answer_as_threads_do_and_a_cut_cable_ends_them() {
    let machines = Machines::start();
    let mut ranks: Vec<_> = (0..4).map(|rank| machines.rank(rank)).collect();
    ranks[0].says("leads to this machine's loopback, where no other comes");
    let address = ranks[0].address().replace("0.0.0.0", "10.253.0.1");
    let mut alone = Process::start(&["--tp", "4"], &[]);
    assert_eq!(sample(&address), sample(&alone.address()));

    let stream = Stream::start(&address);
    let cut = Instant::now();
    Machines::ip(&format!("-n {} link set cable down", machines.names[1]));
    let rest = stream.rest();
    let answered = cut.elapsed();
    assert!(rest.contains("has given no sign of life for 20s"), "{rest}");
    assert!(answered < Duration::from_secs(40), "{answered:?}");
    for (rank, process) in ranks.into_iter().enumerate() {
        let (status, log) = process.ends_within(Duration::from_secs(40));
        assert_eq!(status.code(), Some(1), "rank {rank}: {log}");
        let silent = ["rank 2 has given no", "rank 3 has given no", "rank 0 has given no"];
        assert!(silent.iter().any(|words| log.contains(words)), "rank {rank}: {log}");
    }
}

#[test]
fn ranks_that_are_started_otherwise_or_not_at_all_are_named() {
    let ranks = start_ranks(&[&["--page-size", "16"], &["--page-size", "32"]]);
    for process in ranks {
        let (status, log) = process.ends_within(LONG);
        assert_eq!(status.code(), Some(1), "{log}");
        assert!(
            log.contains("--page-size is 32 on rank 1, and 16 on rank 0; all ranks need the same"),
            "{log}"
        );
    }
    let short: &[&str] = &["--join-timeout", "3"];
    let mut ranks = start_ranks(&[short, short, short, short]);
    drop(ranks.remove(1));
    for process in ranks {
        let (status, log) = process.ends_within(LONG);
        assert_eq!(status.code(), Some(1), "{log}");
        assert!(log.contains("rank 1 has not come to 127.0.0.1:"), "{log}");
    }
}

#[test]
fn a_rank_that_cannot_be_loaded_tells_the_others_why() {
    let tight: &[&str] = &["--max-model-len", "512", "--num-pages", "4"];
    for process in start_ranks(&[tight, tight]) {
        let (status, log) = process.ends_within(LONG);
        assert_eq!(status.code(), Some(1), "{log}");
        assert!(log.contains("the longest context that would fit is 256 tokens"), "{log}");
    }
    let mut alone = Process::start(&[], &[("RANK", "0".into())]);
    alone.says("WORLD_SIZE is not set");
    assert_eq!(alone.ends_within(LONG).0.code(), Some(1));
}

#[test]
fn generate_is_no_rank() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dsa80"));
    command.args(["generate", "x", "--device", "cpu"]).env_remove("DSA80_MODEL");
    command.envs([("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")]);
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&output.stderr)
            .contains("this is rank 1 of 2 (RANK, WORLD_SIZE): use `serve`")
    );
}
