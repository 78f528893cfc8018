// How the blocks of several ranks exchange what they have, over pointers into each other's memory.
//
// Every rank has a workspace, which the others write. A channel is one block of every rank. In an exchange each of them pushes a part into
// the others' slots, raises its flag there, and waits for the others' flags in its own workspace: what it then reads is local. Flags hold
// the number of the exchange, which only grows: it is kept in the workspace from launch to launch, so that launches can be replayed.
//
// Slots are in pairs, used in turn. Who pushes exchange e + 2 has the flags of e + 1 from everybody, and everybody raised them after it had
// read the slots of e: no slot is written before it was read, and one wait is enough for each exchange.
//
// Constants: RANKS; CHANNELS of a workspace; SLOT_BYTES of a slot; THREADS of a block.
//
// Workspace, in words: status (0, or 1 + the rank that did not come, or ABORTED); from 32 on the exchanges so far of each channel; the
// flags [CHANNELS][RANKS]; the slots [CHANNELS][2][RANKS][SLOT_BYTES].
#pragma once

#include "rows.cuh"

constexpr int MAX_RANKS = 8;
constexpr int EPOCHS = 32, FLAGS = EPOCHS + CHANNELS, SLOTS = (FLAGS + CHANNELS * RANKS + 31) / 32 * 32, SLOT_WORDS = SLOT_BYTES / 4;
static_assert(RANKS >= 2 && RANKS <= MAX_RANKS, "pointers that a kernel has");
static_assert(SLOT_BYTES % 16 == 0 && THREADS >= 32, "slots are whole vectors, and a warp waits for all ranks");

// Parameters of a kernel, a pointer of every rank, and all of them.
#define BY_RANK(TYPE, name) TYPE name##0, TYPE name##1, TYPE name##2, TYPE name##3, TYPE name##4, TYPE name##5, TYPE name##6, TYPE name##7
#define OF_RANKS(name) {name##0, name##1, name##2, name##3, name##4, name##5, name##6, name##7}

DEVICE int at_most(int64_t left, int count) { return left < count ? static_cast<int>(left > 0 ? left : 0) : count; }

// One of several pointers, without an array in memory.
template <typename T>
DEVICE T* of_rank(T* const (&all)[MAX_RANKS], int rank) {
    T* one = all[0];
#pragma unroll
    for (int i = 1; i < RANKS; ++i) one = rank == i ? all[i] : one;
    return one;
}

struct Channel {
    int rank;
    uint32_t epoch;
    int64_t patience;
    uint32_t* own;

    // Fails where the group has failed before: nobody waits for it again.
    DEVICE bool open(uint32_t* const (&workspaces)[MAX_RANKS], int of, int64_t nanoseconds_at_most) {
        rank = of;
        patience = nanoseconds_at_most;
        own = of_rank(workspaces, rank);
        epoch = load_published(own + EPOCHS + blockIdx.x);
        return !__syncthreads_or(threadIdx.x == 0 && load_acquire_system(own) != 0);
    }

    DEVICE void close() const {
        if (threadIdx.x == 0) own[EPOCHS + blockIdx.x] = epoch;
    }

    // Where the part of rank `source` lies in a workspace, in this exchange.
    DEVICE uint32_t* slot(uint32_t* workspace, int source) const {
        return workspace + SLOTS + ((static_cast<int>(blockIdx.x) * 2 + static_cast<int>(epoch & 1)) * RANKS + source) * SLOT_WORDS;
    }

    DEVICE bool wait_for(int source) const {
        const uint32_t* flag = own + FLAGS + blockIdx.x * RANKS + source;
        uint64_t start = 0;
        // A difference, since the count may wrap around.
        for (uint32_t spins = 1; static_cast<int32_t>(load_acquire_system(flag) - epoch) < 0; ++spins) {
            if (spins % 256 != 0) continue;
            const uint64_t now = nanoseconds();
            if (start == 0) start = now;
            if (load_acquire_system(own) != 0) return false;
            if (static_cast<int64_t>(now - start) > patience) {
                atomicCAS(own, 0u, 1u + static_cast<uint32_t>(source));
                return false;
            }
        }
        return true;
    }

    // Begins the next exchange.
    DEVICE void next() { ++epoch; }

    // After all threads have pushed: whether everybody has.
    DEVICE bool meet(uint32_t* const (&workspaces)[MAX_RANKS]) const {
        __syncthreads();
        const int other = threadIdx.x;
        bool late = false;
        if (other < RANKS && other != rank) {
            store_release_system(of_rank(workspaces, other) + FLAGS + blockIdx.x * RANKS + rank, epoch);
            late = !wait_for(other);
        }
        return !__syncthreads_or(late);
    }
};

