// What a kernel source sees of the emulator: the CUDA words that the kernels use, and the functions of ptx.cuh, for the host's compiler.
//
// Plain loads and stores need nothing here: the compiler puts a call in front of each (-fsanitize=thread), and runtime.cpp answers it.
#pragma once

#include <stdint.h>

#include "codes.h"

#define DEVICE inline __attribute__((always_inline))
#define KERNEL static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct uint2 {
    uint32_t x, y;
} __attribute__((aligned(8)));
struct int2 {
    int32_t x, y;
} __attribute__((aligned(8)));
struct float2 {
    float x, y;
} __attribute__((aligned(8)));
struct uint4 {
    uint32_t x, y, z, w;
} __attribute__((aligned(16)));
struct int4 {
    int32_t x, y, z, w;
} __attribute__((aligned(16)));
struct float4 {
    float x, y, z, w;
} __attribute__((aligned(16)));
struct dim3 {
    uint32_t x, y, z;
};

DEVICE uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
DEVICE int2 make_int2(int32_t x, int32_t y) { return {x, y}; }
DEVICE float2 make_float2(float x, float y) { return {x, y}; }
DEVICE uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
DEVICE int4 make_int4(int32_t x, int32_t y, int32_t z, int32_t w) { return {x, y, z, w}; }
DEVICE float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// The runtime, in runtime.cpp. What several lanes do together waits there for all of them.
extern "C" {
struct EmulationWords {
    uint32_t r[4];
};
struct EmulationFloats {
    float c[4];
};
uint32_t emulation_thread() noexcept __attribute__((const));
uint32_t emulation_threads() noexcept __attribute__((const));
uint32_t emulation_block(int dimension) noexcept __attribute__((const));
uint32_t emulation_grid(int dimension) noexcept __attribute__((const));
void* emulation_shared() noexcept __attribute__((const));
int emulation_barrier(int kind, int id, int threads, int predicate);
void emulation_syncwarp(uint32_t mask);
uint64_t emulation_shuffle(int kind, uint32_t mask, uint64_t value, int lane, int width);
uint32_t emulation_vote(int kind, uint32_t mask, uint32_t value);
uint32_t emulation_match(uint32_t mask, uint64_t value);
EmulationWords emulation_ldmatrix(int count, int transposed, const void* row);
uint32_t emulation_movmatrix(uint32_t fragment);
EmulationFloats emulation_mma_bf16(float, float, float, float, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t);
EmulationFloats emulation_mma_f16(float, float, float, float, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t);
void emulation_cp_async(void* shared, const void* global, int bytes, int valid);
void emulation_cp_async_commit();
void emulation_cp_async_wait(int pending);
uint64_t emulation_atomic(int operation, int bytes, void* address, uint64_t value, uint64_t expected);
EmulationWords emulation_load_published(const void* global, int bytes);
uint32_t emulation_pack_bf16(float low, float high) noexcept __attribute__((const));
uint32_t emulation_fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) noexcept __attribute__((const));
float emulation_exp2(float x) noexcept __attribute__((const));
void emulation_fence();
EmulationWords emulation_load_awaited(const void* global);
void emulation_store_awaited(void* global, uint32_t x, uint32_t y, uint32_t z, uint32_t w);
uint32_t emulation_load_acquire(const uint32_t* global);
void emulation_store_release(uint32_t* global, uint32_t value);
uint64_t emulation_nanoseconds();
}

#define threadIdx (dim3{emulation_thread(), 0, 0})
#define blockIdx (dim3{emulation_block(0), emulation_block(1), emulation_block(2)})
#define blockDim (dim3{emulation_threads(), 1, 1})
#define gridDim (dim3{emulation_grid(0), emulation_grid(1), emulation_grid(2)})
constexpr int warpSize = 32;

template <typename To, typename From>
DEVICE To emulation_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits are neither lost nor found");
    return __builtin_bit_cast(To, from);
}

DEVICE uint32_t __float_as_uint(float x) { return emulation_bits<uint32_t>(x); }
DEVICE int32_t __float_as_int(float x) { return emulation_bits<int32_t>(x); }
DEVICE float __uint_as_float(uint32_t x) { return emulation_bits<float>(x); }
DEVICE float __int_as_float(int32_t x) { return emulation_bits<float>(x); }

DEVICE int __popc(uint32_t x) { return __builtin_popcount(x); }
DEVICE int __popcll(uint64_t x) { return __builtin_popcountll(x); }
DEVICE int __clz(uint32_t x) { return x == 0 ? 32 : __builtin_clz(x); }
DEVICE int __clzll(uint64_t x) { return x == 0 ? 64 : __builtin_clzll(x); }
DEVICE int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
DEVICE int __ffsll(uint64_t x) { return __builtin_ffsll(static_cast<long long>(x)); }
DEVICE uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }

