//! What every primitive computes.

use dsa80_cuda::Arg;
use half::{bf16, f16};

use crate::snippet::{Snippet, runs};

#[test]
fn a_matrix_product_has_every_element_in_its_place() {
    // Products and sums of small integers are exact in every format.
    let a: Vec<f32> = (0..256).map(|i| ((i * 37) % 17) as f32 - 8.0).collect();
    let b: Vec<f32> = (0..128).map(|i| ((i * 23) % 13) as f32 - 6.0).collect();
    let expected: Vec<f32> =
        (0..128).map(|i| (0..16).map(|k| a[i / 8 * 16 + k] * b[k * 8 + i % 8]).sum::<f32>() + 0.5).collect();
    let as_bf16 = |values: &[f32]| values.iter().map(|&x| bf16::from_f32(x).to_bits()).collect::<Vec<u16>>();
    let as_f16 = |values: &[f32]| values.iter().map(|&x| f16::from_f32(x).to_bits()).collect::<Vec<u16>>();
    for (mma, a, b) in [("mma_bf16", as_bf16(&a), as_bf16(&b)), ("mma_f16", as_f16(&a), as_f16(&b))] {
        let source = format!(
            "DEVICE uint32_t pair(uint16_t low, uint16_t high) {{ return low | static_cast<uint32_t>(high) << 16; }}
             KERNEL void kernel(const uint16_t* a, const uint16_t* b, float* c) {{
                 const int g = threadIdx.x / 4, t = threadIdx.x % 4 * 2;
                 uint32_t left[4], right[2];
                 for (int i = 0; i < 4; ++i) {{
                     const uint16_t* at = a + (g + i % 2 * 8) * 16 + t + i / 2 * 8;
                     left[i] = pair(at[0], at[1]);
                 }}
                 for (int i = 0; i < 2; ++i) right[i] = pair(b[(t + i * 8) * 8 + g], b[(t + i * 8 + 1) * 8 + g]);
                 float sum[4] = {{0.5f, 0.5f, 0.5f, 0.5f}};
                 {mma}(sum, left, right);
                 for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + t + i % 2] = sum[i];
             }}"
        );
        let Some(snippet) = Snippet::new(&source) else { return };
        let (left, right) = (snippet.buffer("a", &a), snippet.buffer("b", &b));
        let out = snippet.buffer("c", &[f32::NAN; 128]);
        snippet.launch(1, 32, 0, &[Arg::Buffer(&left), Arg::Buffer(&right), Arg::Buffer(&out)]).unwrap();
        assert_eq!(snippet.values::<f32>(&out, 128), expected, "{mma}");
    }
}

#[test]
fn a_matrix_product_keeps_subnormals_and_rounds_once() {
    // 2^-130 (a subnormal bf16) times 2^120; and 1 + 2^-24 - 1, which f32 would lose half way.
    let source = "KERNEL void kernel(float* out) {
        const bool first = threadIdx.x == 0;
        const uint32_t a[4] = {first ? 0x00083f80u : 0u, 0, threadIdx.x == 0 ? 0x3f803f80u : 0u, 0};
        const uint32_t b[2] = {first ? 0x7b803380u : 0u, first ? 0xbf803f80u : 0u};
        float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        mma_bf16(c, a, b);
        if (first) out[0] = c[0];
    }";
    let Some(snippet) = Snippet::new(source) else { return };
    let out = snippet.buffer("out", &[f32::NAN]);
    snippet.launch(1, 32, 0, &[Arg::Buffer(&out)]).unwrap();
    let expected = 2f64.powi(-24) + 2f64.powi(-130 + 120);
    assert_eq!(snippet.values::<f32>(&out, 1), [expected as f32]);
}

