//! Steps that are described before their tokens are known.

use dsa80_reference::SamplingParams;

use super::*;
use crate::engine::Step;

/// Three requests that decode for some steps: with a penalty, with tokens that are banned at first, and with neither.
fn requests() -> [Request; 3] {
    let penalty = SamplingParams { repetition_penalty: 1.2, ..SamplingParams::default() };
    [
        Request { sampling: penalty, ..request(2..7, 12) },
        Request { min_tokens: 6, stop_token_ids: vec![3, 4], ..request(10..12, 12) },
        request(20..21, 12),
    ]
}

/// The steps that `requests` come to, and how many of them were described ahead.
fn steps(ahead: bool) -> (Vec<Step>, u64) {
    let mut bench = Bench::new(limits(), true);
    bench.ahead = ahead;
    let mut clients = requests().map(|request| bench.submit(request));
    bench.drain();
    clients.iter_mut().for_each(Client::assert_expected);
    let log = bench.model.log.lock().unwrap();
    (log.iter().map(|step| Step::clone(step)).collect(), bench.stats().steps_ahead)
}

#[test]
fn a_step_described_ahead_is_the_step_described_afterwards() {
    let ((ahead, early), (afterwards, late)) = (steps(true), steps(false));
    assert_eq!(ahead, afterwards);
    // All but those with prompts in them, and those after somebody has ended.
    assert!(early >= 9 && late == 0, "{early} of {} steps, {late}", ahead.len());
}

/// Between a step and its successor: `event` happens, and the step that was described no longer fits.
fn after(event: impl FnOnce(&mut Bench, &mut [Client; 3])) -> (Bench, [Client; 3]) {
    let mut bench = Bench::new(StepLimits { num_pages: 40, ..limits() }, true);
    let mut clients = [2, 10, 20].map(|first| bench.submit(request(first..first + 2, 12)));
    for _ in 0..5 {
        bench.step();
    }
    let before = bench.stats().steps_ahead;
    assert!(before > 0);
    event(&mut bench, &mut clients);
    bench.step();
    assert_eq!(bench.stats().steps_ahead, before, "a step was taken that counted on what did not come true");
    (bench, clients)
}

#[test]
fn a_request_that_goes_away_takes_no_part_in_the_step_that_counted_on_it() {
    let (mut bench, mut clients) = after(|_, clients| clients[1].cancel());
    assert_eq!(bench.model.log.lock().unwrap().last().unwrap().batch.num_seqs(), 2);
    bench.drain();
    clients[0].assert_expected();
    clients[2].assert_expected();
}

#[test]
fn a_newcomer_does_not_wait_for_the_steps_described_ahead() {
    let mut newcomer = None;
    let (mut bench, mut clients) = after(|bench, _| newcomer = Some(bench.submit(request(30..33, 2))));
    assert_eq!(bench.stats().running, 4);
    bench.drain();
    clients.iter_mut().chain(&mut newcomer).for_each(Client::assert_expected);
}

#[test]
fn a_full_house_is_described_ahead_whoever_waits() {
    let limits = StepLimits { max_batch_seqs: 2, ..limits() };
    let mut bench = Bench::new(limits, true);
    let mut clients = [2, 10, 20].map(|first| bench.submit(request(first..first + 2, 12)));
    for _ in 0..6 {
        bench.step();
    }
    let stats = bench.stats();
    assert_eq!((stats.running, bench.batching.scheduler.waiting.len()), (2, 1));
    assert!(stats.steps_ahead >= 4, "{stats:?}");
    bench.drain();
    clients.iter_mut().for_each(Client::assert_expected);
}

#[test]
fn pages_taken_ahead_are_given_back() {
    // One token a page: every step needs a page for everybody.
    let limits = StepLimits { page_size: 1, num_pages: 64, ..limits() };
    let mut bench = Bench::new(limits, false);
    let mut clients = [2, 10, 20].map(|first| bench.submit(request(first..first + 2, 12)));
    for _ in 0..6 {
        bench.step();
    }
    assert!(bench.stats().steps_ahead >= 3);
    clients[0].cancel();
    clients[1].hang_up();
    bench.drain();
    clients[2].assert_expected();
    assert_eq!(bench.stats().pages_used, 0);
}

#[test]
fn who_waits_for_pages_keeps_nobody_from_being_described_ahead() {
    // Each needs three pages in the end, and one to grow; there are seven.
    let limits = StepLimits { num_pages: 7, ..limits() };
    let mut bench = Bench::new(limits, false);
    let mut clients = [2, 10, 20].map(|first| bench.submit(request(first..first + 7, 5)));
    for _ in 0..4 {
        bench.step();
    }
    let stats = bench.stats();
    assert_eq!((stats.running, bench.batching.scheduler.waiting.len()), (2, 1));
    assert!(stats.steps_ahead >= 1, "{stats:?}");
    bench.drain();
    clients.iter_mut().for_each(Client::assert_expected);
}