DEVICE uint32_t __brev(uint32_t x) {
    uint32_t reversed = 0;
    for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
    return reversed;
}

DEVICE uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t choice = selector >> (4 * i);
        uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (choice & 7))) & 0xffu;
        if (choice & 8) byte = byte & 0x80u ? 0xffu : 0u;
        out |= byte << (8 * i);
    }
    return out;
}

DEVICE uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
DEVICE uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}

// As CUDA overloads them: a mixed pair becomes unsigned.
DEVICE int min(int a, int b) { return a < b ? a : b; }
DEVICE int max(int a, int b) { return a > b ? a : b; }
DEVICE uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }
DEVICE uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }
DEVICE uint32_t min(int a, uint32_t b) { return min(static_cast<uint32_t>(a), b); }
DEVICE uint32_t max(int a, uint32_t b) { return max(static_cast<uint32_t>(a), b); }
DEVICE uint32_t min(uint32_t a, int b) { return min(a, static_cast<uint32_t>(b)); }
DEVICE uint32_t max(uint32_t a, int b) { return max(a, static_cast<uint32_t>(b)); }
DEVICE long min(long a, long b) { return a < b ? a : b; }
DEVICE long max(long a, long b) { return a > b ? a : b; }
DEVICE long long min(long long a, long long b) { return a < b ? a : b; }
DEVICE long long max(long long a, long long b) { return a > b ? a : b; }
DEVICE unsigned long min(unsigned long a, unsigned long b) { return a < b ? a : b; }
DEVICE unsigned long max(unsigned long a, unsigned long b) { return a > b ? a : b; }
DEVICE unsigned long long min(unsigned long long a, unsigned long long b) { return a < b ? a : b; }
DEVICE unsigned long long max(unsigned long long a, unsigned long long b) { return a > b ? a : b; }

// As the instructions do: a number before NaN, -0 below +0.
DEVICE float fminf(float a, float b) {
    if (a == b) return __uint_as_float(__float_as_uint(a) | __float_as_uint(b));
    return a < b || b != b ? a : b;
}
DEVICE float fmaxf(float a, float b) {
    if (a == b) return __uint_as_float(__float_as_uint(a) & __float_as_uint(b));
    return a > b || b != b ? a : b;
}
DEVICE float min(float a, float b) { return fminf(a, b); }
DEVICE float max(float a, float b) { return fmaxf(a, b); }
DEVICE float fabsf(float x) { return __builtin_fabsf(x); }
DEVICE float fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DEVICE float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DEVICE float __fmul_rn(float a, float b) { return a * b; }
DEVICE float __fadd_rn(float a, float b) { return a + b; }
DEVICE float __fsub_rn(float a, float b) { return a - b; }
DEVICE float __fdiv_rn(float a, float b) { return a / b; }
DEVICE float __fsqrt_rn(float x) { return __builtin_sqrtf(x); }
DEVICE float sqrtf(float x) { return __builtin_sqrtf(x); }
DEVICE float rsqrtf(float x) { return static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(x))); }
DEVICE float exp2f(float x) { return __builtin_exp2f(x); }
DEVICE float log2f(float x) { return __builtin_log2f(x); }
DEVICE float rintf(float x) { return __builtin_rintf(x); }
DEVICE float ceilf(float x) { return __builtin_ceilf(x); }
DEVICE float floorf(float x) { return __builtin_floorf(x); }
DEVICE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
DEVICE double rint(double x) { return __builtin_rint(x); }
DEVICE double ceil(double x) { return __builtin_ceil(x); }
DEVICE double fabs(double x) { return __builtin_fabs(x); }
DEVICE double exp(double x) { return __builtin_exp(x); }
DEVICE double log(double x) { return __builtin_log(x); }
DEVICE int64_t __double_as_longlong(double x) { return emulation_bits<int64_t>(x); }
DEVICE double __longlong_as_double(int64_t x) { return emulation_bits<double>(x); }
DEVICE bool isnan(float x) { return __builtin_isnan(x); }
DEVICE bool isinf(float x) { return __builtin_isinf(x); }

template <typename T>
DEVICE T __ldg(const T* global) {
    return *global;
}

