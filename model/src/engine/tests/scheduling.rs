//! Several requests at once: who goes when, with which pages, and that nobody notices the others.

use super::*;

/// New tokens of each sequence in step `number`.
fn chunks(bench: &Bench, number: usize) -> Vec<usize> {
    let log = bench.model.log.lock().unwrap();
    log[number].batch.cu_seqlens.windows(2).map(|pair| (pair[1] - pair[0]) as usize).collect()
}

#[test]
fn prompts_are_cut_into_chunks_and_decodes_come_first() {
    let mut bench = Bench::new(limits(), true);
    let mut first = bench.submit(request(2..5, 6));
    bench.step();
    let mut second = bench.submit(request(10..30, 3));
    let mut third = bench.submit(request(30..34, 3));
    bench.drain();
    for client in [&mut first, &mut second, &mut third] {
        client.assert_expected();
    }
    let made: Vec<Vec<usize>> = (0..5).map(|number| chunks(&bench, number)).collect();
    assert_eq!(made, [vec![3], vec![1, 7], vec![1, 7], vec![1, 6, 1], vec![1, 1, 3]]);
}

#[test]
fn equal_requests_get_equal_tokens_in_any_company() {
    let all: Vec<Request> = (0..8).map(|i| request((0..i + 1).map(|j| i * 5 + j), 5 + i as usize)).collect();
    let mut bench = Bench::new(StepLimits { num_pages: 64, ..limits() }, true);
    let mut clients: Vec<Client> = all.iter().map(|request| bench.submit(request.clone())).collect();
    bench.drain();
    for (client, request) in clients.iter_mut().zip(all) {
        assert_eq!(without_cached(client.read()), without_cached(&Bench::alone(limits(), request)));
        client.assert_expected();
    }
    assert!(bench.stats().steps < 30, "they ran together");
}

#[test]
fn when_pages_run_out_the_youngest_goes_back_and_repeats_nothing() {
    // Three requests of 4 + 16 tokens need 5 pages each in the end; there are 8.
    let mut bench = Bench::new(StepLimits { num_pages: 8, ..limits() }, false);
    let mut clients: Vec<Client> = (0..3).map(|i| bench.submit(request(i * 10..i * 10 + 4, 16))).collect();
    let mut finished = Vec::new();
    while bench.step() {
        for (index, client) in clients.iter_mut().enumerate() {
            if client.finish().is_some() && !finished.contains(&index) {
                finished.push(index);
            }
        }
    }
    assert!(bench.stats().preemptions > 0);
    assert_eq!(finished, [0, 1, 2], "in the order in which they came");
    for client in &mut clients {
        client.assert_expected();
    }
    assert_eq!(bench.stats().prompt_tokens, 12, "recomputing is not counted again");
    assert_eq!(bench.stats().pages_used, 0);
}

#[test]
fn a_preempted_request_finds_its_own_pages_again() {
    let run = |prefix_caching| {
        let mut bench = Bench::new(StepLimits { num_pages: 8, ..limits() }, prefix_caching);
        let mut clients: Vec<Client> =
            (0..3).map(|i| bench.submit(request(i * 10..i * 10 + 4, 16))).collect();
        bench.drain();
        clients.iter_mut().for_each(Client::assert_expected);
        assert!(bench.stats().preemptions > 0);
        let log = bench.model.log.lock().unwrap();
        log.iter().map(|step| step.batch.num_tokens()).sum::<usize>()
    };
    assert!(run(true) < run(false), "fewer rows are computed");
}

