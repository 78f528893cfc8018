//! Every fixture against HF transformers in float64, on the scale of HF's own bfloat16.

use dsa80_tests::bodies::{in_pieces, prefill_then_decodes, prompts_together, two_runs};

use super::emulated::ALWAYS;
use super::{every_fixture_on_a_gpu, on_gpu};

#[test]
fn all_prompts_together_are_as_close_to_hf_as_hf_in_bf16() {
    every_fixture_on_a_gpu(|cuda, fixture| prompts_together(cuda, fixture, 32));
}

#[test]
fn expanded_in_one_piece_and_in_chunks() {
    every_fixture_on_a_gpu(|cuda, fixture| {
        let ways = [("expanded in one piece", fixture.tokens.len()), ("expanded in chunks of 37", 37)];
        in_pieces(cuda.with_expansion(ALWAYS), fixture, &ways);
    });
}

#[test]
fn in_one_piece_in_chunks_and_token_by_token() {
    every_fixture_on_a_gpu(|cuda, fixture| {
        let len = fixture.tokens.len();
        let ways = [("one piece", len), ("chunks of 64", 64), ("chunks of 7", 7), ("token by token", 1)];
        in_pieces(cuda, fixture, &ways);
    });
}

#[test]
fn a_prefill_and_then_decodes_on_pages_of_every_size() {
    every_fixture_on_a_gpu(|cuda, fixture| {
        prefill_then_decodes(cuda, fixture, 3);
        prefill_then_decodes(on_gpu().unwrap(), fixture, 64);
    });
}

#[test]
fn two_runs_are_the_same_to_the_bit() {
    every_fixture_on_a_gpu(two_runs);
}