#[test]
fn ldmatrix_deals_out_rows_and_columns() {
    let source = "struct Shared { uint16_t rows[4][8][8]; };
        KERNEL void kernel(uint32_t* out) {
            Shared& shared = shared_memory<Shared>();
            const uint32_t lane = threadIdx.x;
            for (uint32_t i = 0; i < 8; ++i) shared.rows[lane / 8][lane % 8][i] = static_cast<uint16_t>(lane * 8 + i);
            __syncwarp();
            const void* row = shared.rows[lane / 8][lane % 8];
            uint32_t r[4], two[2];
            ldmatrix_x4(r, row);
            for (uint32_t i = 0; i < 4; ++i) out[i * 32 + lane] = r[i];
            ldmatrix_x4_trans(r, row);
            for (uint32_t i = 0; i < 4; ++i) out[(4 + i) * 32 + lane] = r[i];
            ldmatrix_x2(two, row);
            for (uint32_t i = 0; i < 2; ++i) out[(8 + i) * 32 + lane] = two[i];
            ldmatrix_x2_trans(two, row);
            for (uint32_t i = 0; i < 2; ++i) out[(10 + i) * 32 + lane] = two[i];
            out[12 * 32 + lane] = movmatrix_trans(out[lane]);
        }";
    let Some(snippet) = Snippet::new(source) else { return };
    let out = snippet.buffer("out", &[u32::MAX; 13 * 32]);
    snippet.launch(1, 32, 512, &[Arg::Buffer(&out)]).unwrap();
    let words: Vec<u32> = snippet.values(&out, 13 * 32);
    for lane in 0..32 {
        let (g, t) = (lane / 4, 2 * (lane % 4));
        let element = |matrix: u32, row: u32, column: u32| matrix * 64 + row * 8 + column;
        let plain = |matrix| element(matrix, g, t) | element(matrix, g, t + 1) << 16;
        let transposed = |matrix| element(matrix, t, g) | element(matrix, t + 1, g) << 16;
        let found: Vec<u32> = words.iter().skip(lane as usize).step_by(32).copied().collect();
        let expected: Vec<u32> = [0, 1, 2, 3]
            .map(plain)
            .into_iter()
            .chain([0, 1, 2, 3].map(transposed))
            .chain([0, 1].map(plain))
            .chain([0, 1].map(transposed))
            .chain([transposed(0)])
            .collect();
        assert_eq!(found, expected, "lane {lane}");
    }
}

#[test]
fn lanes_exchange_values() {
    runs(
        64,
        0,
        "KERNEL void kernel(uint32_t* a) {
             constexpr uint32_t ALL = 0xffffffffu;
             const int lane = threadIdx.x % 32;
             bool right = __shfl_sync(ALL, lane * 3, 5) == 15 && __shfl_sync(ALL, lane, lane + 1) == (lane + 1) % 32;
             right = right && __shfl_sync(ALL, lane, 2, 8) == lane / 8 * 8 + 2;
             right = right && __shfl_up_sync(ALL, lane, 3) == (lane < 3 ? lane : lane - 3);
             right = right && __shfl_down_sync(ALL, lane, 3) == (lane > 28 ? lane : lane + 3);
             right = right && __shfl_down_sync(ALL, lane, 1, 4) == (lane % 4 == 3 ? lane : lane + 1);
             right = right && __shfl_xor_sync(ALL, 1.5f + lane, 9) == 1.5f + (lane ^ 9);
             right = right && __shfl_xor_sync(ALL, (1ull << 40) + lane, 1) == (1ull << 40) + (lane ^ 1);
             right = right && __ballot_sync(ALL, lane % 3 == 0) == 0x49249249u;
             right = right && __any_sync(ALL, lane == 31) == 1 && __any_sync(ALL, 0) == 0;
             right = right && __all_sync(ALL, lane < 32) == 1 && __all_sync(ALL, lane != 5) == 0;
             right = right && __reduce_add_sync(ALL, lane) == 496 && __reduce_max_sync(ALL, lane - 40) == -9;
             right = right && __reduce_min_sync(ALL, lane - 40) == -40 && __reduce_max_sync(ALL, lane + 4000000000u) == 4000000031u;
             right = right && __reduce_or_sync(ALL, 1u << lane) == ALL && __reduce_and_sync(ALL, ~(1u << lane)) == 0;
             right = right && __match_any_sync(ALL, lane / 8) == 0xffu << (lane / 8 * 8);
             if (!right) a[64] = 0;
         }",
    );
}

#[test]
fn integer_words_are_cudas() {
    runs(
        1,
        0,
        "KERNEL void kernel(uint32_t* a) {
             const uint32_t x = 0x12345678u + a[0] - 7;
             bool right = __popc(x) == 13 && __popcll(~0ull) == 64 && __clz(x) == 3 && __clz(0) == 32 && __ffs(8) == 4 && __ffs(0) == 0;
             right = right && __brev(1) == 0x80000000u && __umulhi(x, 0x10000u) == 0x1234u;
             right = right && __byte_perm(0x03020100u, 0x07060504u, 0x7531u) == 0x07050301u && __byte_perm(0x80, 0, 0x8888u) == ALL;
             right = right && __funnelshift_l(0x80000001u, x, 4) == 0x23456788u && __funnelshift_r(x, 0xfu, 4) == 0xf1234567u;
             right = right && lop3<0xf0>(1, 2, 4) == 1 && lop3<0xcc>(1, 2, 4) == 2 && lop3<0xaa>(1, 2, 4) == 4;
             right = right && lop3<(0xf0 & 0xcc) | 0xaa>(6, 3, 8) == 10 && min(-1, 1) == -1 && min(-1, 1u) == 1u;
             if (!right) a[64] = 0;
         }"
        .replace("ALL", "0xffffffffu")
        .as_str(),
    );
}

