//! The engine as its callers hold it: the bound of its queue, its end, and what survives a failing model.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use super::mock::{Fault, Gate};
use super::*;
use crate::engine::{Engine, EngineHandle, EngineOptions, EventStream, SubmitError};

/// Longer than any of these tests takes.
const LONG: Duration = Duration::from_secs(600);

fn options() -> EngineOptions {
    EngineOptions { max_waiting: 3, eos_token_ids: EOS.to_vec(), max_running: 2, ..EngineOptions::default() }
}

fn start(model: MockModel) -> EngineHandle {
    Engine::start(Box::new(model), options())
}

/// An engine whose steps the test permits one by one.
struct Gated {
    engine: EngineHandle,
    entered: Receiver<()>,
    permits: Sender<()>,
}

impl Gated {
    fn start() -> Self {
        let (entered_sender, entered) = channel();
        let (permits, permits_receiver) = channel();
        let mut model = MockModel::new(limits());
        model.gate = Some(Gate { entered: entered_sender, permits: permits_receiver });
        Self { engine: start(model), entered, permits }
    }

    /// Waits until the model is in a step.
    fn wait_for_step(&self) {
        self.entered.recv().expect("the model lives");
    }

    /// Lets the present step finish and waits for the next one.
    fn next_step(&self) {
        self.permits.send(()).expect("the model lives");
        self.wait_for_step();
    }

    /// All steps are free from now on.
    fn open(self) -> EngineHandle {
        self.engine
    }
}

fn collect(mut stream: EventStream) -> Vec<Event> {
    std::iter::from_fn(|| stream.next_blocking()).collect()
}

fn failure(stream: EventStream) -> String {
    match collect(stream).pop() {
        Some(Event::Failed(message)) => message,
        other => panic!("expected a failure, found {other:?}"),
    }
}

/// Submits until the engine drains; the requests that were taken before that. The model stands still
/// meanwhile.
fn submit_until_refused(engine: &EngineHandle) -> Vec<EventStream> {
    let mut taken = Vec::new();
    loop {
        match engine.submit(request([2], 60)) {
            Ok(stream) => taken.push(stream),
            Err(SubmitError::QueueFull { .. }) => std::thread::yield_now(),
            Err(error) => {
                assert_eq!(error, SubmitError::ShuttingDown);
                return taken;
            }
        }
    }
}

fn assert_served(request: &Request, stream: EventStream) {
    let expected = mock::expected(request, &EOS, limits().vocab_size);
    assert_eq!(without_cached(&collect(stream)), expected);
}

#[test]
fn thirty_two_requests_at_once_get_the_tokens_they_get_alone() {
    let options = EngineOptions { max_waiting: 32, max_running: 8, ..options() };
    let engine = Engine::start(Box::new(MockModel::new(limits())), options);
    let requests: Vec<Request> = (0..32).map(|i| request((0..i % 7 + 1).map(|j| i + j), 12)).collect();
    let streams: Vec<EventStream> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
    for (request, stream) in requests.iter().zip(streams) {
        assert_served(request, stream);
    }
    let stats = engine.stats();
    assert_eq!((stats.finished, stats.running, stats.waiting, stats.pages_used), (32, 0, 0, 0));
    assert_eq!(stats.generated_tokens, 32 * 12);
    engine.shutdown(LONG);
}

#[test]
fn the_queue_takes_exactly_its_bound() {
    let gated = Gated::start();
    let mut streams = vec![gated.engine.submit(request([2], 4)).unwrap()];
    gated.wait_for_step();
    assert_eq!((gated.engine.stats().running, gated.engine.stats().waiting), (1, 0));
    for waiting in 1..=3 {
        streams.push(gated.engine.submit(request([3], 4)).unwrap());
        assert_eq!(gated.engine.stats().waiting, waiting);
    }
    let full = gated.engine.submit(request([4], 4)).unwrap_err();
    assert_eq!(full, SubmitError::QueueFull { waiting: 3, limit: 3 });
    // One of the three is started (two may run), so there is room for one.
    gated.next_step();
    assert_eq!((gated.engine.stats().running, gated.engine.stats().waiting), (2, 2));
    streams.push(gated.engine.submit(request([4], 4)).unwrap());
    assert!(matches!(gated.engine.submit(request([4], 4)), Err(SubmitError::QueueFull { .. })));
    let engine = gated.open();
    for stream in streams {
        assert!(matches!(collect(stream).last(), Some(Event::Finished { .. })));
    }
    assert_eq!(engine.stats().waiting, 0);
    assert!(engine.submit(request([4], 4)).is_ok());
}