DEVICE void __syncthreads() { emulation_barrier(emulation::SYNCTHREADS, 0, 0, 0); }
DEVICE int __syncthreads_or(int predicate) { return emulation_barrier(emulation::SYNCTHREADS_OR, 0, 0, predicate); }
DEVICE int __syncthreads_and(int predicate) { return emulation_barrier(emulation::SYNCTHREADS_AND, 0, 0, predicate); }
DEVICE int __syncthreads_count(int predicate) { return emulation_barrier(emulation::SYNCTHREADS_COUNT, 0, 0, predicate); }
DEVICE void named_barrier(int id, int threads) { emulation_barrier(emulation::NAMED_BARRIER, id, threads, 0); }
DEVICE void __syncwarp(uint32_t mask = 0xffffffffu) { emulation_syncwarp(mask); }

template <int KIND, typename T>
DEVICE T emulation_shuffled(uint32_t mask, T value, int lane, int width) {
    if constexpr (sizeof(T) == 8) {
        return emulation_bits<T>(emulation_shuffle(KIND, mask, emulation_bits<uint64_t>(value), lane, width));
    } else {
        return emulation_bits<T>(static_cast<uint32_t>(emulation_shuffle(KIND, mask, emulation_bits<uint32_t>(value), lane, width)));
    }
}
template <typename T>
DEVICE T __shfl_sync(uint32_t mask, T value, int lane, int width = 32) {
    return emulation_shuffled<emulation::SHFL>(mask, value, lane, width);
}
template <typename T>
DEVICE T __shfl_up_sync(uint32_t mask, T value, uint32_t delta, int width = 32) {
    return emulation_shuffled<emulation::SHFL_UP>(mask, value, static_cast<int>(delta), width);
}
template <typename T>
DEVICE T __shfl_down_sync(uint32_t mask, T value, uint32_t delta, int width = 32) {
    return emulation_shuffled<emulation::SHFL_DOWN>(mask, value, static_cast<int>(delta), width);
}
template <typename T>
DEVICE T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32) {
    return emulation_shuffled<emulation::SHFL_XOR>(mask, value, lane_mask, width);
}

DEVICE uint32_t __ballot_sync(uint32_t mask, int predicate) { return emulation_vote(emulation::BALLOT, mask, predicate != 0); }
DEVICE int __any_sync(uint32_t mask, int predicate) { return static_cast<int>(emulation_vote(emulation::ANY_LANE, mask, predicate != 0)); }
DEVICE int __all_sync(uint32_t mask, int predicate) { return static_cast<int>(emulation_vote(emulation::ALL_LANE, mask, predicate != 0)); }
DEVICE uint32_t __activemask() = delete;
DEVICE uint32_t __reduce_add_sync(uint32_t mask, uint32_t value) { return emulation_vote(emulation::REDUCE_ADD, mask, value); }
DEVICE uint32_t __reduce_min_sync(uint32_t mask, uint32_t value) { return emulation_vote(emulation::REDUCE_MIN_U, mask, value); }
DEVICE uint32_t __reduce_max_sync(uint32_t mask, uint32_t value) { return emulation_vote(emulation::REDUCE_MAX_U, mask, value); }
DEVICE uint32_t __reduce_or_sync(uint32_t mask, uint32_t value) { return emulation_vote(emulation::REDUCE_OR, mask, value); }
DEVICE uint32_t __reduce_and_sync(uint32_t mask, uint32_t value) { return emulation_vote(emulation::REDUCE_AND, mask, value); }
DEVICE uint32_t __reduce_xor_sync(uint32_t mask, uint32_t value) { return emulation_vote(emulation::REDUCE_XOR, mask, value); }
DEVICE int32_t __reduce_add_sync(uint32_t mask, int32_t value) {
    return static_cast<int32_t>(emulation_vote(emulation::REDUCE_ADD, mask, static_cast<uint32_t>(value)));
}
DEVICE int32_t __reduce_min_sync(uint32_t mask, int32_t value) {
    return static_cast<int32_t>(emulation_vote(emulation::REDUCE_MIN_I, mask, static_cast<uint32_t>(value)));
}
DEVICE int32_t __reduce_max_sync(uint32_t mask, int32_t value) {
    return static_cast<int32_t>(emulation_vote(emulation::REDUCE_MAX_I, mask, static_cast<uint32_t>(value)));
}
template <typename T>
DEVICE uint32_t __match_any_sync(uint32_t mask, T value) {
    if constexpr (sizeof(T) == 8) {
        return emulation_match(mask, emulation_bits<uint64_t>(value));
    } else {
        return emulation_match(mask, emulation_bits<uint32_t>(value));
    }
}

