// What kernels and the runtime call operations between them.
#pragma once

namespace emulation {

enum BarrierCode { SYNCTHREADS, SYNCTHREADS_OR, SYNCTHREADS_AND, SYNCTHREADS_COUNT, NAMED_BARRIER };
enum ShuffleCode { SHFL, SHFL_UP, SHFL_DOWN, SHFL_XOR, NUM_SHUFFLES };
enum VoteCode {
    BALLOT,
    ANY_LANE,
    ALL_LANE,
    REDUCE_ADD,
    REDUCE_MIN_U,
    REDUCE_MAX_U,
    REDUCE_MIN_I,
    REDUCE_MAX_I,
    REDUCE_OR,
    REDUCE_AND,
    REDUCE_XOR,
    NUM_VOTES
};
enum AtomicCode {
    ATOMIC_ADD,
    ATOMIC_OR,
    ATOMIC_AND,
    ATOMIC_XOR,
    ATOMIC_MIN_U,
    ATOMIC_MAX_U,
    ATOMIC_MIN_I,
    ATOMIC_MAX_I,
    ATOMIC_EXCH,
    ATOMIC_CAS
};

}  // namespace emulation