#[test]
fn a_cancelled_request_gives_its_place_in_the_queue_back() {
    let gated = Gated::start();
    let _running: Vec<EventStream> =
        (2..4).map(|token| gated.engine.submit(request([token], 9)).unwrap()).collect();
    gated.wait_for_step();
    let mut waiting: Vec<EventStream> =
        (4..6).map(|token| gated.engine.submit(request([token], 9)).unwrap()).collect();
    gated.next_step();
    waiting.push(gated.engine.submit(request([7], 9)).unwrap());
    assert!(matches!(gated.engine.submit(request([8], 9)), Err(SubmitError::QueueFull { .. })));
    waiting.remove(1);
    gated.next_step();
    let stats = gated.engine.stats();
    assert_eq!((stats.running, stats.waiting, stats.cancelled), (2, 2, 1));
    assert!(gated.engine.submit(request([8], 9)).is_ok());
}

#[test]
fn what_cannot_run_is_refused_at_once_and_leaves_no_trace() {
    let engine = start(MockModel::new(limits()));
    let refused = |request| engine.submit(request).unwrap_err();
    assert!(matches!(refused(request([], 4)), SubmitError::Invalid(_)));
    assert!(matches!(refused(request([50], 4)), SubmitError::Invalid(_)));
    let too_long = SubmitError::TooLong { prompt_tokens: 1, max_tokens: 64, max_model_len: 64 };
    assert_eq!(refused(request([2], 64)), too_long);
    assert_eq!(engine.stats(), EngineStats { pages_total: 16, ..EngineStats::default() });
    assert_eq!(engine.max_model_len(), 64);
    let small = start(MockModel::new(StepLimits { num_pages: 5, ..limits() }));
    assert_eq!(small.max_model_len(), 20, "no more than the cache holds");
    assert!(matches!(small.submit(request([2], 30)), Err(SubmitError::Invalid(_))));
}

#[test]
fn end_of_sequence_ids_outside_the_vocabulary_are_ignored() {
    let options = EngineOptions { eos_token_ids: vec![0, 1, 50, 1000], ..options() };
    let engine = Engine::start(Box::new(MockModel::new(limits())), options);
    let asked = Request { ignore_eos: false, min_tokens: 5, ..request([2], 30) };
    assert_served(&asked, engine.submit(asked.clone()).unwrap());
}

#[test]
fn an_idle_engine_shuts_down_and_twice_is_harmless() {
    let model = MockModel::new(limits());
    let given_up = Arc::clone(&model.given_up);
    let engine = start(model);
    assert!(engine.is_alive());
    engine.shutdown(LONG);
    assert!(!engine.is_alive());
    engine.shutdown(Duration::ZERO);
    assert_eq!(engine.submit(request([2], 4)).unwrap_err(), SubmitError::ShuttingDown);
    assert!(given_up.lock().unwrap().is_empty(), "to be asked to stop is no failure");
}

#[test]
fn within_the_grace_running_and_waiting_requests_finish() {
    let gated = Gated::start();
    let requests: Vec<Request> = (2..6).map(|token| request([token], 6)).collect();
    let mut streams = vec![gated.engine.submit(requests[0].clone()).unwrap()];
    gated.wait_for_step();
    streams.extend(requests[1..].iter().map(|r| gated.engine.submit(r.clone()).unwrap()));
    let engine = gated.open();
    engine.shutdown(Duration::MAX);
    assert!(!engine.is_alive());
    for (request, stream) in requests.iter().zip(streams) {
        assert_served(request, stream);
    }
    assert_eq!(engine.stats().finished, 4);
}

#[test]
fn beyond_the_grace_the_rest_fails_with_a_message() {
    let gated = Gated::start();
    let mut streams = vec![gated.engine.submit(request([2], 60)).unwrap()];
    gated.wait_for_step();
    streams.extend((0..3).map(|_| gated.engine.submit(request([2], 60)).unwrap()));
    gated.next_step();
    let engine = gated.engine.clone();
    let stopping = std::thread::spawn(move || engine.shutdown(Duration::ZERO));
    streams.extend(submit_until_refused(&gated.engine));
    let count = streams.len() as u64;
    // A longer grace later on takes nothing back.
    let engine = gated.engine.clone();
    let patient = std::thread::spawn(move || engine.shutdown(LONG));
    let engine = gated.open();
    patient.join().unwrap();
    stopping.join().unwrap();
    assert!(!engine.is_alive());
    for stream in streams {
        assert_eq!(failure(stream), "the engine was shut down before the request was finished");
    }
    let stats = engine.stats();
    assert_eq!((stats.failed, stats.running, stats.waiting, stats.pages_used), (count, 0, 0, 0));
}

