// One workgroup a row: the token, its log-probability, and the best tokens. `sample_wide.wgsl` goes before it.
//
// Tokens are ordered by key and, of equal keys, by id: twelve digits of eight bits, by which a cut is found, of so many tokens or of so much
// probability. The draw is Gumbel-max: in f32, then again, exactly, for the tokens that are so close that f32 might take the wrong one.

const DIGITS: u32 = 256u;
const PLACES: u32 = 12u;

// Words of a request, in their order; numbers are f64s.
const REQUEST: u32 = 16u;
const SEED: u32 = 0u;
const POSITION: u32 = 2u;
// A token, or none.
const FORCED: u32 = 3u;
const FLAGS: u32 = 4u;
const TOP_K: u32 = 5u;
// `log2 e / temperature`, `-ln min_p * temperature`, `top_p * 2^64`.
const DEPTH: u32 = 6u;
const MIN_P: u32 = 8u;
const TOP_P: u32 = 10u;
const NONE: u32 = 0xffffffffu;

const GREEDY: u32 = 1u;
const HAS_MIN_P: u32 = 2u;
const HAS_TOP_P: u32 = 4u;

// No noise is larger, in units of ln 2; and nobody who has more than twice that less than the best is drawn.
const MOST_NOISE: f32 = 24.1;
const DEEPEST: u32 = 50u;
// How far f32 may be off, many times over.
const MARGIN: f32 = 0.02;

const NOT_A_NUMBER: u32 = 0x7fc00000u;
const NEGATIVE_INFINITY: u32 = 0xff800000u;

struct Params {
    rows: u32,
    vocab: u32,
    // The first of the rows, and the best tokens that are reported.
    first: u32,
    top: u32,
}

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read> logits: array<u32>;
// Of the logits; then of how far they are from the best. A lane reads what it has written itself.
@group(0) @binding(1) var<storage, read_write> keys: array<vec2<u32>>;
@group(0) @binding(2) var<storage, read> requests: array<u32>;
@group(0) @binding(3) var<storage, read_write> token_ids: array<u32>;
@group(0) @binding(4) var<storage, read_write> logprobs: array<u32>;
@group(0) @binding(5) var<storage, read_write> top_ids: array<u32>;
@group(0) @binding(6) var<storage, read_write> top_logprobs: array<u32>;

// Of the lanes, of which there are at most so many. A token's place in the order: key, then the complement of its id.
var<workgroup> best_of: array<vec3<u32>, 256>;
var<workgroup> sums: array<f32, 256>;
var<workgroup> low: array<atomic<u32>, DIGITS>;
var<workgroup> high: array<atomic<u32>, DIGITS>;
// The digit of a cut, and what is left for it.
var<workgroup> found: vec3<u32>;

fn below(a: vec3<u32>, b: vec3<u32>) -> bool {
    return less(a.xy, b.xy) || (same(a.xy, b.xy) && a.z < b.z);
}

// The highest of all lanes' places, on every lane. All lanes call it.
fn highest(place: vec3<u32>, lane: u32) -> vec3<u32> {
    workgroupBarrier();
    best_of[lane] = place;
    workgroupBarrier();
    for (var step = WORKGROUP / 2u; step > 0u; step /= 2u) {
        if lane < step && below(best_of[lane], best_of[lane + step]) {
            best_of[lane] = best_of[lane + step];
        }
        workgroupBarrier();
    }
    return best_of[0];
}

// The sum of all lanes' values, on every lane. All lanes call it.
fn sum_over(value: f32, lane: u32) -> f32 {
    sums[lane] = value;
    workgroupBarrier();
    for (var step = WORKGROUP / 2u; step > 0u; step /= 2u) {
        if lane < step {
            sums[lane] += sums[lane + step];
        }
        workgroupBarrier();
    }
    return sums[0];
}

fn raw_place(start: u32, id: u32) -> vec3<u32> {
    return vec3(key_of_float(logits[start + id]), ~id);
}

