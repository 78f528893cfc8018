//! What `all_reduce` takes between GPUs, replayed as a graph. Prints; a GPU machine with one GPU has nothing to print.

use std::sync::{Arc, Barrier};
use std::time::Duration;

use dsa80_cuda::all_reduce::{AllReduceTile, Shots, all_reduce_in};
use dsa80_cuda::exchange::{self, Exchange, ExchangeDims};
use dsa80_cuda::{CudaTensor, Device, Gpu, GpuBuffer};
use dsa80_reference::DType;
use dsa80_tests::parity::devices;

const IN_A_GRAPH: usize = 20;
const REPLAYS: usize = 12;

/// The median over replays of the microseconds of one `all_reduce` on the slowest GPU.
fn measure(gpus: &[Gpu], tokens: usize, shots: Shots, tile: AllReduceTile) -> f64 {
    let dims = ExchangeDims::new(gpus.len()).unwrap();
    let workspaces: Vec<GpuBuffer> =
        gpus.iter().map(|gpu| exchange::alloc_workspace(gpu, dims).unwrap()).collect();
    let barrier = Arc::new(Barrier::new(gpus.len()));
    let of_gpu = |rank: usize, gpu: &Gpu| {
        let exchange = Exchange {
            dims,
            workspaces: workspaces.clone(),
            first_rank: rank,
            patience: Duration::from_secs(5),
        };
        let data = [CudaTensor::alloc(gpu, "data", DType::Act, &[tokens, 6144]).unwrap()];
        gpu.write(data[0].buffer(), 0, &vec![0; tokens * 6144 * 2]).unwrap();
        let run = || all_reduce_in(shots, gpu, &tile, &exchange, &data);
        run().unwrap();
        gpu.synchronize().unwrap();
        let graph = gpu.capture(|| (0..IN_A_GRAPH).try_for_each(|_| run())).unwrap();
        barrier.wait();
        let times = gpu.time(REPLAYS, || graph.launch()).unwrap();
        let failed = exchange::failure(gpu, &exchange.workspaces[rank], exchange.patience).unwrap();
        assert_eq!(failed, None);
        barrier.wait();
        let mut times = times[2..].to_vec();
        times.sort_by(f64::total_cmp);
        times[times.len() / 2] / IN_A_GRAPH as f64
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = gpus
            .iter()
            .enumerate()
            .map(|(rank, gpu)| {
                let of_gpu = &of_gpu;
                scope.spawn(move || of_gpu(rank, gpu))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).fold(0.0, f64::max)
    })
}

#[test]
fn microseconds_between_gpus() {
    let gpus = devices::gpus();
    for ranks in [2, 4, 8].into_iter().filter(|&ranks| ranks <= gpus.len()) {
        for tokens in [1, 32, 256, 2048] {
            for shots in [Shots::One, Shots::Two] {
                let mut words = Vec::new();
                for threads in [128, 256, 512] {
                    for blocks in [16, 32, 64] {
                        let us = measure(&gpus[..ranks], tokens, shots, AllReduceTile { threads, blocks });
                        words.push(format!("{threads}x{blocks} {us:.1}"));
                    }
                }
                println!("{ranks} GPUs, {tokens} x 6144 bf16, {shots:?}: us {}", words.join(", "));
            }
        }
    }
}