#[test]
fn nothing_is_taken_while_the_engine_drains() {
    let gated = Gated::start();
    let stream = gated.engine.submit(request([2], 3)).unwrap();
    gated.wait_for_step();
    let engine = gated.engine.clone();
    let stopping = std::thread::spawn(move || engine.shutdown(LONG));
    let mut taken = vec![stream];
    taken.extend(submit_until_refused(&gated.engine));
    assert!(gated.engine.is_alive(), "it still drains");
    let _engine = gated.open();
    stopping.join().unwrap();
    for stream in taken {
        assert!(matches!(collect(stream).last(), Some(Event::Finished { .. })));
    }
}

#[test]
fn a_failing_step_fails_everything_and_stops_the_engine() {
    for (fault, message) in [
        (Fault::Error, "the engine stopped: rank 1 lost its device"),
        (Fault::Panic, "the engine stopped: a step panicked: index out of bounds in a kernel"),
        (Fault::Short, "the engine stopped: the model gave 1 results for 2 targets"),
        (Fault::Token, "the engine stopped: the model chose token 50, expected ids below 50"),
    ] {
        let (entered_sender, entered) = channel();
        let (permits, permits_receiver) = channel();
        let mut model = MockModel::new(limits());
        model.fault = Some((4, fault));
        let given_up = Arc::clone(&model.given_up);
        model.gate = Some(Gate { entered: entered_sender, permits: permits_receiver });
        let gated = Gated { engine: start(model), entered, permits };
        let mut streams = vec![gated.engine.submit(request([2], 60)).unwrap()];
        gated.wait_for_step();
        // Two run, two wait.
        streams.extend((0..3).map(|_| gated.engine.submit(request([2], 60)).unwrap()));
        let engine = gated.open();
        for (index, stream) in streams.into_iter().enumerate() {
            let events = collect(stream);
            assert_eq!(events.last(), Some(&Event::Failed(message.into())));
            assert_eq!(tokens(&events).len(), [4, 3, 0, 0][index], "{fault:?}");
            let started = matches!(events[0], Event::Started { .. });
            assert_eq!(started, index < 2, "who only waited was never started");
            assert!(!engine.is_alive(), "who sees the failure sees the engine dead");
        }
        assert_eq!(engine.submit(request([2], 4)).unwrap_err(), SubmitError::ShuttingDown);
        let stats = engine.stats();
        assert_eq!((stats.failed, stats.running, stats.waiting, stats.pages_used), (4, 0, 0, 0));
        engine.shutdown(LONG);
        // Ranks elsewhere are told, also of what goes wrong between two steps.
        assert_eq!(*given_up.lock().unwrap(), [message], "{fault:?}");
    }
}

#[test]
fn without_handles_the_engine_finishes_what_it_has() {
    let asked = request([2, 3], 9);
    let stream = start(MockModel::new(limits())).submit(asked.clone()).unwrap();
    assert_served(&asked, stream);
}

#[test]
fn started_comes_before_the_first_step_is_done() {
    let gated = Gated::start();
    let mut stream = gated.engine.submit(request([2], 3)).unwrap();
    gated.wait_for_step();
    assert_eq!(stream.next_blocking(), Some(Event::Started { cached_tokens: 0 }));
}

#[test]
fn a_dropped_stream_is_counted_as_cancelled() {
    let gated = Gated::start();
    let running = gated.engine.submit(request([2], 60)).unwrap();
    gated.wait_for_step();
    let waiting = gated.engine.submit(request([2], 60)).unwrap();
    drop((running, waiting));
    let engine = gated.open();
    engine.shutdown(LONG);
    let stats = engine.stats();
    assert_eq!((stats.cancelled, stats.finished, stats.failed, stats.pages_used), (2, 0, 0, 0));
}

