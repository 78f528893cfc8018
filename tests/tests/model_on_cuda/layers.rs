//! Layer by layer against the oracle, its choices forced.

use dsa80_tests::bodies::{layer_by_layer, layers_of_steps};
use dsa80_tests::pool::PAGE_SIZE;
use dsa80_tests::{glm, prompt};

use super::every_fixture_on_a_gpu;

/// The shapes that the kernels were made for: many tokens, few, and one.
#[test]
fn a_shard_of_glm_is_the_oracles_within_rounding() {
    let Some(cuda) = super::on_gpu() else { return };
    let (weights, limits) = (glm::shard(8, 64, 1000), prompt::limits(176, PAGE_SIZE, 1000));
    let tokens: Vec<u32> = (0..161).map(|i| i * 7919 % 1000).collect();
    let pieces = [0..130, 130..154, 154..160, 160..161];
    layers_of_steps(cuda, "GLM-5.2, a shard", &weights, &limits, &tokens, &pieces);
}

#[test]
fn every_layer_is_the_oracles_within_rounding() {
    every_fixture_on_a_gpu(|cuda, fixture| layer_by_layer(cuda, fixture, fixture.tokens.len()));
}