fn place_of(start: u32, id: u32) -> vec3<u32> {
    return vec3(keys[start + id], ~id);
}

// The log-probability of a raw logit, as bits.
fn logprob(bits: u32, most: u32, log_total: f32) -> u32 {
    let key = key_of_float(bits);
    let best = key_of_float(most);
    if same(best, NAN_KEY) {
        return NOT_A_NUMBER;
    }
    if same(key, best) {
        return bitcast<u32>(-log_total);
    }
    if same(key, NAN_KEY) || same(key, NEGATIVE_INFINITY_KEY) || same(best, INFINITY_KEY) {
        return NEGATIVE_INFINITY;
    }
    return bitcast<u32>((bitcast<f32>(bits) - bitcast<f32>(most)) - log_total);
}

// A key less the best one, as f64s: what that rounds away ties.
fn from_best(key: vec2<u32>, best: vec2<u32>) -> vec2<u32> {
    if same(key, best) {
        return ZERO_KEY;
    }
    if same(key, NAN_KEY) || same(key, NEGATIVE_INFINITY_KEY) || same(best, INFINITY_KEY) {
        return NEGATIVE_INFINITY_KEY;
    }
    var least = wide_of(bits_of(best));
    least.negative = !least.negative;
    return key_of(sum_of(wide_of(bits_of(key)), least));
}

// How far below the best, in units of `temperature * ln 2`, in units of 2^-56; all ones where that is 64 or more.
fn depth_of(key: vec2<u32>, depth: Wide) -> vec2<u32> {
    if same(key, NEGATIVE_INFINITY_KEY) {
        return vec2(NONE);
    }
    return fixed_of(times(wide_of(bits_of(key)), depth));
}

fn as_float(fixed: vec2<u32>) -> f32 {
    return f32(fixed.x) * 0x1p-24f + f32(fixed.y) * 0x1p-56f;
}

// Digit `place` of twelve, the highest first.
fn digit_of(at: vec3<u32>, place: u32) -> u32 {
    return (at[place / 4u] >> (24u - place % 4u * 8u)) & 0xffu;
}

// Whether the first `count` digits are the same.
fn agrees(a: vec3<u32>, b: vec3<u32>, count: u32) -> bool {
    for (var word = 0u; word < 3u; word++) {
        let digits = min(max(count, 4u * word) - 4u * word, 4u);
        if digits > 0u && (a[word] ^ b[word]) >> (32u - 8u * digits) != 0u {
            return false;
        }
    }
    return true;
}

// What a token counts for: one, or its probability.
fn weight_of_token(at: vec3<u32>, by_mass: bool, depth: Wide) -> vec2<u32> {
    if by_mass {
        return power_of(depth_of(at.xy, depth));
    }
    return vec2(0u, 1u);
}

// Adds to a bin.
fn add(bin: u32, weight: vec2<u32>) {
    let before = atomicAdd(&low[bin], weight.y);
    let carry = select(0u, 1u, before + weight.y < before);
    atomicAdd(&high[bin], weight.x + carry);
}

fn clear_bins(lane: u32) {
    workgroupBarrier();
    for (var bin = lane; bin < DIGITS; bin += WORKGROUP) {
        atomicStore(&low[bin], 0u);
        atomicStore(&high[bin], 0u);
    }
    workgroupBarrier();
}

// What all tokens from `cut` on count for. All lanes call it.
fn total_from(start: u32, cut: vec3<u32>, by_mass: bool, depth: Wide, lane: u32) -> vec2<u32> {
    clear_bins(lane);
    for (var id = lane; id < params.vocab; id += WORKGROUP) {
        let at = place_of(start, id);
        if !below(at, cut) {
            add(0u, weight_of_token(at, by_mass, depth));
        }
    }
    workgroupBarrier();
    return vec2(atomicLoad(&high[0]), atomicLoad(&low[0]));
}