#[test]
fn a_token_is_told_while_the_next_step_is_made() {
    let gated = Gated::start();
    let mut stream = gated.engine.submit(request([2], 2)).unwrap();
    gated.wait_for_step();
    assert!(matches!(stream.next_blocking(), Some(Event::Started { .. })));
    gated.next_step();
    // The model is held in the second step.
    assert!(matches!(stream.next_blocking(), Some(Event::Token { .. })));
    let engine = gated.open();
    // Nothing follows the last step, and its events come all the same.
    assert!(matches!(stream.next_blocking(), Some(Event::Token { .. })));
    assert!(matches!(stream.next_blocking(), Some(Event::Finished { .. })));
    assert!(stream.next_blocking().is_none());
    engine.shutdown(Duration::ZERO);
}

/// A model whose steps hang, until they are broken off if that helps.
struct Stuck {
    entered: Sender<()>,
    release: Receiver<()>,
    breaker: Option<dsa80_reference::Breaker>,
}

impl StepModel for Stuck {
    fn step_while(
        &mut self,
        _step: Arc<crate::engine::Step>,
        _meanwhile: &mut dyn FnMut(),
    ) -> Result<Vec<crate::engine::Sampled>, crate::engine::StepError> {
        let _ = self.entered.send(());
        let _ = self.release.recv();
        Err(crate::engine::StepError("rank 1 has not come".into()))
    }

    fn limits(&self) -> StepLimits {
        limits()
    }

    fn breaker(&self) -> Option<dsa80_reference::Breaker> {
        self.breaker.clone()
    }
}

const DEADLINE: Duration = Duration::from_millis(100);

/// An engine whose first step hangs, and what releases it.
fn stuck(helps: bool) -> (EngineHandle, Receiver<()>, Sender<()>) {
    let ((entered_sender, entered), (release, released)) = (channel(), channel());
    let own = release.clone();
    let breaker: dsa80_reference::Breaker = Arc::new(move |reason| {
        assert!(reason.contains("within 100ms (--step-timeout)"), "{reason}");
        let _ = own.send(());
    });
    let model = Stuck { entered: entered_sender, release: released, breaker: helps.then_some(breaker) };
    let options = EngineOptions { step_timeout: DEADLINE, ..options() };
    (Engine::start(Box::new(model), options), entered, release)
}

#[test]
fn a_step_past_its_deadline_is_broken_off_and_says_why_itself() {
    let (engine, _entered, _release) = stuck(true);
    let stream = engine.submit(request([2], 5)).unwrap();
    assert_eq!(failure(stream), "the engine stopped: rank 1 has not come");
    engine.shutdown(LONG);
    assert_eq!(engine.failure().unwrap(), "the engine stopped: rank 1 has not come");
}

#[test]
fn a_step_that_cannot_be_broken_off_is_given_up() {
    let (engine, entered, release) = stuck(false);
    let streams: Vec<_> = (0..3).map(|_| engine.submit(request([2], 5)).unwrap()).collect();
    entered.recv().unwrap();
    let words = "the engine stopped: a step has not finished within 100ms (--step-timeout)";
    for mut stream in streams {
        // Those that have begun, and those that wait.
        let events: Vec<Event> = std::iter::from_fn(|| stream.next_blocking())
            .take_while(|event| !matches!(event, Event::Failed(reason) if reason == words))
            .collect();
        assert!(events.iter().all(|event| matches!(event, Event::Started { .. })), "{events:?}");
    }
    assert!(!engine.is_alive());
    assert_eq!(engine.failure().unwrap(), words);
    assert!(matches!(engine.submit(request([2], 5)), Err(SubmitError::ShuttingDown)));
    // Does not wait for the thread, which is still in its step.
    engine.shutdown(LONG);
    release.send(()).unwrap();
}

#[test]
fn steps_within_the_deadline_go_on_for_longer_than_it() {
    let mut model = MockModel::new(limits());
    let (entered_sender, entered) = channel();
    let (permits, permits_receiver) = channel();
    model.gate = Some(Gate { entered: entered_sender, permits: permits_receiver });
    let engine = Engine::start(Box::new(model), EngineOptions { step_timeout: 5 * DEADLINE, ..options() });
    let request = request([2, 3], 12);
    let stream = engine.submit(request.clone()).unwrap();
    let allow = std::thread::spawn(move || {
        for () in entered {
            std::thread::sleep(DEADLINE);
            let _ = permits.send(());
        }
    });
    assert_served(&request, stream);
    assert_eq!(engine.failure(), None);
    engine.shutdown(LONG);
    allow.join().unwrap();
}
