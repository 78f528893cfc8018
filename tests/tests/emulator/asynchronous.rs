//! `cp.async`.

use crate::snippet::{fails, runs};

/// Lane l copies word 16 B l of `a`; then `wait`; then lane l reads a word of row `row`.
fn copies(wait: &str, row: &str) -> String {
    format!(
        "KERNEL void kernel(uint32_t* a) {{
             uint32_t* shared = &shared_memory<uint32_t>();
             const uint32_t lane = threadIdx.x;
             cp_async_16(shared + lane * 4, a + lane * 4);
             {wait}
             if (shared[{row} * 4] != 7) a[64] = 0;  // here
         }}"
    )
}

#[test]
fn a_copy_is_there_after_its_wait() {
    runs(16, 256, &copies("cp_async_commit(); cp_async_wait<0>();", "lane"));
    runs(16, 256, &copies("cp_async_commit(); cp_async_wait<0>(); __syncthreads();", "(15 - lane)"));
    runs(16, 256, &copies("cp_async_commit(); cp_async_commit(); cp_async_wait<1>();", "lane"));
    let early = ["before the wait that covers the cp.async to it by thread", "snippet.cu:5"];
    fails(16, 256, &copies("", "lane"), &early);
    fails(16, 256, &copies("cp_async_commit();", "lane"), &early);
    fails(16, 256, &copies("cp_async_wait<0>();", "lane"), &early);
    fails(16, 256, &copies("cp_async_commit(); cp_async_wait<1>();", "lane"), &early);
    fails(16, 256, &copies("__syncthreads();", "(15 - lane)"), &early);
}

#[test]
fn others_see_it_after_a_barrier_that_follows_the_wait() {
    let body = copies("cp_async_commit(); cp_async_wait<0>();", "(15 - lane)");
    // Either the copy is still under way or it has just arrived.
    fails(16, 256, &body, &["byte "]);
    let body = copies("cp_async_commit(); __syncthreads(); cp_async_wait<0>();", "(15 - lane)");
    fails(16, 256, &body, &["byte "]);
}

#[test]
fn zeros_arrive_like_copies_do() {
    let body = "KERNEL void kernel(uint32_t* a) {
        uint4& shared = shared_memory<uint4>();
        shared = make_uint4(1, 2, 3, 4);
        cp_async_16_or_zero(&shared, a, a[0] != 7);
        cp_async_commit();
        WAIT
        if ((shared.x | shared.y | shared.z | shared.w) != 0) a[64] = 0;  // here
    }";
    runs(1, 16, &body.replace("WAIT", "cp_async_wait<0>();"));
    fails(1, 16, &body.replace("WAIT", ""), &["before the wait that covers the cp.async"]);
}

#[test]
fn sizes_have_their_alignment_and_bounds() {
    let body = "KERNEL void kernel(uint32_t* a) {
        uint32_t* shared = &shared_memory<uint32_t>();
        COPY;  // here
        cp_async_commit();
        cp_async_wait<0>();
        if (shared[0] != 7) a[64] = 0;
    }";
    for copy in ["cp_async_4(shared, a + 63)", "cp_async_8(shared, a + 62)", "cp_async_16(shared, a + 60)"] {
        runs(1, 16, &body.replace("COPY", copy));
    }
    for (copy, words) in [
        ("cp_async_4(shared, a + 64)", "out of bounds: reads 4 bytes at byte 256 of `a`"),
        ("cp_async_16(shared, a + 62)", "misaligned: the source of a cp.async at byte 248 of `a`"),
        (
            "cp_async_8(shared + 1, a)",
            "misaligned: the target of a cp.async at byte 4 of the block's shared memory",
        ),
        (
            "cp_async_16(shared + 4, a)",
            "out of bounds: copies (cp.async) to 16 bytes at byte 16 of the block's shared memory",
        ),
        ("cp_async_16_or_zero(shared, a + 4096000, false)", "out of bounds"),
    ] {
        fails(1, 16, &body.replace("COPY", copy), &[words]);
    }
}

#[test]
fn a_stage_is_not_refilled_while_others_read_it() {
    let body = "KERNEL void kernel(uint32_t* a) {
        uint32_t* shared = &shared_memory<uint32_t>();
        const uint32_t thread = threadIdx.x;
        for (int round = 0; round < 2; ++round) {
            cp_async_4(shared + thread, a + thread);
            cp_async_commit();
            cp_async_wait<0>();
            __syncthreads();
            if (shared[63 - thread] != 7) a[64] = 0;
            BARRIER
        }
    }";
    runs(64, 256, &body.replace("BARRIER", "__syncthreads();"));
    fails(64, 256, &body.replace("BARRIER", ""), &["byte "]);
}

#[test]
fn a_warp_refills_what_all_its_lanes_have_read() {
    let body = "KERNEL void kernel(uint32_t* a) {
        uint32_t* shared = &shared_memory<uint32_t>();
        const uint32_t lane = threadIdx.x;
        for (int round = 0; round < 2; ++round) {
            if (lane < 16) cp_async_16(shared + lane * 4, a + lane * 4);
            cp_async_commit();
            cp_async_wait<0>();
            __syncwarp();
            uint32_t r[2];
            ldmatrix_x2(r, shared + (15 - lane % 16) * 4);
            if (r[0] != 7 && lane % 2 == 0) a[64] = 0;
            SYNC
        }
    }";
    runs(32, 256, &body.replace("SYNC", "__syncwarp();"));
    fails(
        32,
        256,
        &body.replace("SYNC", "__ballot_sync(0xffffffffu, 1);"),
        &["race: copies (cp.async) to byte "],
    );
}