#[test]
fn bf16_arithmetic_rounds_to_nearest_even() {
    let source = "KERNEL void kernel(const float* values, uint32_t* packed, const uint32_t* triples, uint32_t* sums, float* powers) {
        const uint32_t i = blockIdx.x * 32 + threadIdx.x;
        packed[i] = pack_bf16(values[i], -values[i]);
        sums[i] = fma_bf16x2(triples[3 * i], triples[3 * i + 1], triples[3 * i + 2]);
        powers[i] = exp2_approx(values[i]);
    }";
    let Some(snippet) = Snippet::new(source) else { return };
    let count = 64 * 32;
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 32) as u32
    };
    let mut values: Vec<f32> = (0..count).map(|_| f32::from_bits(random())).collect();
    values[..8].copy_from_slice(&[
        f32::NAN,
        f32::INFINITY,
        -0.0,
        1.0 + 1.0 / 256.0,
        1.0 + 3.0 / 256.0,
        f32::MAX,
        1e-40,
        -126.5,
    ]);
    let mut triples: Vec<u32> = (0..3 * count).map(|_| random()).collect();
    // Exponents that meet, so that sums cancel and round.
    for (i, word) in triples.iter_mut().enumerate().skip(count as usize) {
        *word = (*word & 0x83ff_83ff) | if i % 3 == 2 { 0x3c00_3c00 } else { 0x3e00_3e00 };
    }
    let (input, packed) =
        (snippet.buffer("values", &values), snippet.buffer("packed", &vec![0u32; values.len()]));
    let (words, sums) =
        (snippet.buffer("triples", &triples), snippet.buffer("sums", &vec![0u32; values.len()]));
    let powers = snippet.buffer("powers", &vec![0f32; values.len()]);
    let args = [
        Arg::Buffer(&input),
        Arg::Buffer(&packed),
        Arg::Buffer(&words),
        Arg::Buffer(&sums),
        Arg::Buffer(&powers),
    ];
    snippet.launch(64, 32, 0, &args).unwrap();
    let (packed, sums) =
        (snippet.values::<u32>(&packed, values.len()), snippet.values::<u32>(&sums, values.len()));
    let powers = snippet.values::<f32>(&powers, values.len());
    let same = |found: u32, expected: bf16| {
        let found = bf16::from_bits(found as u16);
        found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan())
    };
    for (i, &value) in values.iter().enumerate() {
        assert!(
            same(packed[i], bf16::from_f32(value)) && same(packed[i] >> 16, bf16::from_f32(-value)),
            "{value:e}: {:x}",
            packed[i]
        );
        let power = f64::from(value).exp2();
        let expected = if power < f64::from(f32::MIN_POSITIVE) { 0.0 } else { power };
        let close = (f64::from(powers[i]) - expected).abs() <= 2.0 * f64::from(f32::EPSILON) * expected;
        assert!(
            close || f64::from(powers[i]) == expected || value.is_nan() || expected > 3e38,
            "2^{value:e}: {:e}",
            powers[i]
        );
        for shift in [0, 16] {
            let [a, b, c] = [0, 1, 2].map(|j| bf16::from_bits((triples[3 * i + j] >> shift) as u16));
            let expected = fused(a, b, c);
            assert!(
                same(sums[i] >> shift, expected),
                "{a} * {b} + {c} = {expected}, not {:x}",
                sums[i] >> shift
            );
        }
    }
}

/// a * b + c rounded once.
fn fused(a: bf16, b: bf16, c: bf16) -> bf16 {
    let (product, c) = (a.to_f64() * b.to_f64(), c.to_f64());
    let sum = product + c;
    if !sum.is_finite() || sum == 0.0 {
        return bf16::from_f64(sum);
    }
    // What double's rounding lost of the magnitude, exactly.
    let back = sum - product;
    let lost = ((product - (sum - back)) + (c - back)) * sum.signum();
    let value = |bits: u16| if bits == 0x7f80 { 2f64.powi(128) } else { bf16::from_bits(bits).to_f64() };
    let Some(low) = (0..0x7f80u16).rev().find(|&bits| value(bits) <= sum.abs()) else { unreachable!() };
    let middle = (value(low) + value(low + 1)) / 2.0;
    let above = sum.abs() > middle || (sum.abs() == middle && (lost > 0.0 || (lost == 0.0 && low % 2 == 1)));
    let exact = sum.abs() == value(low) && lost >= 0.0;
    bf16::from_bits(if above && !exact { low + 1 } else { low } | if sum < 0.0 { 0x8000 } else { 0 })
}
