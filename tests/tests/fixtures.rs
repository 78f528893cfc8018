//! Every fixture on the oracle, against what HF transformers computed in float64.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;

use dsa80_model::checkpoint::Checkpoint;
use dsa80_model::runner::{Rank, RankParts};
use dsa80_reference::SequenceSlice;
use dsa80_reference::cpu::{Cpu, Real, ThreadCommunicator};
use dsa80_tests::bodies;
use dsa80_tests::distance::{LogprobDelta, largest};
use dsa80_tests::fixture::{self, Fixture};
use dsa80_tests::judge::{self, BF16_BOUND, limits};
use dsa80_tests::layers::FirstLatents;
use dsa80_tests::pool::{PAGE_SIZE, Pool};
use dsa80_tests::prompt::{self, Run};

fn load<F: Real>(fixture: &Fixture, page_size: usize) -> Rank<Cpu<F>> {
    judge::load(Cpu::new(), fixture, page_size).unwrap()
}

#[test]
fn the_prompt_in_one_piece_and_in_chunks() {
    for fixture in fixture::all().unwrap() {
        bodies::exact_in_pieces(Cpu::<f32>::new(), &fixture, &bodies::ways(&fixture));
    }
}

#[test]
fn a_prefill_and_then_decodes_on_pages_of_every_size() {
    for fixture in fixture::all().unwrap() {
        let len = fixture.tokens.len();
        for page_size in [1, 3, 64] {
            let mut rank = load::<f32>(&fixture, page_size);
            let mut pieces = prompt::pieces(len / 2, len);
            pieces.extend((len / 2..len).map(|position| position..position + 1));
            let pages = prompt::scattered_pages(&limits(&fixture, page_size), 1);
            let run = prompt::run(&mut rank, &fixture.tokens, &pages, page_size, &pieces).unwrap();
            judge::exact(&fixture, &format!("pages of {page_size}"), &run).unwrap();
        }
    }
}

#[test]
fn a_cached_prefix_serves_a_second_sequence() {
    for fixture in fixture::all().unwrap() {
        let (len, page_size) = (fixture.tokens.len(), 8);
        let mut rank = load::<f32>(&fixture, page_size);
        let limits = limits(&fixture, page_size);
        let shared_pages = len / 2 / page_size;
        let shared = shared_pages * page_size;
        let first = prompt::scattered_pages(&limits, 0);
        // The second sequence begins on the first one's pages and goes on on its own.
        let mut second = prompt::scattered_pages(&limits, 2);
        second[..shared_pages].copy_from_slice(&first[..shared_pages]);

        let prefix = prompt::pieces(shared, shared);
        let mut run = prompt::run(&mut rank, &fixture.tokens[..shared], &first, page_size, &prefix).unwrap();
        let rest = std::iter::once(shared..len).collect::<Vec<_>>();
        let rest = prompt::run(&mut rank, &fixture.tokens, &second, page_size, &rest).unwrap();
        run.logits.extend(rest.logits);
        for (layer, indices) in rest.selections {
            run.selections.entry(layer).or_default().extend(indices);
        }
        judge::exact(&fixture, "cached prefix", &run).unwrap();
    }
}

#[test]
fn a_ragged_batch_beside_other_sequences() {
    for fixture in fixture::all().unwrap() {
        let (len, page_size) = (fixture.tokens.len(), 16);
        let mut rank = load::<f32>(&fixture, page_size);
        let limits = limits(&fixture, page_size);
        let pages: Vec<_> = (0..3).map(|sequence| prompt::scattered_pages(&limits, sequence)).collect();
        let reversed: Vec<u32> = fixture.tokens.iter().rev().copied().collect();
        let mut run = Run::default();
        for (index, piece) in prompt::pieces(len, 33).into_iter().enumerate() {
            // A decode before it, an empty sequence and a longer chunk after it.
            let watched = &fixture.tokens[piece.clone()];
            let slices = [
                SequenceSlice { token_ids: &reversed[index..=index], computed_len: index, pages: &pages[0] },
                SequenceSlice { token_ids: watched, computed_len: piece.start, pages: &pages[1] },
                SequenceSlice { token_ids: &[], computed_len: 0, pages: &[] },
                SequenceSlice { token_ids: &reversed[..40], computed_len: 0, pages: &pages[2] },
            ];
            prompt::step(&mut rank, page_size, &slices, 1, &mut run).unwrap();
        }
        judge::exact(&fixture, "ragged batch", &run).unwrap();
    }
}

#[test]
fn greedy_tokens_are_hfs_where_its_margin_is_clear() {
    for fixture in fixture::all().unwrap() {
        bodies::greedy_tokens(Cpu::<f32>::new(), &fixture);
    }
}