// A vector of COUNT elements of BYTES each, 16 bytes at most: as it lies in memory, and in a slot, where it takes CELL_WORDS words.
template <int BYTES, int COUNT>
struct Vector {
    static_assert(COUNT == 1 || (BYTES * COUNT % 4 == 0 && BYTES * COUNT <= 16), "whole words or a single element");
    static constexpr int CELL_WORDS = (BYTES * COUNT + 3) / 4;
    uint32_t words[CELL_WORDS];

    DEVICE void load(const void* global, int64_t index) {
        if constexpr (BYTES * COUNT == 2) {
            words[0] = static_cast<const uint16_t*>(global)[index];
        } else {
            load_words(static_cast<const uint32_t*>(global) + index * CELL_WORDS, words);
        }
    }

    DEVICE void store(void* global, int64_t index) const {
        if constexpr (BYTES * COUNT == 2) {
            static_cast<uint16_t*>(global)[index] = static_cast<uint16_t>(words[0]);
        } else {
            store_words(static_cast<uint32_t*>(global) + index * CELL_WORDS, words);
        }
    }

    DEVICE void push(uint32_t* slot, int index) const { store_words(slot + index * CELL_WORDS, words); }

    // Past the L1, which may have the slot as it was two exchanges ago.
    DEVICE void take(const uint32_t* slot, int index) {
        if constexpr (CELL_WORDS == 4) {
            const float4 four = load_published_16(reinterpret_cast<const float4*>(slot) + index);
            words[0] = __float_as_uint(four.x), words[1] = __float_as_uint(four.y);
            words[2] = __float_as_uint(four.z), words[3] = __float_as_uint(four.w);
        } else {
#pragma unroll
            for (int i = 0; i < CELL_WORDS; ++i) words[i] = load_published(slot + index * CELL_WORDS + i);
        }
    }

    // Pushes it to all others, beginning with the next one: so that they are not all written by all at once.
    DEVICE void push_to_others(const Channel& channel, uint32_t* const (&workspaces)[MAX_RANKS], int index) const {
#pragma unroll
        for (int i = 1; i < RANKS; ++i) {
            const int other = (channel.rank + i) % RANKS;
            push(channel.slot(of_rank(workspaces, other), channel.rank), index);
        }
    }
};

// Vectors of a thread that are under way together. Loads must be written in front of stores: they may be to the same place.
constexpr int BATCH = THREADS <= 512 ? (RANKS == 2 ? 4 : 2) : RANKS == 2 ? 2 : 1;

// Loads and stores `count` vectors of the block.
template <typename Elements, typename Load, typename Store>
DEVICE void in_batches(int count, Load load, Store store) {
    for (int first = threadIdx.x; first < count; first += BATCH * THREADS) {
        Elements x[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            if (first + i * THREADS < count) load(x[i], first + i * THREADS);
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            if (first + i * THREADS < count) store(x[i], first + i * THREADS);
        }
    }
}

// A sum over ranks: in f32, in rank order, rounded once.
template <bool FLOAT, int COUNT>
struct Sum {
    using Elements = Vector<FLOAT ? 4 : 2, COUNT>;
    float values[COUNT];

    DEVICE void add(const Elements& x, bool first) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            float value;
            if constexpr (FLOAT) {
                value = __uint_as_float(x.words[i]);
            } else {
                value = i % 2 == 0 ? bf16_low(x.words[i / 2]) : bf16_high(x.words[i / 2]);
            }
            values[i] = first ? value : values[i] + value;
        }
    }

    DEVICE Elements rounded() const {
        Elements x;
        if constexpr (FLOAT) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) x.words[i] = __float_as_uint(values[i]);
        } else {
            narrow_to_bf16(values, x.words);
        }
        return x;
    }

    // A vector of every rank: this rank has `own`, and the others' are at `index` of its slots.
    DEVICE static void take_all(const Channel& channel, const Elements& own, int index, Elements (&parts)[RANKS]) {
#pragma unroll
        for (int source = 0; source < RANKS; ++source) {
            Elements part = own;
            if (source != channel.rank) part.take(channel.slot(channel.own, source), index);
            parts[source] = part;
        }
    }

    DEVICE static Elements of(const Elements (&parts)[RANKS]) {
        Sum sum;
#pragma unroll
        for (int source = 0; source < RANKS; ++source) sum.add(parts[source], source == 0);
        return sum.rounded();
    }

    DEVICE static Elements over_ranks(const Channel& channel, const Elements& own, int index) {
        Elements parts[RANKS];
        take_all(channel, own, index, parts);
        return of(parts);
    }
};
