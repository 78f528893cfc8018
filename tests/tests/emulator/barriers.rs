//! Barriers that not all threads reach.

use dsa80_cuda::Arg;

use crate::snippet::{Snippet, fails, runs};

#[test]
fn every_thread_reaches_a_barrier_or_it_is_an_error() {
    let body = |condition: &str| {
        format!("KERNEL void kernel(uint32_t* a) {{\n if ({condition}) __syncthreads();  // here\n }}")
    };
    runs(96, 0, &body("true"));
    runs(96, 0, &body("false"));
    // Inside a warp, and a whole warp.
    fails(
        96,
        0,
        &body("threadIdx.x != 40"),
        &["a barrier is not reached by the whole warp", "lane 8 has returned"],
    );
    fails(
        96,
        0,
        &body("threadIdx.x < 64"),
        &["a barrier is not reached by all its threads", "warp 2 has returned"],
    );
}

#[test]
fn one_barrier_is_one_kind() {
    let body = "KERNEL void kernel(uint32_t* a) {
        if (threadIdx.x < 32) __syncthreads(); else __syncthreads_or(1);
    }";
    fails(64, 0, body, &["__syncthreads", "__syncthreads_or", "snippet.cu:3"]);
    let body = "KERNEL void kernel(uint32_t* a) {
        named_barrier(1, threadIdx.x < 32 ? 64 : 96);
    }";
    fails(96, 0, body, &["named_barrier of ", "while thread ", "waits at named_barrier(1, "]);
}

#[test]
fn warps_that_wait_for_each_other_are_reported_with_their_places() {
    let body = "KERNEL void kernel(uint32_t* a) {
        if (threadIdx.x < 32) named_barrier(1, 64);
        else named_barrier(2, 64);
    }";
    let words = [
        "warp 0 waits at named_barrier(1, 64) at snippet.cu:3",
        "warp 1 waits at named_barrier(2, 64) at snippet.cu:4",
    ];
    fails(64, 0, body, &words);
    let body = "KERNEL void kernel(uint32_t* a) {
        if (threadIdx.x < 32) named_barrier(1, 64);
        __syncthreads();
    }";
    fails(
        64,
        0,
        body,
        &["warp 0 waits at named_barrier(1, 64)", "warp 1 waits at __syncthreads at snippet.cu:4"],
    );
}

#[test]
fn a_named_barrier_is_one_that_the_hardware_has() {
    for call in
        ["named_barrier(0, 64)", "named_barrier(16, 64)", "named_barrier(1, 48)", "named_barrier(1, 128)"]
    {
        let body = format!("KERNEL void kernel(uint32_t* a) {{\n {call};  // here\n }}");
        fails(64, 0, &body, &[call]);
    }
}

#[test]
fn barriers_count_and_vote() {
    runs(
        96,
        0,
        "KERNEL void kernel(uint32_t* a) {
             const uint32_t thread = threadIdx.x;
             bool right = __syncthreads_or(thread == 95) == 1 && __syncthreads_or(0) == 0;
             right = right && __syncthreads_and(1) == 1 && __syncthreads_and(thread != 33) == 0;
             right = right && __syncthreads_count(thread % 3 == 0) == 32;
             if (!right) a[64] = 0;
         }",
    );
}

#[test]
fn a_kernel_without_end_is_given_up() {
    let Some(mut snippet) =
        Snippet::new("KERNEL void kernel(volatile uint32_t* a) { while (a[0] == 7) a[1] = 1; }")
    else {
        return;
    };
    snippet.emulator = snippet.emulator.with_time_limit(1);
    let a = snippet.buffer("a", &[7u32; 64]);
    let error = snippet.launch(2, 32, 0, &[Arg::Buffer(&a)]).unwrap_err();
    assert!(error.contains("the kernel has not ended after 1 s"), "{error}");
}
