//! Every fixture against HF transformers in float64, on the scale of HF's own bfloat16.

use std::collections::BTreeMap;
use std::sync::Mutex;

use dsa80_tests::fixture::Fixture;
use dsa80_tests::judge::{self, Bf16Distance, limits};
use dsa80_tests::prompt::{self, Run};

use super::every_fixture_on_a_gpu;

/// The distances of all fixtures, by the way in which the prompt was run.
#[derive(Default)]
struct Distances(Mutex<BTreeMap<String, Vec<(String, Bf16Distance)>>>);

impl Distances {
    fn add(&self, fixture: &Fixture, way: &str, run: &Run) {
        let distance = Bf16Distance::of(fixture, way, run);
        self.0.lock().unwrap().entry(way.to_owned()).or_default().push((fixture.name.clone(), distance));
    }

    fn judge(self) {
        for (way, distances) in self.0.into_inner().unwrap() {
            judge::assert_as_bf16(&way, &distances);
        }
    }
}

#[test]
fn in_one_piece_in_chunks_and_token_by_token() {
    let distances = Distances::default();
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
            distances.add(fixture, way, &run);
        }
    });
    distances.judge();
}

#[test]
fn a_prefill_and_then_decodes_on_pages_of_every_size() {
    let distances = Distances::default();
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
            distances.add(fixture, &format!("pages of {page_size}"), &run);
        }
    });
    distances.judge();
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
