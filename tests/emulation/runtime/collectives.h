// What the lanes of a warp do together.
#pragma once

#include "matrices.h"
#include "scheduling.h"

namespace {

void load_matrices(Worker& w, Fiber* lanes, uint32_t count, bool transposed) {
    const uint32_t here = w.thread;
    for (uint32_t matrix = 0; matrix < count; ++matrix) {
        uint16_t rows[8][8];
        for (uint32_t row = 0; row < 8; ++row) {
            const Fiber& lane = lanes[matrix * 8 + row];
            w.thread = lane.index;
            w.now = w.clock[lane.warp()] << TIME_SHIFT | lane.index;
            aligned(w, lane.row, 16, "the row of an ldmatrix", lane.site);
            const uintptr_t byte = lane.row - w.shared_base;
            if (byte >= w.shared_bytes || w.shared_bytes - byte < 16) outside(w, lane.row, 16, Access::Matrix, lane.site);
            touch<Access::Matrix>(w, static_cast<uint32_t>(byte), 16, lane.site);
            memcpy(rows[row], reinterpret_cast<const void*>(lane.row), 16);
        }
        for (uint32_t lane = 0; lane < LANES; ++lane) lanes[lane].words[matrix] = fragment(rows, lane, transposed);
    }
    w.thread = here;
    refresh(w);
}

void shuffle(Worker& w, Fiber* lanes, int kind, uint32_t mask) {
    uint64_t values[LANES];
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) values[__builtin_ctz(rest)] = lanes[__builtin_ctz(rest)].value;
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest), width = lanes[lane].width, first = lane & ~(width - 1), last = first + width - 1;
        if (width < 1 || width > 32 || (width & (width - 1)) != 0)
            fail(w, lanes[lane].index, lanes[lane].site, "%s with width %d", COLLECTIVES[SHUFFLES + kind], width);
        const int argument = lanes[lane].argument;
        int source = lane;
        if (kind == SHFL) source = first + (argument & (width - 1));
        if (kind == SHFL_UP) source = argument >= 0 && lane - argument >= first ? lane - argument : lane;
        if (kind == SHFL_DOWN) source = argument >= 0 && lane + argument <= last ? lane + argument : lane;
        if (kind == SHFL_XOR) source = (lane ^ argument) <= last && (lane ^ argument) >= 0 ? lane ^ argument : lane;
        if ((mask >> source & 1) == 0)
            fail(w, lanes[lane].index, lanes[lane].site, "%s reads lane %d, which is not in its mask %#x", COLLECTIVES[SHUFFLES + kind],
                 source, mask);
        lanes[lane].value = values[source];
    }
}

void vote(Fiber* lanes, int kind, uint32_t mask) {
    uint32_t out = kind == ALL_LANE ? 1 : static_cast<uint32_t>(lanes[__builtin_ctz(mask)].value);
    if (kind == BALLOT || kind == ANY_LANE || kind == REDUCE_ADD || kind == REDUCE_XOR) out = 0;
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
        const uint32_t lane = __builtin_ctz(rest);
        const auto value = static_cast<uint32_t>(lanes[lane].value);
        switch (kind) {
            case BALLOT: out |= value << lane; break;
            case ANY_LANE:
            case REDUCE_OR: out |= value; break;
            case ALL_LANE:
            case REDUCE_AND: out &= value; break;
            case REDUCE_ADD: out += value; break;
            case REDUCE_XOR: out ^= value; break;
            case REDUCE_MIN_U: out = value < out ? value : out; break;
            case REDUCE_MAX_U: out = value > out ? value : out; break;
            case REDUCE_MIN_I: out = static_cast<int32_t>(value) < static_cast<int32_t>(out) ? value : out; break;
            default: out = static_cast<int32_t>(value) > static_cast<int32_t>(out) ? value : out; break;
        }
    }
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) lanes[__builtin_ctz(rest)].value = out;
}

void perform(Worker& w, uint32_t warp, uint8_t kind, uint32_t mask) {
    Fiber* lanes = w.fibers + warp * LANES;
    switch (kind) {
        case SYNCWARP: tick(w, warp); break;
        case MATCH: {
            uint64_t values[LANES];
            for (uint32_t lane = 0; lane < LANES; ++lane) values[lane] = lanes[lane].value;
            for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
                uint32_t same = 0;
                for (uint32_t others = mask; others != 0; others &= others - 1)
                    if (values[__builtin_ctz(others)] == values[__builtin_ctz(rest)]) same |= others & -others;
                lanes[__builtin_ctz(rest)].value = same;
            }
            break;
        }
        case MOVMATRIX: {
            uint16_t matrix[8][8];
            for (uint32_t lane = 0; lane < LANES; ++lane) {
                const auto pair = static_cast<uint32_t>(lanes[lane].value);
                matrix[lane / 4][2 * (lane % 4)] = static_cast<uint16_t>(pair);
                matrix[lane / 4][2 * (lane % 4) + 1] = static_cast<uint16_t>(pair >> 16);
            }
            for (uint32_t lane = 0; lane < LANES; ++lane) lanes[lane].value = fragment(matrix, lane, true);
            break;
        }
        case MMA_BF16: multiply<true>(lanes); break;
        case MMA_F16: multiply<false>(lanes); break;
        default:
            if (kind >= LDMATRIX && kind < MOVMATRIX)
                load_matrices(w, lanes, kind - LDMATRIX < 2 ? 2 : 4, (kind - LDMATRIX) % 2 != 0);
            else if (kind >= VOTES)
                vote(lanes, kind - VOTES, mask);
            else
                shuffle(w, lanes, kind - SHUFFLES, mask);
    }
}

