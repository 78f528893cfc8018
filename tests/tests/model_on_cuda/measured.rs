//! What `dsa80 bench` measures of ranks with a device each, in emulation: that it runs, from graphs, and that what is measured is right.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use dsa80_cuda::all_reduce::AllReduceTiles;
use dsa80_cuda::communicator::PATIENCE;
use dsa80_cuda::{Cuda, Device, PeerCommunicator, Placement, Tiles};
use dsa80_model::checkpoint::{Checkpoint, Shard};
use dsa80_model::measure::{Measured, MeasuredRanks, Summed, greedy_step, time_gathers, time_sums};
use dsa80_model::runner::{INDEX_LOGITS, Rank, RankParts};
use dsa80_reference::{Batch, SequenceSlice, SomeRanks};
use dsa80_tests::fixture::{self, Fixture};
use dsa80_tests::judge;
use dsa80_tests::parity::{TestDevice, devices};

type Parts = RankParts<Cuda<Arc<TestDevice>>>;

/// Two ranks with a device each.
fn peers() -> Option<Vec<Parts>> {
    let devices = (0..2).map(|_| devices::emulator().map(Arc::new)).collect::<Option<Vec<_>>>()?;
    let tiles = AllReduceTiles::safe();
    let ranks = PeerCommunicator::group(devices.clone(), tiles, Placement::Apart, PATIENCE).unwrap();
    let part = |(device, rank): (Arc<TestDevice>, PeerCommunicator<_>)| {
        let tiles = Tiles::for_gpu(&device.limits().name, None).unwrap();
        RankParts { kernels: Cuda::new(device, tiles), communicator: Box::new(rank) as _ }
    };
    Some(devices.into_iter().zip(ranks).map(part).collect())
}

#[test]
fn sums_from_graphs_are_right_on_both_ranks_and_each_time() {
    for summed in [Summed::Alone, Summed::WithNorm] {
        let Some(mut ranks) = peers() else { return };
        let sizes = time_sums(&mut ranks, summed, &[1, 5], 128, 2, true).unwrap();
        assert_eq!(sizes.len(), 2);
        for size in sizes {
            assert!(size.in_a_graph && size.us.len() == 2 && size.us.iter().all(|&us| us > 0.0), "{size:?}");
            assert!(size.check.holds() && size.check.worst > 0.0, "{size:?}");
            assert_eq!(size.fused, summed == Summed::WithNorm);
        }
    }
}

#[test]
fn gatherings_from_graphs_are_right_on_both_ranks_and_each_time() {
    let Some(mut ranks) = peers() else { return };
    for size in time_gathers(&mut ranks, &[1, 5], &[128, 48], 2, true).unwrap() {
        assert!(size.in_a_graph && size.us.len() == 2 && size.us.iter().all(|&us| us > 0.0), "{size:?}");
        assert!(size.check.holds() && size.check.worst == 0.0, "{size:?}");
    }
}

/// Ranks 2 and 3 of eight.
#[test]
fn steps_of_two_ranks_of_eight_are_timed_with_and_without_their_collectives() {
    let Some(parts) = peers() else { return };
    let fixture = Fixture::open(fixture::root().join("cases/int4_asym_g32_tp8")).unwrap();
    let checkpoint = Checkpoint::open(&fixture.dir).unwrap();
    let limits = judge::limits(&fixture, 16);
    let silent = Arc::<AtomicBool>::default();
    let first = Shard { rank: 2, world_size: 8 };
    let load = |RankParts { kernels, communicator }: Parts| {
        let rank = SomeRanks::new(communicator, first.rank, first.world_size, Arc::clone(&silent)).unwrap();
        let mut rank = Rank::load(kernels, Box::new(rank), &checkpoint, &limits, INDEX_LOGITS).unwrap();
        rank.stand_in_for_others().unwrap();
        rank
    };
    let ranks = parts.into_iter().map(load).collect();
    let silent = Arc::clone(&silent);
    let watches = Vec::new();
    let mut measured =
        Measured { ranks, first, limits, act_bytes: 2, silent, own_collectives: true, watches };
    let tokens: Vec<u32> = (0..6).map(|i| (limits.vocab_size / 4 + i) as u32).collect();
    for new in [1, 6] {
        let slice = SequenceSlice { token_ids: &tokens[6 - new..], computed_len: 6 - new, pages: &[0] };
        let batch = Batch::new(16, &[slice]).unwrap();
        measured.fill(&batch).unwrap();
        assert!(!measured.see(&batch).unwrap().experts.is_empty());
        let times = measured.time(&greedy_step(batch, [new - 1]), 2, true).unwrap();
        for us in [&times.step_us, &times.device_us, &times.alone_us] {
            assert!(us.len() == 2 && us.iter().all(|&us| us > 0.0), "{new} new: {times:?}");
        }
        for collective in ["all_reduce", "all_gather"] {
            let mut kernels = times.kernels.iter().filter(|kernel| kernel.name.starts_with(collective));
            assert!(kernels.next().is_some(), "{new} new: no {collective} in {times:?}");
        }
        assert!(
            times.kernels.iter().all(|kernel| kernel.us.iter().all(|&us| us > 0.0)),
            "{new} new: {times:?}"
        );
    }
}
