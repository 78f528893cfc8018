//! Warp collectives that not all their lanes reach.

use crate::snippet::{fails, runs};

#[test]
fn a_lane_that_has_returned_is_missed() {
    let body = "KERNEL void kernel(uint32_t* a) {
        if (threadIdx.x == 3) return;
        a[threadIdx.x] = __ballot_sync(0xffffffffu, 1);  // here
    }";
    fails(
        32,
        0,
        body,
        &["__ballot_sync(mask 0xffffffff) is not reached by all its lanes: lane 3 has returned"],
    );
}

#[test]
fn a_lane_that_waits_elsewhere_is_missed() {
    let body = "KERNEL void kernel(uint32_t* a) {
        if (threadIdx.x == 3) __syncwarp();
        else a[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1u, 1);
    }";
    fails(32, 0, body, &["is not reached by all its lanes", "__syncwarp", "snippet.cu:3"]);
    let body = "KERNEL void kernel(uint32_t* a) {
        if (threadIdx.x == 3) __syncthreads();
        a[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1u, 1);  // here
    }";
    fails(
        32,
        0,
        body,
        &["__shfl_xor_sync(mask 0xffffffff) is not reached", "lane 3 waits at __syncthreads at snippet.cu:3"],
    );
}

#[test]
fn a_mask_names_lanes_that_exist_and_the_caller() {
    fails(
        40,
        0,
        "KERNEL void kernel(uint32_t* a) {\n a[threadIdx.x] = __any_sync(0xffffffffu, 1);  // here\n }",
        &["lane 8 does not exist"],
    );
    fails(
        32,
        0,
        "KERNEL void kernel(uint32_t* a) {\n a[threadIdx.x] = __any_sync(0x7fffffffu, 1);  // here\n }",
        &["the mask lacks the lane itself", "lane 31"],
    );
    fails(
        32,
        0,
        "KERNEL void kernel(uint32_t* a) {
             if (threadIdx.x < 16) a[threadIdx.x] = __shfl_sync(0xffffu, 1u, 16);  // here
         }",
        &["__shfl_sync reads lane 16, which is not in its mask 0xffff"],
    );
}

#[test]
fn parts_of_a_warp_go_their_own_ways() {
    runs(
        32,
        0,
        "KERNEL void kernel(uint32_t* a) {
             const uint32_t lane = threadIdx.x;
             uint32_t sum;
             if (lane < 8) sum = __reduce_add_sync(0xffu, lane);
             else if (lane < 16) sum = __reduce_add_sync(0xff00u, lane);
             else sum = __reduce_add_sync(0xffff0000u, lane);
             __syncwarp();
             if (sum != (lane < 8 ? 28u : lane < 16 ? 92u : 376u)) a[64] = 0;
         }",
    );
}

#[test]
fn matrix_instructions_are_of_whole_warps() {
    for call in
        ["mma_bf16(c, r, b)", "ldmatrix_x4(r, &shared_memory<uint4>())", "r[0] = movmatrix_trans(r[1])"]
    {
        let body = format!(
            "KERNEL void kernel(uint32_t* a) {{
                 float c[4] = {{}};
                 uint32_t r[4] = {{}}, b[2] = {{}};
                 if (threadIdx.x % 2 == 0) {call};  // here
             }}"
        );
        fails(32, 512, &body, &["is not reached by all its lanes: lane 1 has returned"]);
    }
    let body = "KERNEL void kernel(uint32_t* a) {
        uint4* shared = &shared_memory<uint4>();
        shared[threadIdx.x] = make_uint4(0, 0, 0, 0);
        __syncwarp();
        uint32_t r[4];
        ldmatrix_x4(r, reinterpret_cast<uint32_t*>(shared + threadIdx.x) + ADD);  // here
    }";
    runs(32, 512, &body.replace("ADD", "0"));
    fails(32, 512, &body.replace("ADD", "1"), &["misaligned: the row of an ldmatrix"]);
    fails(32, 512, &body.replace("ADD", "4"), &["out of bounds: reads with ldmatrix", "thread 31"]);
    fails(
        32,
        512,
        &body.replace("shared +", "reinterpret_cast<uint4*>(a) +").replace("ADD", "0"),
        &["ldmatrix", "`a`"],
    );
}
