//! Blocks that wait for each other.

use dsa80_cuda::Arg;

use crate::snippet::Snippet;

/// Every block waits for all others, more often than there are processors.
#[test]
fn blocks_that_meet_are_all_resident() {
    let source = "KERNEL void kernel(uint32_t* flags, uint32_t* out) {
        for (uint32_t round = 1; round <= 3; ++round) {
            __syncthreads();
            if (threadIdx.x == 0) store_awaited_system(flags + blockIdx.x, round);
            if (threadIdx.x < gridDim.x)
                while (load_awaited_system(flags + threadIdx.x) < round) {}
            __syncthreads();
        }
        if (threadIdx.x == 0) out[blockIdx.x] = blockIdx.x + 1;
    }";
    let Some(snippet) = Snippet::new(source) else { return };
    for seed in 0..2 {
        snippet.emulator.set_seed(seed);
        let (flags, out) = (snippet.buffer("flags", &[0_u32; 12]), snippet.buffer("out", &[0_u32; 12]));
        snippet.launch(12, 32, 0, &[Arg::Buffer(&flags), Arg::Buffer(&out)]).unwrap();
        assert_eq!(snippet.values::<u32>(&flags, 12), [3; 12]);
        assert_eq!(snippet.values::<u32>(&out, 12), (1..=12).collect::<Vec<u32>>());
    }
}

#[test]
fn a_thread_waits_for_another_of_its_warp() {
    let source = "KERNEL void kernel(uint32_t* flags) {
        if (threadIdx.x == 5) while (load_awaited_system(flags) == 0) {}
        if (threadIdx.x == 4) store_awaited_system(flags, 1);
    }";
    let Some(snippet) = Snippet::new(source) else { return };
    let flags = snippet.buffer("flags", &[0_u32]);
    snippet.launch(1, 32, 0, &[Arg::Buffer(&flags)]).unwrap();
}

#[test]
fn launches_of_two_threads_meet() {
    let source = "KERNEL void kernel(uint32_t* flags, int rank) {
        store_awaited_system(flags + rank, 1);
        while (load_awaited_system(flags + 1 - rank) == 0) {}
    }";
    let Some(snippet) = Snippet::new(source) else { return };
    let flags = snippet.buffer("flags", &[0_u32; 2]);
    std::thread::scope(|scope| {
        for rank in 0..2 {
            let (snippet, flags) = (&snippet, &flags);
            scope.spawn(move || snippet.launch(1, 1, 0, &[Arg::Buffer(flags), Arg::I32(rank)]).unwrap());
        }
    });
}

#[test]
fn waiting_in_vain_ends_with_the_launch() {
    let source = "KERNEL void kernel(uint32_t* flags) { while (load_awaited_system(flags) == 0) {} }";
    let Some(mut snippet) = Snippet::new(source) else { return };
    snippet.emulator = snippet.emulator.with_time_limit(1);
    let flags = snippet.buffer("flags", &[0_u32]);
    let error = snippet.launch(2, 1, 0, &[Arg::Buffer(&flags)]).unwrap_err();
    assert!(error.contains("has not ended after 1 s"), "{error}");
}
