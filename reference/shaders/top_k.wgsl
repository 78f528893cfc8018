// One workgroup a row: the positions of its `k` best scores, ascending.
//
// The rank of the last place is found digit by digit; what ranks above it is in, and what equals it fills the places that are left, from
// the lowest position on. Scores are compared as integers: -0.0 equals +0.0, NaN is below every number.

// Scores of a lane and round of the last pass.
const ITEMS: u32 = 4u;
const DIGITS: u32 = 256u;
// Digits of a lane.
override LANE_DIGITS: u32 = DIGITS / WORKGROUP;

struct Params {
    // Of the step: the first of the chunk's rows.
    first_row: u32,
    rows: u32,
    columns: u32,
    k: u32,
}

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read> positions: array<u32>;
@group(0) @binding(1) var<storage, read> logits: array<u32>;
@group(0) @binding(2) var<storage, read_write> out: array<i32>;

var<workgroup> counts: array<atomic<u32>, DIGITS>;
var<workgroup> sums: array<u32, WORKGROUP>;
// The digit of the last place, and how many places are left for it.
var<workgroup> last_digit: vec2<u32>;

// A score as an integer of its order.
fn rank_of(bits: u32) -> u32 {
    if (bits & 0x7fffffffu) > 0x7f800000u {
        return 0u;
    }
    if bits == 0x80000000u {
        return bits;
    }
    return select(bits | 0x80000000u, ~bits, bits >> 31u == 1u);
}

// The sum of the values of this lane and those before it; all lanes call it. `sums` then holds that of every lane, until the next call.
fn scan(value: u32, lane: u32) -> u32 {
    workgroupBarrier();
    sums[lane] = value;
    workgroupBarrier();
    var sum = value;
    for (var step = 1u; step < WORKGROUP; step *= 2u) {
        if lane >= step {
            sum += sums[lane - step];
        }
        workgroupBarrier();
        sums[lane] = sum;
        workgroupBarrier();
    }
    return sum;
}

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = flat(group, groups);
    if row >= params.rows {
        return;
    }
    let k = params.k;
    let visible = positions[params.first_row + row] + 1u;
    let places = (params.first_row + row) * k;
    if visible <= k {
        for (var i = lane; i < k; i += WORKGROUP) {
            out[places + i] = select(-1, i32(i), i < visible);
        }
        return;
    }
    let start = row * params.columns;

    var found = 0u;
    var left = k;
    for (var shift = 32u; shift > 0u;) {
        shift -= 8u;
        for (var digit = lane; digit < DIGITS; digit += WORKGROUP) {
            atomicStore(&counts[digit], 0u);
        }
        workgroupBarrier();
        for (var s = lane; s < visible; s += WORKGROUP) {
            let rank = rank_of(logits[start + s]);
            // A shift by 32 bits is one by none.
            if shift == 24u || rank >> (shift + 8u) == found >> (shift + 8u) {
                atomicAdd(&counts[(rank >> shift) % DIGITS], 1u);
            }
        }
        workgroupBarrier();
        // From the highest digit down.
        let highest = DIGITS - 1u - lane * LANE_DIGITS;
        var own = 0u;
        for (var i = 0u; i < LANE_DIGITS; i++) {
            own += atomicLoad(&counts[highest - i]);
        }
        let until = scan(own, lane);
        if until >= left && until - own < left {
            var above = until - own;
            for (var i = 0u; i < LANE_DIGITS; i++) {
                let count = atomicLoad(&counts[highest - i]);
                if above < left && left <= above + count {
                    last_digit = vec2(highest - i, left - above);
                }
                above += count;
            }
        }
        workgroupBarrier();
        found |= last_digit.x << shift;
        left = last_digit.y;
        workgroupBarrier();
    }

    // What ranks above in the lower half, what equals in the upper one.
    var above_before = 0u;
    var equal_before = 0u;
    for (var first = 0u; first < visible; first += WORKGROUP * ITEMS) {
        var own = 0u;
        for (var i = 0u; i < ITEMS; i++) {
            let s = first + lane * ITEMS + i;
            if s < visible {
                let rank = rank_of(logits[start + s]);
                own += select(0u, 1u, rank > found) + select(0u, 0x10000u, rank == found);
            }
        }
        let before = scan(own, lane) - own;
        var above = above_before + before % 0x10000u;
        var equal = equal_before + before / 0x10000u;
        for (var i = 0u; i < ITEMS; i++) {
            let s = first + lane * ITEMS + i;
            if s < visible {
                let rank = rank_of(logits[start + s]);
                if rank > found || (rank == found && equal < left) {
                    out[places + above + min(equal, left)] = i32(s);
                }
                above += select(0u, 1u, rank > found);
                equal += select(0u, 1u, rank == found);
            }
        }
        let all = sums[WORKGROUP - 1u];
        above_before += all % 0x10000u;
        equal_before += all / 0x10000u;
    }
}