// The last of the best tokens, none below `cut`, that together count for `wanted`. All lanes call it.
fn cut_at(start: u32, cut: vec3<u32>, wanted: vec2<u32>, by_mass: bool, depth: Wide, lane: u32) -> vec3<u32> {
    var last = vec3(0u);
    var left = wanted;
    for (var place = 0u; place < PLACES; place++) {
        clear_bins(lane);
        for (var id = lane; id < params.vocab; id += WORKGROUP) {
            let at = place_of(start, id);
            if !below(at, cut) && agrees(at, last, place) {
                add(digit_of(at, place), weight_of_token(at, by_mass, depth));
            }
        }
        workgroupBarrier();
        if lane == 0u {
            var rest = left;
            for (var i = 0u; i < DIGITS; i++) {
                let bin = DIGITS - 1u - i;
                let weight = vec2(atomicLoad(&high[bin]), atomicLoad(&low[bin]));
                if !less(weight, rest) {
                    found = vec3(bin, rest);
                    break;
                }
                rest = minus(rest, weight);
            }
        }
        workgroupBarrier();
        last[place / 4u] |= found.x << (24u - place % 4u * 8u);
        left = found.yz;
    }
    return last;
}

// The random word's upper 23 bits: Philox4x32-10 of the request's seed, as the module `sampling` has it.
fn random_of(request: u32, id: u32) -> u32 {
    var counter = vec4(id / 4u, requests[request + POSITION], 0u, 0u);
    var key = vec2(requests[request + SEED], requests[request + SEED + 1u]);
    for (var round = 0u; round < 10u; round++) {
        let a = product(counter.x, 0xd2511f53u);
        let b = product(counter.z, 0xcd9e8d57u);
        counter = vec4(b.x ^ counter.y ^ key.x, b.y, a.x ^ counter.w ^ key.y, a.y);
        key += vec2(0x9e3779b9u, 0xbb67ae85u);
    }
    return counter[id % 4u] >> 9u;
}

// `-log2(-ln u)`, nearly.
fn noise_of(n: u32) -> f32 {
    // How far `u` is below one, exactly.
    let short = (8388607.5 - f32(n)) * 0x1p-23f;
    var a = -log((f32(n) + 0.5) * 0x1p-23f);
    if short < 0.01 {
        a = short * (1.0 + short * (0.5 + short / 3.0));
    }
    return -log2(a);
}

// The kept token, none below `cut`, with the highest of probability and noise. All lanes call it.
fn draw(start: u32, request: u32, cut: vec3<u32>, depth: Wide, lane: u32) -> u32 {
    var most = -1e30;
    for (var id = lane; id < params.vocab; id += WORKGROUP) {
        let at = place_of(start, id);
        if below(at, cut) {
            continue;
        }
        let down = as_float(depth_of(at.xy, depth));
        if MOST_NOISE - down >= most {
            most = max(most, noise_of(random_of(request, id)) - down);
        }
    }
    most = workgroup_max_of(most, lane);
    // Token 0 has to do where a device's logarithms are so poor that nobody is near `most`: never one outside the vocabulary.
    var chosen = vec3(0u, 0u, ~0u);
    for (var id = lane; id < params.vocab; id += WORKGROUP) {
        let at = place_of(start, id);
        if below(at, cut) {
            continue;
        }
        let fixed = depth_of(at.xy, depth);
        let down = as_float(fixed);
        if MOST_NOISE - down < most || fixed.x >> 24u >= DEEPEST {
            continue;
        }
        let n = random_of(request, id);
        if noise_of(n) - down >= most - MARGIN {
            // 96 less both: positive, and the higher the better.
            let value = minus(minus(vec2(96u << 24u, 0u), fixed), log_log_of(n));
            let own = vec3(value, ~id);
            if below(chosen, own) {
                chosen = own;
            }
        }
    }
    return ~highest(chosen, lane).z;
}

