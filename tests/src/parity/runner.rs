//! Runs a body over random cases on every device.

use std::hash::{BuildHasher, RandomState};

use proptest::prelude::*;
use proptest::test_runner::{FileFailurePersistence, RngSeed, TestError, TestRunner};

use super::devices::{self, TestDevice};
use crate::emulator::Fault;

/// Cases of a test on the emulator unless `PROPTEST_CASES` says otherwise. A GPU runs [`GPU_FACTOR`] times as many.
const CASES: u32 = 12;
const GPU_FACTOR: u32 = 4;

/// Runs `body` on random cases in emulation and, where there is one, on a GPU. The case that failed is printed as small as it could be
/// made, and kept in `tests/regressions/NAME.txt`, which later runs try first.
#[track_caller]
pub fn check<S: Strategy>(name: &str, cases: S, body: impl Fn(&TestDevice, S::Value)) {
    for device in devices::all() {
        run_on(name, &device, &cases, &body);
    }
}

/// [`check`] for cases that are too large to emulate.
#[track_caller]
pub fn check_on_gpu<S: Strategy>(name: &str, cases: S, body: impl Fn(&TestDevice, S::Value)) {
    if let Some(device) = devices::gpu() {
        run_on(name, &device, &cases, &body);
    }
}

/// Runs `body` once on every device: for cases that are written out.
pub fn small_cases(body: impl Fn(&TestDevice)) {
    devices::all().iter().for_each(body);
}

/// Runs `body` once on a GPU, if there is one: for written-out cases that are too large to emulate.
pub fn large_cases(body: impl Fn(&TestDevice)) {
    devices::gpu().iter().for_each(body);
}

/// Whether the tests see `fault`: `body` fails on some of `cases` (in emulation) with it in the kernel.
#[track_caller]
pub fn catches<S: Strategy>(fault: Fault<'_>, cases: S, body: impl Fn(&TestDevice, S::Value)) {
    let Some(device) = devices::faulty(&[fault]) else { return };
    let Some(reason) = catch(&cases, &|case| body(&device, case)) else {
        panic!("nothing sees the fault {fault:?}")
    };
    assert!(!reason.contains("refused the kernel"), "{fault:?} does not compile: {reason}");
}

/// Why `body` fails on some of `cases`, if it does: the same cases in every run.
pub(super) fn catch<S: Strategy>(cases: &S, body: &impl Fn(S::Value)) -> Option<String> {
    let mut config = ProptestConfig { failure_persistence: None, max_shrink_iters: 0, ..Default::default() };
    config.rng_seed = RngSeed::Fixed(1);
    let outcome = TestRunner::new(config).run(cases, |case| {
        body(case);
        Ok(())
    });
    match outcome {
        Err(TestError::Fail(reason, _)) => Some(reason.message().to_owned()),
        _ => None,
    }
}

/// What a run of random cases is called, and how many it has.
pub(super) struct Config<'a> {
    /// The test's name, and the file's of its regressions.
    pub(super) name: &'a str,
    /// What runs it.
    pub(super) on: &'a str,
    /// Times the cases of a test on the emulator.
    pub(super) factor: u32,
}

#[track_caller]
fn run_on<S: Strategy>(name: &str, device: &TestDevice, cases: &S, body: &impl Fn(&TestDevice, S::Value)) {
    let factor = if device.is_gpu() { GPU_FACTOR } else { 1 };
    run(&Config { name, on: &device.to_string(), factor }, cases, &|case| body(device, case));
}

#[track_caller]
pub(super) fn run<S: Strategy>(of: &Config<'_>, cases: &S, body: &impl Fn(S::Value)) {
    let &Config { name, on, factor } = of;
    let mut config = ProptestConfig::default();
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = CASES;
    }
    config.cases *= factor;
    let regressions = format!("{}/regressions/{name}.txt", env!("CARGO_MANIFEST_DIR"));
    config.failure_persistence = Some(Box::new(FileFailurePersistence::Direct(regressions.leak())));
    config.max_shrink_iters = 64;
    config.max_shrink_time = 60_000;
    let seed = match config.rng_seed {
        RngSeed::Fixed(seed) => seed,
        RngSeed::Random => RandomState::new().hash_one(name),
    };
    config.rng_seed = RngSeed::Fixed(seed);
    let outcome = TestRunner::new(config).run(cases, |case| {
        body(case);
        Ok(())
    });
    match outcome {
        Ok(()) => {}
        Err(TestError::Fail(reason, case)) => panic!(
            "{name} on {on}, PROPTEST_RNG_SEED={seed}: {reason}\nthe smallest case that fails: {case:#?}"
        ),
        Err(TestError::Abort(reason)) => panic!("{name} on {on}: given up: {reason}"),
    }
}
