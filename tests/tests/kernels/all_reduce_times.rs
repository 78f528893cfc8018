//! What the collectives take between GPUs, replayed as graphs. Prints; a GPU machine with one GPU has nothing to print.

use std::sync::Arc;

use dsa80_cuda::all_gather::{Gathered, all_gather};
use dsa80_cuda::all_reduce::{AllReduceTile, AllReduceTiles, Shots, all_reduce_in};
use dsa80_cuda::all_reduce_norm::{AllReduceNormTile, AllReduceNormTiles};
use dsa80_cuda::crossover::{self, Summed, WIDTH, microseconds, zeros};
use dsa80_cuda::rms_norm::{RmsNormDims, RmsNormTile, rms_norm_residual};
use dsa80_cuda::{Device, Gpu, Tiles};
use dsa80_reference::DType;
use dsa80_tests::parity::devices;

/// Groups of 2, 4 and 8 of the GPUs that there are.
fn groups() -> Vec<Vec<Arc<Gpu>>> {
    let gpus: Vec<Arc<Gpu>> = devices::gpus().into_iter().map(Arc::new).collect();
    [2, 4, 8].into_iter().filter(|&ranks| ranks <= gpus.len()).map(|ranks| gpus[..ranks].to_vec()).collect()
}

const SHOTS: [Shots; 2] = [Shots::One, Shots::Two];

#[test]
fn microseconds_between_gpus() {
    let _alone = devices::one_group_at_a_time();
    for gpus in groups() {
        let ranks = gpus.len();
        for rows in [1, 32, 256, 2048] {
            for shots in SHOTS {
                let mut words = Vec::new();
                for (threads, blocks) in [(256, 64), (512, 32), (512, 64)] {
                    let tile = AllReduceTile { threads, blocks };
                    let tiles = AllReduceTiles { one_shot: tile, two_shots: tile, ..AllReduceTiles::safe() };
                    let us = crossover::time(&gpus, Summed::Alone, shots, &tiles, rows).unwrap();
                    words.push(format!("{threads}x{blocks} {us:.1}"));
                }
                println!("{ranks} GPUs, {rows} x 6144 bf16, alone, {shots:?}: us {}", words.join(", "));
                let mut words = Vec::new();
                for (vectors, blocks) in [(1, 32), (1, 64), (2, 64)] {
                    let tile = AllReduceNormTile { vectors, blocks };
                    let norm = AllReduceNormTiles { one_shot: tile, two_shots: tile };
                    let tiles = AllReduceTiles { norm, ..AllReduceTiles::safe() };
                    let us = crossover::time(&gpus, Summed::WithNorm, shots, &tiles, rows).unwrap();
                    words.push(format!("{vectors}x{blocks} {us:.1}"));
                }
                println!("{ranks} GPUs, {rows} x 6144 bf16, with norm, {shots:?}: us {}", words.join(", "));
            }
        }
    }
}

/// A sum and a norm in a launch of their own; q_a and kv_a gathered.
#[test]
fn microseconds_of_what_could_be_instead() {
    let _alone = devices::one_group_at_a_time();
    for gpus in groups() {
        let ranks = gpus.len();
        let limits = gpus[0].limits().clone();
        let tiles = Tiles::for_gpu(&limits.name, None).unwrap();
        for rows in [1, 4, 32, 256, 2048, 4096] {
            let class = RmsNormTile::class(rows, &limits);
            let tile: RmsNormTile = tiles.tile(class, RmsNormDims { width: WIDTH }, &limits);
            let pair = |shots| {
                microseconds(&gpus, |gpu, exchange| {
                    let x = [zeros(gpu, DType::Act, &[rows, WIDTH])?];
                    let residual = zeros(gpu, DType::Float, &[rows, WIDTH])?;
                    let weight = zeros(gpu, DType::Bf16, &[WIDTH])?;
                    let out = zeros(gpu, DType::Act, &[rows, WIDTH])?;
                    let tensors = std::cell::RefCell::new((residual, out));
                    let of_sum = AllReduceTiles::safe().of(shots);
                    Ok(Box::new(move || {
                        let (residual, out) = &mut *tensors.borrow_mut();
                        all_reduce_in(shots, gpu, &of_sum, &exchange, &x)?;
                        rms_norm_residual(gpu, &tile, &x[0], residual, &weight, 1e-5, out)
                    }))
                })
                .unwrap()
            };
            let pair = SHOTS.map(pair);
            let gather = microseconds(&gpus, |gpu, exchange| {
                let act = |columns| Ok([zeros(gpu, DType::Act, &[rows, columns])?]);
                let [q_a, kv_a, whole_q_a, whole_kv_a] = [2048 / ranks, 576 / ranks, 2048, 576].map(act);
                let (q_a, kv_a, whole_q_a, whole_kv_a) = (q_a?, kv_a?, whole_q_a?, whole_kv_a?);
                Ok(Box::new(move || {
                    let q_a = Gathered { shards: &q_a, outs: &whole_q_a };
                    all_gather(gpu, &exchange, &[q_a, Gathered { shards: &kv_a, outs: &whole_kv_a }])
                }))
            })
            .unwrap();
            println!(
                "{ranks} GPUs, {rows} rows: sum then norm {:.1} us in one shot, {:.1} in two; all_gather of 2048 and 576 columns {gather:.1} us",
                pair[0], pair[1]
            );
        }
    }
}

/// What ranks measure when they start, where nothing is pinned: says it, and that it is no size where the other way is quicker by far.
#[test]
fn the_measured_crossover_is_the_quicker_way() {
    let _alone = devices::one_group_at_a_time();
    for gpus in groups() {
        let tiles = Tiles::for_gpu(&gpus[0].limits().name, None).unwrap().all_reduce(gpus[0].limits());
        let started = std::time::Instant::now();
        let at = crossover::measure(&gpus, &tiles).unwrap();
        println!("{} GPUs: {at:?}, measured in {:?}", gpus.len(), started.elapsed());
        let tiles = AllReduceTiles { crossover: Some(at), ..tiles };
        for rows in [1, 64, 2048] {
            for summed in [Summed::Alone, Summed::WithNorm] {
                let bytes = rows * WIDTH * 2;
                let chosen = match summed {
                    Summed::Alone => tiles.shots(bytes, gpus.len()),
                    Summed::WithNorm => tiles.shots_of_norm(bytes, gpus.len()),
                };
                let times = SHOTS.map(|shots| crossover::time(&gpus, summed, shots, &tiles, rows).unwrap());
                let of_chosen = times[usize::from(chosen == Shots::Two)];
                assert!(of_chosen <= 1.3 * times[0].min(times[1]), "{summed:?} of {rows} rows: {times:?}");
            }
        }
    }
}
