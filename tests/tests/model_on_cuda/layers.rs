//! Layer by layer against the oracle, its choices forced.

use std::ops::Range;

use dsa80_cuda::{Cuda, Device};
use dsa80_model::checkpoint::Checkpoint;
use dsa80_model::engine::StepLimits;
use dsa80_model::runner::WeightSource;
use dsa80_reference::cpu::Cpu;
use dsa80_reference::{Batch, SequenceSlice};
use dsa80_tests::fixture::Fixture;
use dsa80_tests::glm;
use dsa80_tests::judge::{self, limits};
use dsa80_tests::layers::{Forced, Trace, relative_l2};
use dsa80_tests::parity::oracle;
use dsa80_tests::prompt;

use super::every_fixture_on_a_gpu;

/// What the residual stream may be off the oracle with the same rounding points after the last layer. Five layers have been 9e-3 off: of
/// two values that differ by a share of an ulp as large a share of the roundings goes to different sides, so that after a few of them the
/// errors of both are independent.
const RELATIVE_L2: f64 = 1e-2;
/// How many times as far from what is exact as that oracle it may be: tensor cores round the probabilities as well, and a step has but a
/// few hundred numbers.
const FROM_EXACT: f64 = 1.25;

/// Runs the first `tokens` of the prompt in three steps, and compares after every layer of each.
pub(super) fn compare<D: Device>(cuda: Cuda<D>, fixture: &Fixture, tokens: usize) {
    let limits = limits(fixture, PAGE_SIZE);
    let pieces = prompt::pieces(tokens, tokens.div_ceil(3));
    let checkpoint = Checkpoint::open(&fixture.dir).unwrap();
    compare_steps(cuda, &fixture.name, &checkpoint, &limits, &fixture.tokens, &pieces);
}

const PAGE_SIZE: usize = 16;

fn compare_steps<D: Device>(
    cuda: Cuda<D>,
    name: &str,
    weights: &dyn WeightSource,
    limits: &StepLimits,
    tokens: &[u32],
    pieces: &[Range<usize>],
) {
    let mut rounding = judge::load_weights(oracle(), weights, limits).unwrap();
    let mut exact = judge::load_weights(Cpu::<f64>::new(), weights, limits).unwrap();
    let mut rank = judge::load_weights(cuda, weights, limits).unwrap();
    let pages = prompt::scattered_pages(limits, 1);
    for piece in pieces {
        let token_ids = &tokens[piece.clone()];
        let slice = SequenceSlice { token_ids, computed_len: piece.start, pages: &pages };
        let batch = Batch::new(PAGE_SIZE, &[slice]).unwrap();
        let mut expected = Trace::default();
        rounding.forward(&batch, Some(&mut expected)).unwrap();
        let (mut unrounded, mut found) = (Forced::new(&expected), Forced::new(&expected));
        exact.forward(&batch, Some(&mut unrounded)).unwrap();
        rank.forward(&batch, Some(&mut found)).unwrap();

        let by_layer = relative_l2(&found.hidden, &expected.hidden);
        let last = |distances: Vec<f64>| distances[distances.len() - 1];
        let from_exact = last(relative_l2(&found.hidden, &unrounded.hidden));
        let own = last(relative_l2(&expected.hidden, &unrounded.hidden));
        let words: Vec<String> = by_layer.iter().map(|distance| format!("{distance:.1e}")).collect();
        let place = format!("{name:>20} {piece:?}");
        println!(
            "{place}: by layer {}; from exact {from_exact:.1e}, the oracle's {own:.1e}",
            words.join(" ")
        );
        assert!(from_exact <= FROM_EXACT * own, "{place}");
        assert!(last(by_layer) <= RELATIVE_L2, "{place}");
    }
}

/// The shapes that the kernels were made for: many tokens, few, and one.
#[test]
fn a_shard_of_glm_is_the_oracles_within_rounding() {
    let Some(cuda) = super::on_gpu() else { return };
    let (weights, limits) = (glm::shard(8, 64, 1000), prompt::limits(176, PAGE_SIZE, 1000));
    let tokens: Vec<u32> = (0..161).map(|i| i * 7919 % 1000).collect();
    let pieces = [0..130, 130..154, 154..160, 160..161];
    compare_steps(cuda, "GLM-5.2, a shard", &weights, &limits, &tokens, &pieces);
}

#[test]
fn every_layer_is_the_oracles_within_rounding() {
    every_fixture_on_a_gpu(|cuda, fixture| compare(cuda, fixture, fixture.tokens.len()));
}