// Keeps a parameter out of deduction.
template <typename T>
struct EmulationSame {
    using type = T;
};
template <typename T>
constexpr bool emulation_signed = static_cast<T>(-1) < static_cast<T>(0);
template <typename T>
DEVICE T emulation_atomically(int operation, T* address, T value, T expected = 0) {
    return static_cast<T>(
        emulation_atomic(operation, sizeof(T), address, static_cast<uint64_t>(value), static_cast<uint64_t>(expected)));
}
#define EMULATION_ATOMIC(name, operation)                                       \
    template <typename T>                                                       \
    DEVICE T name(T* address, typename EmulationSame<T>::type value) {          \
        static_assert(static_cast<T>(0.5f) == 0, "atomics here are of integers"); \
        return emulation_atomically(operation, address, value);                 \
    }
EMULATION_ATOMIC(atomicAdd, emulation::ATOMIC_ADD)
EMULATION_ATOMIC(atomicOr, emulation::ATOMIC_OR)
EMULATION_ATOMIC(atomicAnd, emulation::ATOMIC_AND)
EMULATION_ATOMIC(atomicXor, emulation::ATOMIC_XOR)
EMULATION_ATOMIC(atomicExch, emulation::ATOMIC_EXCH)
EMULATION_ATOMIC(atomicMin, emulation_signed<T> ? emulation::ATOMIC_MIN_I : emulation::ATOMIC_MIN_U)
EMULATION_ATOMIC(atomicMax, emulation_signed<T> ? emulation::ATOMIC_MAX_I : emulation::ATOMIC_MAX_U)
#undef EMULATION_ATOMIC
template <typename T>
DEVICE T atomicCAS(T* address, typename EmulationSame<T>::type expected, typename EmulationSame<T>::type value) {
    return emulation_atomically(emulation::ATOMIC_CAS, address, value, expected);
}

DEVICE void __threadfence() { emulation_fence(); }
DEVICE void __threadfence_system() { emulation_fence(); }
DEVICE void __threadfence_block() { emulation_fence(); }

template <typename T>
DEVICE T& shared_memory() {
    return *static_cast<T*>(emulation_shared());
}

DEVICE void cp_async_16(void* shared, const void* global) { emulation_cp_async(shared, global, 16, true); }
DEVICE void cp_async_16_or_zero(void* shared, const void* global, bool valid) { emulation_cp_async(shared, global, 16, valid); }
DEVICE void cp_async_16_or_zero_once(void* shared, const void* global, bool valid) { emulation_cp_async(shared, global, 16, valid); }
DEVICE void cp_async_16_or_zero_l1(void* shared, const void* global, bool valid) { emulation_cp_async(shared, global, 16, valid); }
DEVICE void cp_async_8(void* shared, const void* global) { emulation_cp_async(shared, global, 8, true); }
DEVICE void cp_async_4(void* shared, const void* global) { emulation_cp_async(shared, global, 4, true); }
DEVICE void cp_async_commit() { emulation_cp_async_commit(); }
template <int PENDING>
DEVICE void cp_async_wait() {
    static_assert(PENDING >= 0, "a number of groups");
    emulation_cp_async_wait(PENDING);
}

template <int COUNT>
DEVICE void emulation_matrices(uint32_t (&r)[COUNT], bool transposed, const void* row) {
    const EmulationWords words = emulation_ldmatrix(COUNT, transposed, row);
    for (int i = 0; i < COUNT; ++i) r[i] = words.r[i];
}
DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) { emulation_matrices(r, false, row); }
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { emulation_matrices(r, true, row); }
DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) { emulation_matrices(r, false, row); }
DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) { emulation_matrices(r, true, row); }
DEVICE uint32_t movmatrix_trans(uint32_t fragment) { return emulation_movmatrix(fragment); }

DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const EmulationFloats out = emulation_mma_bf16(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[0], b[1]);
    for (int i = 0; i < 4; ++i) c[i] = out.c[i];
}
DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const EmulationFloats out = emulation_mma_f16(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[0], b[1]);
    for (int i = 0; i < 4; ++i) c[i] = out.c[i];
}

DEVICE uint32_t pack_bf16(float low, float high) { return emulation_pack_bf16(low, high); }
DEVICE uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) { return emulation_fma_bf16x2(a, b, c); }
DEVICE float exp2_approx(float x) { return emulation_exp2(x); }
DEVICE float reciprocal_approx(float x) {
    const float out = 1.0f / x;
    return fabsf(out) < 0x1p-126f ? __uint_as_float(__float_as_uint(out) & 0x80000000u) : out;
}
DEVICE float max_nan(float a, float b) { return a != a || b != b ? __uint_as_float(0x7fffffffu) : fmaxf(a, b); }
DEVICE float relu(float x) { return x < 0.0f ? 0.0f : x; }

