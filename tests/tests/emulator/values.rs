//! What every primitive computes.

use dsa80_cuda::Arg;

use crate::support::{Snippet, emulated};

#[test]
fn a_matrix_product_has_every_element_in_its_place() {
    if !emulated() {
        return;
    }
    // Products and sums of small integers are exact in every format.
    let a: Vec<f32> = (0..256).map(|i| ((i * 37) % 17) as f32 - 8.0).collect();
    let b: Vec<f32> = (0..128).map(|i| ((i * 23) % 13) as f32 - 6.0).collect();
    for (mma, pack) in [("mma_bf16", "pack_bf16"), ("mma_f16", "pack_f16")] {
        let snippet = Snippet::new(&format!(
            "DEVICE uint32_t half(float x) {{
                 const uint32_t bits = __float_as_uint(x);
                 return x == 0.0f ? 0 : (bits >> 16 & 0x8000) | ((bits >> 13 & 0x3ffff) - (112 << 10));
             }}
             DEVICE uint32_t pack_f16(float low, float high) {{ return half(low) | half(high) << 16; }}
             KERNEL void __launch_bounds__(32, 1) kernel(const float* a, const float* b, float* c) {{
                 const int g = threadIdx.x / 4, t = threadIdx.x % 4 * 2;
                 uint32_t left[4], right[2];
                 for (int i = 0; i < 4; ++i) {{
                     const float* at = a + (g + i % 2 * 8) * 16 + t + i / 2 * 8;
                     left[i] = {pack}(at[0], at[1]);
                 }}
                 for (int i = 0; i < 2; ++i) right[i] = {pack}(b[(t + i * 8) * 8 + g], b[(t + i * 8 + 1) * 8 + g]);
                 float sum[4] = {{1.0f, 2.0f, 3.0f, 4.0f}};
                 {mma}(sum, left, right);
                 for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + t + i % 2] = sum[i] - (i + 1);
             }}"
        ));
        let (left, right) = (snippet.buffer("a", &a), snippet.buffer("b", &b));
        let out = snippet.buffer("c", &[f32::NAN; 128]);
        snippet.launch(1, 32, 0, &[Arg::Buffer(&left), Arg::Buffer(&right), Arg::Buffer(&out)]).unwrap();
        let expected: Vec<f32> = (0..128).map(|i| (0..16).map(|k| a[i / 8 * 16 + k] * b[k * 8 + i % 8]).sum()).collect();
        assert_eq!(snippet.values::<f32>(&out, 128), expected, "{mma}");
    }
}

#[test]
fn out_of_bounds_is_named() {
    let snippet = Snippet::new("KERNEL void kernel(float* a) { a[threadIdx.x] = 1.0f; }");
    let out = snippet.buffer("a", &[f32::NAN; 128]);
    snippet.launch(1, 128, 0, &[Arg::Buffer(&out)]).unwrap();
    println!("{}", snippet.launch(3, 129, 0, &[Arg::Buffer(&out)]).unwrap_err());
}
