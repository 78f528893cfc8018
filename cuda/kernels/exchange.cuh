// How the blocks of several ranks exchange what they have, over pointers into each other's memory.
//
// Every rank has a workspace, which the others write. A channel is one block of every rank. In an exchange each of them pushes a part into
// the others' slots, whose words say themselves that they are there: they are other than what a slot holds between exchanges, to which it
// is reset once it is read. So nobody waits until its stores have arrived, to say so with another, and what arrives first is used first.
// Exchanges are counted, in the workspace from launch to launch, so that launches can be replayed.
//
// There are four slots, used in turn. Who pushes exchange e + 4 has something of the launch before from all others, or of an exchange that
// `end_exchange` parts from those before: everybody had read and reset the slots of e by then. So no rank may be done with a launch, or
// with a pair of exchanges of it, before it has something that each of the others had to push something for.
//
// Constants: RANKS; CHANNELS of a workspace; SLOT_BYTES of a slot; THREADS of a block.
//
// Workspace, in words: status (0, or 1 + the rank that did not come, or ABORTED); from 32 on the exchanges so far of each channel; the
// slots [CHANNELS][4][RANKS - 1][SLOT_BYTES].
#pragma once

#include "rows.cuh"

constexpr int MAX_RANKS = 8;
constexpr int EPOCHS = 32, SLOTS = (EPOCHS + CHANNELS + 31) / 32 * 32, SLOT_WORDS = SLOT_BYTES / 4;
static_assert(RANKS >= 2 && RANKS <= MAX_RANKS, "pointers that a kernel has");
static_assert(SLOT_BYTES % 16 == 0, "slots are whole vectors");

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

// A word that is not there yet, and a NaN that is.
constexpr uint32_t NOT_THERE = 0xffffffffu, NAN_BITS = 0x7fffffffu;

struct Channel {
    int rank;
    bool failed; // what this thread waited for, or the group before
    uint32_t epoch;
    int64_t patience;
    uint32_t* own;

    // Has failed where the group has failed before: nobody waits for it again.
    DEVICE void open(uint32_t* const (&workspaces)[MAX_RANKS], int of, int64_t nanoseconds_at_most) {
        rank = of;
        patience = nanoseconds_at_most;
        own = of_rank(workspaces, rank);
        epoch = load_published(own + EPOCHS + blockIdx.x);
        failed = load_awaited_system(own) != 0;
    }

    DEVICE void close() const {
        // All threads have seen where the last launch ended.
        __syncthreads();
        if (threadIdx.x == 0) own[EPOCHS + blockIdx.x] = epoch;
    }

    // Where the part of rank `source` lies in the workspace of rank `to`, in this exchange. There is none for what it has itself.
    DEVICE uint32_t* slot(uint32_t* workspace, int source, int to) const {
        const int of_source = (source - to + RANKS) % RANKS - 1, turn = static_cast<int>(epoch & 3);
        return workspace + SLOTS + ((static_cast<int>(blockIdx.x) * 4 + turn) * (RANKS - 1) + of_source) * SLOT_WORDS;
    }

    // Waits for `source` as long as something is not there.
    template <typename There>
    DEVICE bool wait_for(int source, There there) const {
        uint64_t start = 0;
        for (uint32_t spins = 1; !there(); ++spins) {
            if (spins % 256 != 0) continue;
            const uint64_t now = nanoseconds();
            if (start == 0) start = now;
            if (load_awaited_system(own) != 0) return false;
            if (static_cast<int64_t>(now - start) > patience) {
                atomicCAS(own, 0u, 1u + static_cast<uint32_t>(source));
                return false;
            }
        }
        return true;
    }

    // Begins the next exchange.
    DEVICE void next() { ++epoch; }

    // Where another follows in this launch: nobody sees what is pushed next before the slots of this rank are reset.
    DEVICE void end_exchange() const {
        __syncthreads();
        __threadfence_system();
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

    // Pushes it to a slot.
    DEVICE void push(uint32_t* slot, int index) const {
        Vector sent;
#pragma unroll
        for (int i = 0; i < CELL_WORDS; ++i) sent.words[i] = words[i] == NOT_THERE ? NAN_BITS : words[i];
        sent.put(slot + index * CELL_WORDS);
    }

    // Pushes it to all others, beginning with the next one: so that they are not all written by all at once.
    DEVICE void push_to_others(const Channel& channel, uint32_t* const (&workspaces)[MAX_RANKS], int index) const {
#pragma unroll
        for (int i = 1; i < RANKS; ++i) {
            const int other = (channel.rank + i) % RANKS;
            push(channel.slot(of_rank(workspaces, other), channel.rank, other), index);
        }
    }

    // Takes as much as is there of what `source` pushes.
    DEVICE void peek(const Channel& channel, int source, int index) {
        const uint32_t* cell = channel.slot(channel.own, source, channel.rank) + index * CELL_WORDS;
        if constexpr (CELL_WORDS == 4) {
            load_awaited_system_16(cell, words);
        } else {
#pragma unroll
            for (int i = 0; i < CELL_WORDS; ++i) words[i] = load_awaited_system(cell + i);
        }
    }

    // After a first `peek`: takes all of it, and leaves the slot as it was.
    DEVICE void await(Channel& channel, int source, int index) {
        const auto there = [&] {
            bool all = true;
#pragma unroll
            for (int i = 0; i < CELL_WORDS; ++i) all = all && words[i] != NOT_THERE;
            if (!all) peek(channel, source, index);
            return all;
        };
        if (channel.failed || !channel.wait_for(source, there)) {
            channel.failed = true;
            return;
        }
        Vector nothing;
#pragma unroll
        for (int i = 0; i < CELL_WORDS; ++i) nothing.words[i] = NOT_THERE;
        nothing.put(channel.slot(channel.own, source, channel.rank) + index * CELL_WORDS);
    }

    DEVICE void put(uint32_t* cell) const {
        if constexpr (CELL_WORDS == 4) {
            store_awaited_system_16(cell, words);
        } else {
#pragma unroll
            for (int i = 0; i < CELL_WORDS; ++i) store_awaited_system(cell + i, words[i]);
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

// Likewise of what `source` pushes.
template <typename Elements, typename Store>
DEVICE void await_in_batches(Channel& channel, int source, int count, Store store) {
    in_batches<Elements>(
        count, [&](Elements& x, int i) { x.peek(channel, source, i); },
        [&](Elements& x, int i) {
            x.await(channel, source, i);
            store(x, i);
        });
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

    // A vector of every rank: this rank has `own`, and the others' are at `index` of its slots, as far as they are there.
    DEVICE static void peek_all(const Channel& channel, const Elements& own, int index, Elements (&parts)[RANKS]) {
#pragma unroll
        for (int source = 0; source < RANKS; ++source) {
            Elements part = own;
            if (source != channel.rank) part.peek(channel, source, index);
            parts[source] = part;
        }
    }

    DEVICE static void await_all(Channel& channel, int index, Elements (&parts)[RANKS]) {
#pragma unroll
        for (int source = 0; source < RANKS; ++source) {
            if (source != channel.rank) parts[source].await(channel, source, index);
        }
    }

    DEVICE static Elements of(const Elements (&parts)[RANKS]) {
        Sum sum;
#pragma unroll
        for (int source = 0; source < RANKS; ++source) sum.add(parts[source], source == 0);
        return sum.rounded();
    }

    DEVICE static Elements over_ranks(Channel& channel, const Elements& own, int index) {
        Elements parts[RANKS];
        peek_all(channel, own, index, parts);
        await_all(channel, index, parts);
        return of(parts);
    }
};
