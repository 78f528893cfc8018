// Every instruction that CUDA C++ has no plain word for, behind a small function with a plain name; all of them exist on sm_80.
//
// In emulation (DSA80_EMULATION) the same names come from a host header, so the kernels compile as C++ unchanged. What that asks of a
// kernel: all shared memory is dynamic and reached through `shared_memory<T>()`; no header but this folder's; no inline assembly.
#pragma once

#ifdef DSA80_EMULATION
#include "emulation.h"
#else

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;

// The block's dynamic shared memory, seen as the kernel's one struct of it.
template <typename T>
DEVICE T& shared_memory() {
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    return *reinterpret_cast<T*>(shared_bytes);
}

DEVICE uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// Asynchronous copies from global to shared memory: visible to the issuing thread after `cp_async_wait`, to others after a barrier that
// follows.

// 16 bytes, past the L1.
DEVICE void cp_async_16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

// 16 bytes, or 16 zero bytes when not `valid` (the source is then not read, but must still be a mapped address).
DEVICE void cp_async_16_or_zero(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}

// Likewise, of what is read once: the L2 gives its lines up before others.
DEVICE void cp_async_16_or_zero_once(void* shared, const void* global, bool valid) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0), "l"(policy)
                 : "memory");
}

// As the first of the two, through the L1: lines that hit the L2 then come faster than past it.
DEVICE void cp_async_16_or_zero_l1(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}

// 8 bytes.
DEVICE void cp_async_8(void* shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

// 4 bytes.
DEVICE void cp_async_4(void* shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

// Closes the group of this thread's copies since the last commit.
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's newest groups are under way.
template <int PENDING>
DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8x8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, aligned) and gets in r[i] the
// elements (l / 4, 2 * (l % 4)) and the next of matrix i; transposed: (2 * (l % 4), l / 4) and the one below.
DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Two matrices; lanes 0 to 15 give the addresses (the other lanes' must be valid too, and are not read).
DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

// Transposes an 8x8 matrix of 16-bit elements that lies over the warp as `ldmatrix` leaves it.
DEVICE uint32_t movmatrix_trans(uint32_t fragment) {
    uint32_t out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(fragment));
    return out;
}

// c += a b, m16n8k16, f32 accumulators. With g = lane / 4 and t = lane % 4 (pairs of neighbouring columns share a register):
//   a (16x16): a[0] row g, columns 2t; a[1] row g + 8, 2t; a[2] row g, 2t + 8; a[3] row g + 8, 2t + 8
//   b (16x8):  b[0] rows 2t, 2t + 1, column g; b[1] rows 2t + 8, 2t + 9
//   c (16x8):  c[0], c[1] row g, columns 2t, 2t + 1; c[2], c[3] row g + 8
DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two floats rounded to nearest even bf16; `low` goes to the lower 16 bits.
DEVICE uint32_t pack_bf16(float low, float high) {
    uint32_t out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

// a * b + c in two bf16 lanes, each rounded once; subnormals are kept.
DEVICE uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t out;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
}

// 2^x, to 2 units in the last place; 0 for negative infinity; subnormal results are flushed.
DEVICE float exp2_approx(float x) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}

// 1 / x, to a unit in the last place; subnormals are flushed, so 0 for 2^126 and more.
DEVICE float reciprocal_approx(float x) {
    float out;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}

// The larger of x and 0; NaN stays.
DEVICE float relu(float x) {
    float out;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(out) : "f"(x));
    return out;
}

// The larger of two; NaN stays.
DEVICE float max_nan(float a, float b) {
    float out;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
    return out;
}

// Any bitwise function of three words: LUT is the function applied to 0xf0, 0xcc, 0xaa.
template <int LUT>
DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t out;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(out) : "r"(a), "r"(b), "r"(c), "n"(LUT));
    return out;
}

// 16 bytes that are read once: past the L1, read-only for the whole launch.
DEVICE uint4 load_once_16(const void* global) {
    uint4 out;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
                 : "l"(global));
    return out;
}

// 8 bytes, likewise.
DEVICE uint2 load_once_8(const void* global) {
    uint2 out;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(out.x), "=r"(out.y) : "l"(global));
    return out;
}

// Brings the line of 32 bytes at a global address into the L2, if the memory has time.
DEVICE void prefetch_l2(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// A load that sees what other blocks have published before a fence (past the L1).
DEVICE uint32_t load_published(const uint32_t* global) {
    uint32_t out;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(out) : "l"(global) : "memory");
    return out;
}

DEVICE float4 load_published_16(const float4* global) {
    float4 out;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(out.x), "=f"(out.y), "=f"(out.z), "=f"(out.w)
                 : "l"(global)
                 : "memory");
    return out;
}

// 16 bytes that another block of the launch waits for, and a load of such: words arrive one by one, so each must say that it is there.
DEVICE void store_awaited_16(float4* global, const float4& value) {
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(global), "f"(value.x), "f"(value.y), "f"(value.z),
                 "f"(value.w)
                 : "memory");
}

DEVICE float4 load_awaited_16(const float4* global) {
    float4 out;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(out.x), "=f"(out.y), "=f"(out.z), "=f"(out.w)
                 : "l"(global)
                 : "memory");
    return out;
}

// The same for what another GPU waits for, 16 bytes and a word.
DEVICE void store_awaited_system_16(uint32_t* global, const uint32_t (&words)[4]) {
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3])
                 : "memory");
}

DEVICE void load_awaited_system_16(const uint32_t* global, uint32_t (&words)[4]) {
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(global)
                 : "memory");
}

DEVICE void store_awaited_system(uint32_t* global, uint32_t value) {
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(global), "r"(value) : "memory");
}

DEVICE uint32_t load_awaited_system(const uint32_t* global) {
    uint32_t out;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(out) : "l"(global) : "memory");
    return out;
}

// A load that sees all that was written, on any GPU, before what it reads.
DEVICE uint32_t load_acquire_system(const uint32_t* global) {
    uint32_t out;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(out) : "l"(global) : "memory");
    return out;
}

// The time of a clock that all blocks share.
DEVICE uint64_t nanoseconds() {
    uint64_t out;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(out));
    return out;
}

// A barrier of `threads` threads of the block (a multiple of 32) that name the same `id`, 1 to 15.
DEVICE void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

#endif

// The upper and the lower bf16 of a word, widened (exact).
DEVICE float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
DEVICE float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }

// One bf16, widened, and one float rounded to nearest even.
DEVICE float bf16_to_float(uint16_t value) { return __uint_as_float(static_cast<uint32_t>(value) << 16); }
DEVICE uint16_t float_to_bf16(float value) { return static_cast<uint16_t>(pack_bf16(value, 0.0f) & 0xffffu); }
