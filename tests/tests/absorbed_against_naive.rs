//! The serving path (absorbed MLA, paged caches, selected rows, chunks) against a naive dense masked model,
//! on random configurations: 256 of them, or as many as `PROPTEST_CASES` says.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use dsa80_model::runner::Rank;
use dsa80_reference::cpu::{Cpu, ThreadCommunicator};
use dsa80_tests::random_model::{RandomModel, random_model};
use dsa80_tests::{naive, prompt};
use proptest::prelude::*;

fn check(
    model: &RandomModel,
    tokens: &[u32],
    page_size: usize,
    chunk: usize,
    index_logits: usize,
) -> Result<(), TestCaseError> {
    let expected = naive::forward(model, tokens);
    // Two choices within rounding of each other may fall either way. Exact ties (relu's zeros) may not.
    prop_assume!(expected.narrowest > 1e-9);

    let limits = prompt::limits(tokens.len(), page_size, model.config.vocab_size);
    let communicator = ThreadCommunicator::group(Cpu::<f64>::new(), 1).remove(0);
    let mut rank = Rank::load(Cpu::new(), Box::new(communicator), model, &limits, index_logits).unwrap();
    let pages = prompt::scattered_pages(&limits, 1);
    let pieces = prompt::pieces(tokens.len(), chunk);
    let run = prompt::run(&mut rank, tokens, &pages, page_size, &pieces).unwrap();

    for (layer, expected) in &expected.selections {
        let rows = run.selections[layer].chunks(model.config.index_topk);
        for (t, (found, expected)) in rows.zip(expected).enumerate() {
            let mut found: Vec<usize> =
                found.iter().filter_map(|&index| usize::try_from(index).ok()).collect();
            found.sort_unstable();
            prop_assert_eq!(&found, expected, "layer {}, position {}", layer, t);
        }
    }
    for (t, (found, expected)) in run.logits.chunks(model.config.vocab_size).zip(&expected.logits).enumerate()
    {
        let scale = expected.iter().fold(1.0, |a: f64, b| a.max(b.abs()));
        for (found, expected) in found.iter().zip(expected) {
            prop_assert!(
                (found - expected).abs() <= 1e-9 * scale,
                "position {}: {} for {}",
                t,
                found,
                expected
            );
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn absorbed_paged_sparse_is_naive_dense_masked(
        model in random_model(),
        tokens in proptest::collection::vec(0..19u32, 1..40),
        page_size in 1..9usize,
        chunk in 1..41usize,
        index_logits in 0..800usize,
    ) {
        check(&model, &tokens, page_size, chunk, index_logits)?;
    }
}