#[test]
fn the_oracle_in_f64_is_hf_in_f64() {
    for fixture in fixture::all().unwrap() {
        let mut rank = load::<f64>(&fixture, 16);
        let pages = prompt::scattered_pages(&limits(&fixture, 16), 0);
        let len = fixture.tokens.len();
        let run = prompt::run(&mut rank, &fixture.tokens, &pages, 16, &prompt::pieces(len, len)).unwrap();
        let delta = LogprobDelta::new(&run.logits, &fixture.logits, &fixture.tokens);
        // The golden logits are stored in float32: half an ulp of a logit of magnitude 8 is 2.4e-7, twice in
        // a difference.
        assert!(largest(&delta.worst) <= 1e-6, "{}: {:e}", fixture.name, largest(&delta.worst));
    }
}

#[test]
fn the_oracle_rounding_to_bf16_is_about_as_far_as_hf_in_bf16() {
    for fixture in fixture::all().unwrap() {
        let mut rank = judge::load(Cpu::<f32>::rounding_to_bf16(), &fixture, PAGE_SIZE).unwrap();
        let pool = Pool::open(&fixture).unwrap();
        let distance = pool.distance(&mut rank, &fixture, pool.len()).unwrap();
        distance.assert_within(BF16_BOUND, &fixture.name, "all prompts");
    }
}

/// So what bf16 is judged by is right: two implementations say the same of it.
#[test]
fn the_oracle_in_f64_computes_what_hf_does_of_further_prompts() {
    for fixture in fixture::all().unwrap() {
        let mut rank = load::<f64>(&fixture, PAGE_SIZE);
        let pool = Pool::open(&fixture).unwrap();
        let worst = largest(&pool.deltas(&mut rank, &fixture, pool.len()).unwrap());
        println!("{:>20}: worst {worst:.1e} in {} prompts", fixture.name, pool.len());
        assert!(pool.len() >= 32 && worst <= 1e-6, "{}: {worst:e}", fixture.name);
    }
}

#[test]
fn every_rank_count_that_divides_gives_the_same() {
    let mut degrees = std::collections::BTreeSet::new();
    for fixture in fixture::all().unwrap() {
        let checkpoint = Arc::new(Checkpoint::open(&fixture.dir).unwrap());
        let mut alone = None;
        for world_size in [1, 2, 4, 8] {
            if let Err(refusal) = checkpoint.config().check_tp(world_size) {
                println!("{}: TP = {world_size} left out: {refusal}", fixture.name);
                continue;
            }
            degrees.insert(world_size);
            let runs = on_ranks(&fixture, &checkpoint, world_size);
            for run in &runs[1..] {
                assert!(run == &runs[0], "{}: TP = {world_size}: ranks differ", fixture.name);
            }
            let (run, latents) = &runs[0];
            judge::exact(&fixture, &format!("TP = {world_size}"), run).unwrap();
            let (alone, whole) = alone.get_or_insert_with(|| (run.logits.clone(), latents.clone()));
            // Who multiplies a column makes no difference to it.
            assert!(latents == whole, "{}: TP = {world_size}: q_a and kv_a differ", fixture.name);
            let delta = LogprobDelta::new(&run.logits, alone, &fixture.tokens);
            let worst = largest(&delta.worst);
            assert!(worst <= 1e-4, "{}: TP = {world_size} against TP = 1: {worst:e}", fixture.name);
        }
    }
    assert_eq!(degrees.into_iter().collect::<Vec<_>>(), [1, 2, 4, 8], "degrees that some fixture runs at");
}

/// Runs the fixture's prompt on `world_size` threads, and looks at what they gather in the first layer.
fn on_ranks(fixture: &Fixture, checkpoint: &Checkpoint, world_size: usize) -> Vec<(Run, FirstLatents)> {
    let limits = limits(fixture, 16);
    let pages = prompt::scattered_pages(&limits, 0);
    let pieces = prompt::pieces(fixture.tokens.len(), 64);
    let cpu = Cpu::<f32>::new();
    let ranks = ThreadCommunicator::group(cpu, world_size).into_iter();
    let ranks = ranks.map(|rank| RankParts { kernels: cpu, communicator: Box::new(rank) as _ });
    bodies::on_ranks(checkpoint, &limits, ranks.collect(), |rank| {
        let run = prompt::run(rank, &fixture.tokens, &pages, 16, &pieces).unwrap();
        let few = &fixture.tokens[..pieces[0].end];
        (run, FirstLatents::of(rank, few, &pages, 16).unwrap())
    })
}
