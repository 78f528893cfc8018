//! Every fixture against HF transformers in float64, on the scale of HF's own bfloat16.

use dsa80_cuda::Cuda;
use dsa80_tests::fixture::Fixture;
use dsa80_tests::judge::{self, BF16_BOUND, BF16_BOUND_OF_ONE_PROMPT, Bf16Distance, limits};
use dsa80_tests::parity::TestDevice;
use dsa80_tests::pool::{PAGE_SIZE, Pool};
use dsa80_tests::prompt;

use super::emulated::ALWAYS;
use super::every_fixture_on_a_gpu;

/// The first `count` of the fixture's further prompts, together.
pub(super) fn judge_pool(cuda: Cuda<TestDevice>, fixture: &Fixture, count: usize) {
    let mut rank = judge::load(cuda, fixture, PAGE_SIZE).unwrap();
    let distance = Pool::open(fixture).unwrap().distance(&mut rank, fixture, count).unwrap();
    distance.assert_within(BF16_BOUND, &fixture.name, "prompts together");
}

#[test]
fn all_prompts_together_are_as_close_to_hf_as_hf_in_bf16() {
    every_fixture_on_a_gpu(|cuda, fixture| judge_pool(cuda, fixture, 32));
}

#[test]
fn expanded_in_one_piece_and_in_chunks() {
    every_fixture_on_a_gpu(|cuda, fixture| {
        let mut rank = judge::load(cuda.with_expansion(ALWAYS), fixture, 16).unwrap();
        let len = fixture.tokens.len();
        for (way, size) in [("expanded in one piece", len), ("expanded in chunks of 37", 37)] {
            let pages = prompt::scattered_pages(&limits(fixture, 16), size % 3);
            let run =
                prompt::run(&mut rank, &fixture.tokens, &pages, 16, &prompt::pieces(len, size)).unwrap();
            Bf16Distance::of(fixture, way, &run).assert_within(BF16_BOUND_OF_ONE_PROMPT, &fixture.name, way);
        }
    });
}

#[test]
fn in_one_piece_in_chunks_and_token_by_token() {
    every_fixture_on_a_gpu(|cuda, fixture| {
        let mut rank = judge::load(cuda, fixture, 16).unwrap();
        let len = fixture.tokens.len();
        for (way, size) in
            [("one piece", len), ("chunks of 64", 64), ("chunks of 7", 7), ("token by token", 1)]
        {
            // Other pages each time, so that nothing of the run before can help.
            let pages = prompt::scattered_pages(&limits(fixture, 16), size % 3);
            let pieces = prompt::pieces(len, size);
            let run = prompt::run(&mut rank, &fixture.tokens, &pages, 16, &pieces).unwrap();
            let distance = Bf16Distance::of(fixture, way, &run);
            distance.assert_within(BF16_BOUND_OF_ONE_PROMPT, &fixture.name, way);
        }
    });
}

#[test]
fn a_prefill_and_then_decodes_on_pages_of_every_size() {
    every_fixture_on_a_gpu(|cuda, fixture| {
        let len = fixture.tokens.len();
        let mut cuda = Some(cuda);
        for page_size in [3, 64] {
            let backend = cuda.take().unwrap_or_else(|| super::on_gpu().unwrap());
            let mut rank = judge::load(backend, fixture, page_size).unwrap();
            let mut pieces = prompt::pieces(len / 2, len);
            pieces.extend((len / 2..len).map(|position| position..position + 1));
            let pages = prompt::scattered_pages(&limits(fixture, page_size), 1);
            let run = prompt::run(&mut rank, &fixture.tokens, &pages, page_size, &pieces).unwrap();
            let way = format!("pages of {page_size}");
            let distance = Bf16Distance::of(fixture, &way, &run);
            distance.assert_within(BF16_BOUND_OF_ONE_PROMPT, &fixture.name, &way);
        }
    });
}

#[test]
fn two_runs_are_the_same_to_the_bit() {
    every_fixture_on_a_gpu(|cuda, fixture| {
        let mut rank = judge::load(cuda, fixture, 16).unwrap();
        let pages = prompt::scattered_pages(&limits(fixture, 16), 0);
        let pieces = prompt::pieces(fixture.tokens.len(), 50);
        let [first, second] =
            [0; 2].map(|_| prompt::run(&mut rank, &fixture.tokens, &pages, 16, &pieces).unwrap());
        assert!(first == second, "{}: two runs differ", fixture.name);
    });
}