fn workgroup_max_of(value: f32, lane: u32) -> f32 {
    // Through the order of keys, which every lane's value has.
    return bitcast<f32>(highest(vec3(key_of_float(bitcast<u32>(value)), bitcast<u32>(value)), lane).z);
}

fn choose(start: u32, request: u32, raw: vec3<u32>, lane: u32) -> u32 {
    var own = vec3(0u);
    for (var id = lane; id < params.vocab; id += WORKGROUP) {
        let at = place_of(start, id);
        if below(own, at) {
            own = at;
        }
    }
    let best = highest(own, lane);
    let flags = requests[request + FLAGS];
    if same(best.xy, NAN_KEY) || same(best.xy, NEGATIVE_INFINITY_KEY) {
        // Nothing is left to choose.
        return ~raw.z;
    }
    if (flags & GREEDY) != 0u {
        return ~best.z;
    }
    let depth = wide_of(vec2(requests[request + DEPTH], requests[request + DEPTH + 1u]));
    for (var id = lane; id < params.vocab; id += WORKGROUP) {
        keys[start + id] = from_best(keys[start + id], best.xy);
    }
    // Above negative infinity, and what `min_p` leaves.
    var cut = vec3(plus(NEGATIVE_INFINITY_KEY, vec2(0u, 1u)), 0u);
    if (flags & HAS_MIN_P) != 0u {
        var least = wide_of(vec2(requests[request + MIN_P], requests[request + MIN_P + 1u]));
        least.negative = true;
        cut = vec3(key_of(least), 0u);
    }
    let top_k = vec2(0u, requests[request + TOP_K]);
    if top_k.y > 0u && less(top_k, total_from(start, cut, false, depth, lane)) {
        cut = cut_at(start, cut, top_k, false, depth, lane);
    }
    if (flags & HAS_TOP_P) != 0u {
        let total = total_from(start, cut, true, depth, lane);
        var enough = upper_product(total, vec2(requests[request + TOP_P], requests[request + TOP_P + 1u]));
        if same(enough, vec2(0u)) {
            enough.y = 1u;
        }
        cut = cut_at(start, cut, enough, true, depth, lane);
    }
    return draw(start, request, cut, depth, lane);
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
    let start = row * params.vocab;
    let request = (params.first + row) * REQUEST;
    var own = vec3(0u);
    for (var id = lane; id < params.vocab; id += WORKGROUP) {
        let at = raw_place(start, id);
        if below(own, at) {
            own = at;
        }
    }
    let raw = highest(own, lane);
    let most = logits[start + ~raw.z];
    var sum = 0.0;
    for (var id = lane; id < params.vocab; id += WORKGROUP) {
        // Without what is far below, and of what has no logarithm nothing.
        let bits = logprob(logits[start + id], most, 0.0);
        if bits != NEGATIVE_INFINITY && bits != NOT_A_NUMBER {
            sum += exp(bitcast<f32>(bits));
        }
    }
    let log_total = log(sum_over(sum, lane));

    var token = requests[request + FORCED];
    if token == NONE {
        token = choose(start, request, raw, lane);
    }
    let out = params.first + row;
    if lane == 0u {
        token_ids[out] = token;
        logprobs[out] = logprob(logits[start + token], most, log_total);
    }
    // The best one after the other: each is the highest below the last.
    var last = vec3(NONE);
    for (var i = 0u; i < params.top; i++) {
        var next = vec3(0u);
        for (var id = lane; id < params.vocab; id += WORKGROUP) {
            let at = raw_place(start, id);
            if below(at, last) && below(next, at) {
                next = at;
            }
        }
        last = highest(next, lane);
        if lane == 0u {
            let there = i < params.vocab;
            top_ids[out * params.top + i] = select(NONE, ~last.z, there);
            var bits = NEGATIVE_INFINITY;
            if there {
                bits = logprob(logits[start + ~last.z], most, log_total);
            }
            top_logprobs[out * params.top + i] = bits;
        }
    }
}