template <int LUT>
DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t out = 0;
    for (int i = 0; i < 8; ++i)
        if (LUT >> i & 1) out |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return out;
}

DEVICE uint4 load_once_16(const void* global) { return *static_cast<const uint4*>(global); }
DEVICE uint2 load_once_8(const void* global) { return *static_cast<const uint2*>(global); }
DEVICE void prefetch_l2(const void* global) { static_cast<void>(*static_cast<const volatile uint8_t*>(global)); }
DEVICE uint32_t load_published(const uint32_t* global) { return emulation_load_published(global, 4).r[0]; }
DEVICE float4 load_published_16(const float4* global) {
    const EmulationWords words = emulation_load_published(global, 16);
    return {__uint_as_float(words.r[0]), __uint_as_float(words.r[1]), __uint_as_float(words.r[2]), __uint_as_float(words.r[3])};
}

DEVICE void store_awaited_16(float4* global, const float4& value) {
    emulation_store_awaited(global, __float_as_uint(value.x), __float_as_uint(value.y), __float_as_uint(value.z), __float_as_uint(value.w));
}
DEVICE float4 load_awaited_16(const float4* global) {
    const EmulationWords words = emulation_load_awaited(global);
    return {__uint_as_float(words.r[0]), __uint_as_float(words.r[1]), __uint_as_float(words.r[2]), __uint_as_float(words.r[3])};
}

DEVICE void store_awaited_system_16(uint32_t* global, const uint32_t (&words)[4]) {
    emulation_store_awaited(global, words[0], words[1], words[2], words[3]);
}
DEVICE void load_awaited_system_16(const uint32_t* global, uint32_t (&words)[4]) {
    const EmulationWords found = emulation_load_awaited(global);
    for (int i = 0; i < 4; ++i) words[i] = found.r[i];
}
DEVICE void store_awaited_system(uint32_t* global, uint32_t value) { emulation_store_release(global, value); }
DEVICE uint32_t load_awaited_system(const uint32_t* global) { return emulation_load_acquire(global); }

DEVICE uint32_t load_acquire_system(const uint32_t* global) { return emulation_load_acquire(global); }
DEVICE uint64_t nanoseconds() { return emulation_nanoseconds(); }

// How the device calls a kernel: parameters as the launcher gave them, and a letter for the type of each to compare with.
constexpr char emulation_letter(const volatile void*) { return '?'; }
constexpr char emulation_letter(const int32_t*) { return 'i'; }
constexpr char emulation_letter(const uint32_t*) { return 'i'; }
constexpr char emulation_letter(const int64_t*) { return 'l'; }
constexpr char emulation_letter(const uint64_t*) { return 'l'; }
constexpr char emulation_letter(const float*) { return 'f'; }
constexpr char emulation_letter(const double*) { return 'd'; }
template <int... I>
struct EmulationIndices {};
template <int N, int... I>
struct EmulationCount : EmulationCount<N - 1, N - 1, I...> {};
template <int... I>
struct EmulationCount<0, I...> {
    using type = EmulationIndices<I...>;
};
template <typename T>
struct EmulationParameter {
    using type = T;
    static constexpr char letter = emulation_letter(static_cast<T*>(nullptr));
};
template <typename T>
struct EmulationParameter<const T> : EmulationParameter<T> {};
template <typename T>
struct EmulationParameter<T*> {
    using type = T*;
    static constexpr char letter = 'p';
};
template <typename... P, int... I>
__attribute__((no_sanitize("thread"))) void emulation_call(void (*kernel)(P...), void** args, EmulationIndices<I...>) {
    kernel(*static_cast<typename EmulationParameter<P>::type*>(args[I])...);
}
template <typename... P>
__attribute__((no_sanitize("thread"))) void emulation_unpack(void (*kernel)(P...), void** args) {
    emulation_call(kernel, args, typename EmulationCount<sizeof...(P)>::type{});
}
template <typename... P>
constexpr auto emulation_signature(void (*)(P...)) {
    struct Letters {
        char letters[sizeof...(P) + 1];
    };
    return Letters{{EmulationParameter<P>::letter..., '\0'}};
}
#define EMULATION_ENTRY(name)                                                                                     \
    extern "C" {                                                                                                  \
    __attribute__((no_sanitize("thread"))) void emulation_entry(void** args) { emulation_unpack(name, args); }    \
    extern const decltype(emulation_signature(name)) emulation_parameters;                                        \
    const decltype(emulation_signature(name)) emulation_parameters = emulation_signature(name);                   \
    }