#[test]
fn a_prompt_is_scored_once_through_preemption() {
    let limits = StepLimits { num_pages: 7, ..limits() };
    for prefix_caching in [false, true] {
        let mut bench = Bench::new(limits, prefix_caching);
        // The first decodes into the pages that the second needs for its prompt.
        let mut first = bench.submit(request(2..6, 20));
        bench.step();
        let mut second = bench.submit(Request { prompt_logprobs: Some(1), ..request(10..28, 2) });
        bench.drain();
        first.assert_expected();
        second.assert_expected();
        let mut first = bench.submit(request(2..6, 20));
        let scoring = Request { prompt_logprobs: Some(1), ..request(10..14, 8) };
        let mut second = bench.submit(scoring.clone());
        let mut third = bench.submit(scoring);
        bench.drain();
        for client in [&mut first, &mut second, &mut third] {
            client.assert_expected();
        }
        assert!(bench.stats().preemptions > 0);
    }
}

#[test]
fn a_known_prefix_is_shared_but_for_the_last_token() {
    let mut bench = Bench::new(limits(), true);
    let mut first = bench.submit(request(2..18, 8));
    bench.step();
    bench.step();
    // The first still runs; its full pages serve the others at once.
    let mut same = bench.submit(request(2..18, 8));
    let mut longer = bench.submit(request(2..22, 8));
    let mut other = bench.submit(request([2, 3, 4, 5, 9, 9, 9, 9, 9], 8));
    bench.step();
    assert!(bench.stats().pages_used < 5 + 5 + 6 + 3, "{:?}", bench.stats());
    bench.drain();
    for (client, cached) in [(&mut first, 0), (&mut same, 12), (&mut longer, 16), (&mut other, 4)] {
        client.assert_expected();
        assert_eq!(client.usage().cached_tokens, cached);
    }
    let stats = bench.stats();
    assert_eq!((stats.cached_tokens, stats.prompt_tokens), (32, 16 + 4 + 4 + 5));
    assert_eq!(stats.pages_used, 0);
    assert!(stats.pages_cached > 0);
}

#[test]
fn generated_tokens_are_a_known_prefix_of_the_next_turn() {
    let mut bench = Bench::new(limits(), true);
    let mut first = bench.submit(request(2..10, 9));
    bench.drain();
    let turn: Vec<u32> = (2..10).chain(first.tokens()).chain([40, 41]).collect();
    let mut second = bench.submit(request(turn, 3));
    bench.drain();
    second.assert_expected();
    // 8 + 9 tokens, of which the last has no rows: four full pages.
    assert_eq!(second.usage().cached_tokens, 16);
}

#[test]
fn cached_pages_give_way_when_room_is_needed() {
    let mut bench = Bench::new(limits(), true);
    for round in 0..6 {
        // Each takes 12 of the 16 pages.
        let mut client = bench.submit(request((0..40).map(|i| (i + round * 7) % 50), 8));
        bench.drain();
        client.assert_expected();
        assert_eq!(client.usage().cached_tokens, 0);
    }
    let stats = bench.stats();
    assert_eq!((stats.pages_used, stats.preemptions), (0, 0));
}

#[test]
fn without_prefix_caching_nothing_is_found_again() {
    let mut bench = Bench::new(limits(), false);
    for _ in 0..2 {
        let mut client = bench.submit(request(2..18, 2));
        bench.drain();
        client.assert_expected();
        assert_eq!(client.usage().cached_tokens, 0);
    }
    assert_eq!((bench.stats().cached_tokens, bench.stats().pages_cached), (0, 0));
}

#[test]
fn a_long_prompt_is_not_starved_by_a_stream_of_short_ones() {
    let mut bench = Bench::new(limits(), false);
    let mut short: Vec<Client> = (0..4).map(|i| bench.submit(request([i + 2], 6))).collect();
    bench.step();
    // 56 of 64 rows: it fits only when nearly all others have left.
    let mut long = bench.submit(request((0..56).map(|i| i % 50), 4));
    let mut steps = 0;
    while long.finish().is_none() {
        // Two newcomers at every step, for ever.
        for token in 10..12 {
            short.push(bench.submit(request([token], 6)));
        }
        assert!(bench.step());
        steps += 1;
        assert!(steps < 40, "the long prompt does not get its turn");
    }
    long.assert_expected();
    bench.drain();
    short.iter_mut().for_each(Client::assert_expected);
}

