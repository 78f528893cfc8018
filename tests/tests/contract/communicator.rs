//! The collectives of `Wgpu` between threads.

use dsa80_reference::wgpu::{Wgpu, WgpuCommunicator};
use dsa80_reference::{Communicator, DType, Kernels};
use dsa80_tests::parity::contract;

/// Runs `body` on every rank of a group on one adapter, each on its own thread.
fn on_ranks<R: Send>(wgpu: &Wgpu, ranks: usize, body: impl Fn(Wgpu, WgpuCommunicator) -> R + Sync) -> Vec<R> {
    let backends: Vec<Wgpu> = (0..ranks).map(|_| Wgpu::new(wgpu.context().clone())).collect();
    let communicators = WgpuCommunicator::group(&backends);
    std::thread::scope(|scope| {
        let parts = backends.into_iter().zip(communicators);
        let threads: Vec<_> = parts.map(|(wgpu, rank)| scope.spawn(|| body(wgpu, rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn sums_are_rounded_once_and_equal_on_all_ranks() {
    contract::on_wgpu(|wgpu| {
        let sums = on_ranks(wgpu, 4, |wgpu, communicator| {
            let rank = communicator.rank() as f64;
            [DType::Act, DType::Float].map(|dtype| {
                let mut tensor = wgpu.alloc(dtype, &[3]).unwrap();
                // What a rank has launched is part of what it gives.
                let (mut gate, mut up) =
                    (wgpu.alloc(DType::Act, &[1, 2]).unwrap(), wgpu.alloc(DType::Act, &[1, 2]).unwrap());
                wgpu.write(&[100.0, 100.0], &mut gate).unwrap();
                wgpu.write(&[rank, rank], &mut up).unwrap();
                wgpu.write(&[256.0, rank, 0.5], &mut tensor).unwrap();
                let mut launched = wgpu.alloc(DType::Act, &[1, 2]).unwrap();
                wgpu.silu_mul(&gate, &up, &mut launched).unwrap();
                communicator.all_reduce(&mut tensor).unwrap();
                communicator.all_reduce(&mut launched).unwrap();
                (wgpu.read(&tensor).unwrap(), wgpu.read(&launched).unwrap())
            })
        });
        for of_rank in sums {
            for (sum, launched) in of_rank {
                assert_eq!((sum, launched), (vec![1024.0, 6.0, 2.0], vec![600.0, 600.0]));
            }
        }
    });
}

#[test]
fn shards_are_gathered_by_columns_and_one_rank_tells_the_others() {
    contract::on_wgpu(|wgpu| {
        let all = on_ranks(wgpu, 2, |wgpu, communicator| {
            let rank = communicator.rank() as f64;
            let mut shard = wgpu.alloc(DType::Float, &[2, 2]).unwrap();
            wgpu.write(&[1.0, 2.0, 3.0, 4.0].map(|x| 10.0 * rank + x), &mut shard).unwrap();
            let mut out = wgpu.alloc(DType::Float, &[2, 4]).unwrap();
            communicator.all_gather(&shard, &mut out).unwrap();
            communicator.broadcast(&mut shard, 1).unwrap();
            communicator.barrier().unwrap();
            assert!(
                communicator.broadcast(&mut shard, 2).unwrap_err().to_string().contains("a rank below 2")
            );
            (wgpu.read(&out).unwrap(), wgpu.read(&shard).unwrap())
        });
        for (gathered, told) in all {
            assert_eq!(gathered, [1.0, 2.0, 11.0, 12.0, 3.0, 4.0, 13.0, 14.0]);
            assert_eq!(told, [11.0, 12.0, 13.0, 14.0]);
        }
    });
}

#[test]
fn a_rank_that_gives_up_breaks_the_others_off() {
    contract::on_wgpu(|wgpu| {
        let outcomes = on_ranks(wgpu, 2, |wgpu, communicator| {
            if communicator.rank() == 1 {
                communicator.abort("out of pages");
                return None;
            }
            let mut tensor = wgpu.alloc(DType::Float, &[1]).unwrap();
            Some(communicator.all_reduce(&mut tensor).unwrap_err().to_string())
        });
        assert!(outcomes[0].as_ref().unwrap().contains("rank 1: out of pages"), "{outcomes:?}");
    });
}
