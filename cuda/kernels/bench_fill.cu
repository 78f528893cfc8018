// Inputs of the benchmark, made where they are needed: a value depends on its place and the seed alone.
#include "fp8.cuh"
#include "random.cuh"

// About normal, deviation 1: the sum of four uniform bytes has deviation 147.8.
DEVICE float about_normal(uint32_t bits) {
    const int32_t sum = static_cast<int32_t>((bits & 255u) + (bits >> 8 & 255u) + (bits >> 16 & 255u) + (bits >> 24)) - 510;
    return static_cast<float>(sum) * (1.0f / 147.8f);
}

KERNEL void __launch_bounds__(256) fill_bf16(uint16_t* out, int64_t count, int32_t seed, float deviation) {
    const int64_t stride = int64_t(gridDim.x) * blockDim.x;
    for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < count; at += stride) {
        out[at] = float_to_bf16(about_normal(scramble(at, seed)) * deviation);
    }
}

KERNEL void __launch_bounds__(256) fill_f32(float* out, int64_t count, int32_t seed, float deviation) {
    const int64_t stride = int64_t(gridDim.x) * blockDim.x;
    for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < count; at += stride) {
        const uint32_t bits = scramble(at, seed);
        // A second draw breaks the ties of a thousand levels.
        const float fine = static_cast<float>(scramble(at, seed ^ 0x55555555) >> 8) * 0x1p-24f - 0.5f;
        out[at] = (about_normal(bits) + fine * (1.0f / 147.8f)) * deviation;
    }
}

// e4m3 codes of a deviation of 128; `f32_bytes` from `f32_at` of every `period` bytes are floats in 1/128 to 1/64 instead, the scales
// between them, and `bf16_bytes` from `bf16_at` are bf16.
KERNEL void __launch_bounds__(256)
fill_fp8(uint8_t* out, int64_t count, int32_t seed, int32_t period, int32_t f32_at, int32_t f32_bytes, int32_t bf16_at,
         int32_t bf16_bytes) {
    const int64_t stride = int64_t(gridDim.x) * blockDim.x;
    for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < count; at += stride) {
        const int32_t place = static_cast<int32_t>(at % period);
        const uint32_t bits = scramble(at, seed);
        uint32_t value = float_to_e4m3(about_normal(bits) * 128.0f);
        if (place >= f32_at && place < f32_at + f32_bytes) {
            // Of a little-endian float, the last byte is 0x3c and the one before keeps it in its binade.
            const int32_t byte = (place - f32_at) % 4;
            value = byte == 3 ? 0x3cu : byte == 2 ? (bits & 0x7fu) : (bits & 0xffu);
        } else if (place >= bf16_at && place < bf16_at + bf16_bytes) {
            const uint32_t word = scramble(at & ~int64_t(1), seed);
            const uint32_t rounded = float_to_bf16(about_normal(word));
            value = at % 2 == 0 ? rounded & 0xffu : rounded >> 8;
        }
        out[at] = static_cast<uint8_t>(value);
    }
}

// Random words.
KERNEL void __launch_bounds__(256) fill_words(uint32_t* out, int64_t count, int32_t seed) {
    const int64_t stride = int64_t(gridDim.x) * blockDim.x;
    for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < count; at += stride) out[at] = scramble(at, seed);
}
