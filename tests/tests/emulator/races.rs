//! Shared memory between barriers.

use crate::snippet::{fails, runs};

/// Every thread writes its word, then `between`, then reads the word of thread `other`.
fn exchange(between: &str, other: &str) -> String {
    format!(
        "KERNEL void kernel(uint32_t* a) {{
             uint32_t* shared = &shared_memory<uint32_t>();
             const uint32_t thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
             shared[thread] = 0;
             __syncthreads();
             shared[thread] = thread;
             {between};
             const uint32_t found = shared[{other}];
             a[thread % 64] = found + lane + warp;
         }}"
    )
}

#[test]
fn a_missing_barrier_is_a_race() {
    runs(128, 512, &exchange("__syncthreads()", "127 - thread"));
    runs(128, 512, &exchange("named_barrier(1, 128)", "127 - thread"));
    fails(128, 512, &exchange("", "127 - thread"), &["race: ", "no barrier in between"]);
    fails(128, 512, &exchange("__syncwarp()", "127 - thread"), &["race: ", "no barrier in between"]);
}

#[test]
fn inside_a_warp_only_syncwarp_orders() {
    runs(64, 256, &exchange("__syncwarp()", "(thread ^ 5)"));
    for between in [
        "",
        "__shfl_sync(0xffffffffu, lane, 0)",
        "__ballot_sync(0xffffffffu, lane < 3)",
        "__threadfence_block()",
    ] {
        fails(
            64,
            256,
            &exchange(between, "(thread ^ 5)"),
            &["race: ", "no __syncwarp or barrier in between"],
        );
    }
}

#[test]
fn a_named_barrier_orders_its_warps_and_no_others() {
    let between = "named_barrier(1 + warp / 2, 64)";
    runs(128, 512, &exchange(between, "(thread ^ 32)"));
    fails(128, 512, &exchange(between, "(thread ^ 64)"), &["race: "]);
    // Through a warp that is in both.
    let chain = |last: &str| {
        format!(
            "if (warp == 0) named_barrier(1, 64);
             if (warp == 1) named_barrier(1, 64), named_barrier(2, 64);
             if (warp == 2) {last}"
        )
    };
    let read = "warp == 2 ? lane : thread";
    let body = exchange(&chain("named_barrier(2, 64)"), &format!("({read})"));
    runs(96, 384, &body);
    let body = exchange(&chain("named_barrier(2, 64)"), "(warp == 0 ? 64 + lane : thread)");
    fails(96, 384, &body, &["race: "]);
}

#[test]
fn a_reader_must_be_done_before_the_next_write() {
    let body = |between: &str| {
        format!(
            "KERNEL void kernel(uint32_t* a) {{
                 uint32_t& shared = shared_memory<uint32_t>();
                 for (uint32_t round = 0; round < 3; ++round) {{
                     if (threadIdx.x == 0) shared = round;
                     __syncthreads();
                     a[threadIdx.x % 64] = shared;
                     {between}
                 }}
             }}"
        )
    };
    runs(64, 4, &body("__syncthreads();"));
    fails(64, 4, &body(""), &["race: "]);
    fails(64, 4, &body("__syncwarp();"), &["race: "]);
    runs(32, 4, &body("__syncwarp();"));
}

#[test]
fn neighbouring_bytes_are_no_race() {
    runs(
        256,
        256,
        "KERNEL void kernel(uint32_t* a) {
             uint8_t* shared = &shared_memory<uint8_t>();
             shared[threadIdx.x] = static_cast<uint8_t>(threadIdx.x);
             __syncthreads();
             if (threadIdx.x < 64) a[threadIdx.x] = reinterpret_cast<uint32_t*>(shared)[threadIdx.x];
             if (threadIdx.x < 64 && a[threadIdx.x] != 0x03020100u + threadIdx.x * 0x04040404u) a[64] = 0;
         }",
    );
    fails(
        64,
        256,
        "KERNEL void kernel(uint32_t* a) {
             uint8_t* shared = &shared_memory<uint8_t>();
             shared[threadIdx.x / 2] = 1;
         }",
        &["race: writes byte ", "wrote at snippet.cu:4"],
    );
}

#[test]
fn atomics_race_with_plain_accesses_only() {
    let body = |plain: &str| {
        format!(
            "KERNEL void kernel(uint32_t* a) {{
                 uint32_t& shared = shared_memory<uint32_t>();
                 if (threadIdx.x == 0) shared = 0;
                 __syncthreads();
                 atomicAdd(&shared, threadIdx.x);
                 {plain}
                 __syncthreads();
                 if (shared != 128 * 127 / 2) a[64] = 0;
             }}"
        )
    };
    runs(128, 4, &body(""));
    fails(128, 4, &body("if (threadIdx.x == 77) a[0] = shared;"), &["race: "]);
}

#[test]
fn ldmatrix_reads_what_was_synchronised() {
    let body = |between: &str| {
        format!(
            "KERNEL void kernel(uint32_t* a) {{
                 uint4* shared = &shared_memory<uint4>();
                 const uint32_t lane = threadIdx.x;
                 shared[lane] = make_uint4(lane, lane, lane, lane);
                 {between}
                 uint32_t r[4];
                 ldmatrix_x4(r, shared + lane);
                 a[lane] = r[0];
             }}"
        )
    };
    runs(32, 512, &body("__syncwarp();"));
    fails(32, 512, &body(""), &["race: reads with ldmatrix", "no __syncwarp or barrier"]);
}