// Waits for the other lanes of `mask`; the last one to arrive does the work of all.
void collective(Worker& w, uint8_t kind, uint32_t mask, uintptr_t site) {
    Fiber& fiber = *w.current;
    Warp& warp = w.warps[fiber.warp()];
    const uint32_t bit = 1u << fiber.lane();
    fiber.kind = kind;
    fiber.mask = mask;
    fiber.site = site;
    if ((mask & bit) == 0) fail(w, fiber.index, site, "%s(mask %#x): the mask lacks the lane itself", COLLECTIVES[kind], mask);
    uint32_t slot = 0;
    while (slot < warp.num_pending && (warp.pending[slot].kind != kind || warp.pending[slot].mask != mask)) ++slot;
    if (slot == warp.num_pending) warp.pending[warp.num_pending++] = {mask, 0, kind};
    Pending& pending = warp.pending[slot];
    pending.arrived |= bit;
    if (pending.arrived == mask) {
        pending = warp.pending[--warp.num_pending];
        perform(w, fiber.warp(), kind, mask);
        make_ready(w, fiber.warp(), mask & ~bit);
        refresh(w);
        return;
    }
    fiber.state = State::Collective;
    reschedule(w);
}

}  // namespace

EXPORT void emulation_syncwarp(uint32_t mask) { collective(*worker, SYNCWARP, mask, CALLER); }

EXPORT uint64_t emulation_shuffle(int kind, uint32_t mask, uint64_t value, int lane, int width) {
    Worker& w = *worker;
    Fiber& fiber = *w.current;
    fiber.value = value;
    fiber.argument = lane;
    fiber.width = width;
    collective(w, static_cast<uint8_t>(SHUFFLES + kind), mask, CALLER);
    return fiber.value;
}

EXPORT uint32_t emulation_vote(int kind, uint32_t mask, uint32_t value) {
    Worker& w = *worker;
    Fiber& fiber = *w.current;
    fiber.value = value;
    collective(w, static_cast<uint8_t>(VOTES + kind), mask, CALLER);
    return static_cast<uint32_t>(fiber.value);
}

EXPORT uint32_t emulation_match(uint32_t mask, uint64_t value) {
    Worker& w = *worker;
    Fiber& fiber = *w.current;
    fiber.value = value;
    collective(w, MATCH, mask, CALLER);
    return static_cast<uint32_t>(fiber.value);
}

EXPORT uint32_t emulation_movmatrix(uint32_t value) {
    Worker& w = *worker;
    Fiber& fiber = *w.current;
    fiber.value = value;
    collective(w, MOVMATRIX, ~0u, CALLER);
    return static_cast<uint32_t>(fiber.value);
}

struct Words {
    uint32_t r[4];
};
struct Floats {
    float c[4];
};

EXPORT Words emulation_ldmatrix(int count, int transposed, const void* row) {
    Worker& w = *worker;
    Fiber& fiber = *w.current;
    fiber.row = reinterpret_cast<uintptr_t>(row);
    collective(w, static_cast<uint8_t>(LDMATRIX + (count == 4 ? 2 : 0) + (transposed ? 1 : 0)), ~0u, CALLER);
    return {{fiber.words[0], fiber.words[1], fiber.words[2], fiber.words[3]}};
}

namespace {
Floats multiplied(uint8_t kind, const Floats& c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                  uintptr_t site) {
    Worker& w = *worker;
    Fiber& fiber = *w.current;
    memcpy(fiber.c, c.c, sizeof fiber.c);
    fiber.a[0] = a0, fiber.a[1] = a1, fiber.a[2] = a2, fiber.a[3] = a3;
    fiber.b[0] = b0, fiber.b[1] = b1;
    collective(w, kind, ~0u, site);
    return {{fiber.c[0], fiber.c[1], fiber.c[2], fiber.c[3]}};
}
}  // namespace

EXPORT Floats emulation_mma_bf16(float c0, float c1, float c2, float c3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                 uint32_t b1) {
    return multiplied(MMA_BF16, {{c0, c1, c2, c3}}, a0, a1, a2, a3, b0, b1, CALLER);
}

EXPORT Floats emulation_mma_f16(float c0, float c1, float c2, float c3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1) {
    return multiplied(MMA_F16, {{c0, c1, c2, c3}}, a0, a1, a2, a3, b0, b1, CALLER);
}
