//! Out of bounds, misaligned, never written.

use dsa80_cuda::{Arg, Device};

use crate::snippet::{Snippet, fails, runs};

#[test]
fn one_element_past_an_allocation_is_an_error_with_its_name() {
    let body = "KERNEL void kernel(uint32_t* a) {\n a[threadIdx.x] = 1;  // here\n }";
    runs(64, 0, body);
    fails(
        65,
        0,
        body,
        &[
            "out of bounds: writes 4 bytes at byte 256 of `a`, which has 256 bytes",
            "thread 64 (warp 2, lane 0)",
        ],
    );
    let body = "KERNEL void kernel(uint32_t* a) {\n a[0] = a[-1];  // here\n }";
    fails(1, 0, body, &["out of bounds: reads 4 bytes at 4 bytes before `a`"]);
    let body = "KERNEL void kernel(uint4* a) {\n a[0] = load_once_16(a + 16);  // here\n }";
    fails(1, 0, body, &["out of bounds: reads", "byte 256 of `a`"]);
}

#[test]
fn what_is_no_allocation_is_an_error() {
    fails(1, 0, "KERNEL void kernel(uint32_t* a) {\n *(uint32_t*)16 = 1;  // here\n }", &["a null pointer"]);
    fails(
        1,
        0,
        "KERNEL void kernel(uint32_t* a) {\n a[0] = a[1ll << 40];  // here\n }",
        &["an address of no allocation"],
    );
    let body = "constexpr uint32_t TABLE[4] = {1, 2, 3, 4};\nKERNEL void kernel(uint32_t* a) { a[0] = TABLE[a[1] - 6]; }";
    runs(1, 0, body);
}

#[test]
fn a_buffer_that_is_no_argument_is_no_place_to_go() {
    let Some(snippet) = Snippet::new("KERNEL void kernel(uint32_t* a, int64_t b) { *(uint32_t*)b = a[0]; }")
    else {
        return;
    };
    let (a, unrelated) = (snippet.buffer("a", &[1u32]), snippet.emulator.alloc("unrelated", 4).unwrap());
    let address = i64::try_from(unrelated.address()).unwrap();
    let error = snippet.launch(1, 1, 0, &[Arg::Buffer(&a), Arg::I64(address)]).unwrap_err();
    assert!(error.contains("out of bounds"), "{error}");
}

#[test]
fn shared_memory_ends_where_the_launch_says() {
    let body = "KERNEL void kernel(uint32_t* a) {
        uint32_t* shared = &shared_memory<uint32_t>();
        shared[threadIdx.x] = 1;  // here
    }";
    runs(25, 100, body);
    fails(
        25,
        99,
        body,
        &["out of bounds: writes 4 bytes at byte 96 of the block's shared memory of 99 bytes"],
    );
    fails(26, 100, body, &["byte 100 of the block's shared memory"]);
    let body = "KERNEL void kernel(uint32_t* a) {
        a[0] = (&shared_memory<uint32_t>())[-1];  // here
    }";
    fails(1, 100, body, &["4 bytes before shared memory"]);
}

#[test]
fn vectors_are_aligned_to_their_size() {
    let read = |offset: u32, vector: &str| {
        format!(
            "KERNEL void kernel(uint32_t* a) {{
                 const {vector} value = *reinterpret_cast<const {vector}*>(a + {offset});  // here
                 a[0] = value.x + value.y;
             }}"
        )
    };
    runs(1, 0, &read(4, "uint4"));
    runs(1, 0, &read(2, "uint2"));
    for offset in 1..4 {
        fails(
            1,
            0,
            &read(offset, "uint4"),
            &["misaligned: ", "uint4", &format!("byte {} of `a`", offset * 4), "16"],
        );
    }
    fails(1, 0, &read(3, "uint2"), &["misaligned: ", "uint2", "byte 12 of `a`"]);
    let body = "KERNEL void kernel(uint8_t* a) {\n *reinterpret_cast<uint16_t*>(a + 1) = 1;  // here\n }";
    fails(1, 0, body, &["misaligned", "byte 1 of `a`"]);
    let body = "KERNEL void kernel(uint8_t* a) {\n *(float4*)(&shared_memory<uint8_t>() + 8) = make_float4(1, 2, 3, 4);  // here\n }";
    fails(1, 64, body, &["misaligned", "byte 8 of the block's shared memory"]);
}

#[test]
fn indices_stay_in_arrays_of_a_known_size() {
    let body = |index: &str| {
        format!(
            "struct Shared {{ uint32_t first[4], second[4]; }};
             KERNEL void kernel(uint32_t* a) {{
                 shared_memory<Shared>().first[{index}] = 1;  // here
             }}"
        )
    };
    runs(1, 32, &body("a[0] - 4"));
    fails(1, 32, &body("a[0] - 3"), &["index 4 of an array of type"]);
}

#[test]
fn undefined_integer_arithmetic_is_an_error() {
    let body = |expression: &str| {
        format!(
            "KERNEL void kernel(uint32_t* a) {{
                 const int x = static_cast<int>(a[0]);
                 a[0] = static_cast<uint32_t>({expression});  // here
             }}"
        )
    };
    runs(1, 0, &body("x * 306783378"));
    fails(1, 0, &body("x * 306783379"), &["a signed product overflows"]);
    fails(1, 0, &body("100 / (x - 7)"), &["division by zero"]);
    fails(1, 0, &body("1 << (x + 25)"), &["a shift"]);
}

#[test]
fn shared_memory_that_was_never_written_is_not_read() {
    let body = |written: u32| {
        format!(
            "KERNEL void kernel(uint32_t* a) {{
                 uint16_t* shared = &shared_memory<uint16_t>();
                 for (int i = 0; i < {written}; ++i) shared[i] = 1;
                 a[0] = *reinterpret_cast<uint32_t*>(shared + 2);  // here
             }}"
        )
    };
    runs(1, 64, &body(4));
    fails(1, 64, &body(3), &["reads byte 6 of shared memory, which was never written"]);
    let body = "KERNEL void kernel(uint32_t* a) {\n atomicAdd(&shared_memory<uint32_t>(), 1u);  // here\n }";
    fails(1, 64, body, &["byte 0 of shared memory, which was never written"]);
}