#[test]
fn decodes_go_on_while_a_long_prompt_is_computed() {
    let mut bench = Bench::new(limits(), false);
    let mut decoding = bench.submit(request([3], 20));
    bench.step();
    let mut long = bench.submit(request((0..40).map(|i| i % 50), 2));
    for made in 2..7 {
        bench.step();
        assert_eq!(decoding.tokens().len(), made, "one token a step");
    }
    bench.drain();
    decoding.assert_expected();
    long.assert_expected();
}

#[test]
fn cancelling_frees_the_pages_before_the_next_step() {
    for hang_up in [false, true] {
        let mut bench = Bench::new(limits(), true);
        let mut running = bench.submit(request(2..10, 20));
        let mut in_prompt = bench.submit(request(10..40, 20));
        bench.step();
        bench.step();
        let mut waiting = bench.submit(request(2..22, 20));
        for client in [&mut running, &mut in_prompt, &mut waiting] {
            if hang_up {
                client.hang_up();
            } else {
                client.cancel();
            }
        }
        assert!(!bench.step());
        let stats = bench.stats();
        assert_eq!((stats.pages_used, stats.running, stats.waiting, stats.cancelled), (0, 0, 0, 3));
        assert!(bench.batching.is_idle());
        assert_eq!(waiting.read(), []);
        assert_eq!(running.finish(), None);
    }
}

#[test]
fn a_single_row_budget_serves_one_after_the_other() {
    let mut bench = Bench::new(StepLimits { max_batch_tokens: 1, ..limits() }, true);
    let mut clients: Vec<Client> = (0..3).map(|i| bench.submit(request(i * 9..i * 9 + 5, 4))).collect();
    while bench.step() {
        assert!(bench.stats().running <= 1, "no more run than have a row in every step");
    }
    clients.iter_mut().for_each(Client::assert_expected);
}

#[test]
fn nothing_is_started_that_would_have_to_go_again_at_once() {
    // The long prompt takes 12 of 16 pages, but only two a step; the short ones need two and then three each.
    let mut bench = Bench::new(limits(), true);
    let mut clients = vec![bench.submit(request(2..48, 3))];
    clients.extend((0..4).map(|i| bench.submit(request(i * 7..i * 7 + 8, 4))));
    bench.step();
    bench.drain();
    assert_eq!(bench.stats().preemptions, 0);
    clients.iter_mut().for_each(Client::assert_expected);
    // Four pages hold both prompts, but not the next row of either.
    let mut bench = Bench::new(StepLimits { num_pages: 4, max_batch_tokens: 16, ..limits() }, true);
    let mut clients: Vec<Client> = (0..2).map(|i| bench.submit(request(i * 8..i * 8 + 8, 4))).collect();
    bench.step();
    assert_eq!(bench.stats().running, 1);
    bench.drain();
    assert_eq!(bench.stats().preemptions, 0);
    clients.iter_mut().for_each(Client::assert_expected);
}

#[test]
fn idle_pages_of_the_own_prefix_are_not_counted_as_room() {
    let mut bench = Bench::new(StepLimits { num_pages: 10, ..limits() }, true);
    let mut first = bench.submit(request(2..26, 1));
    bench.drain();
    assert_eq!(bench.stats().pages_cached, 6);
    // Three pages and one to grow for the one that runs: six are left, and the first's prompt needs seven.
    let mut running = bench.submit(request(30..41, 9));
    bench.step();
    bench.step();
    let mut longer = bench.submit(request(2..28, 4));
    bench.step();
    assert_eq!((bench.stats().running, bench.batching.scheduler.waiting.len()), (1, 1));
    bench.drain();
    assert_eq!(bench.stats().preemptions, 0);
    for client in [&mut first, &mut running, &mut longer] {
        client.assert_expected();
    }
    assert!(longer.usage().cached_tokens > 0);
}
