// `sparse_mla.wgsl` by matrices of 16 by 16 halves, where subgroups have 32 lanes: one workgroup a token, eight heads and a share of the
// token's selected rows, 16 rows at a time. `fp8.wgsl` and `paged.wgsl` go before it.
//
// Halves hold what bf16 has, but not as far: rows and queries are brought near 2^13 by a power of two, rows by one that rises with the largest
// of them. What underflows is 2^-38 of that. 8-bit codes are halves as they are: a subgroup has the columns of one scale, and weights times
// that scale. Weights are relative to a highest score that is raised only once a row is far above it.

const HEADS: u32 = 8u;
const KEYS: u32 = 16u;
const LANES: u32 = 128u;
const SUBGROUPS: u32 = 4u;
// Columns of a latent: 8 matrices of a subgroup.
const LATENT: u32 = 512u;
// What the largest element of a tile has as its exponent, biased as in f32.
const TARGET: u32 = 140u;
// A score may be so far above the reference: its weight is a half.
const AHEAD: f32 = 8.0;
const LOWEST: f32 = -0x1p127f;

override FP8: bool = false;
// Vectors of eight columns of a row: a multiple of 8, so that subgroups have as many matrices of it.
override ROW_VECTORS: u32 = 72u;
// Of a row in `tile`, in vectors of four halves: rows lie in different banks.
override STRIDE: u32 = 2u * ROW_VECTORS + 2u;
// Rows of queries, then those of the cache. Queries are as many as a matrix has: what those behind the eighth give is left.
override TILE: u32 = (HEADS + KEYS) * STRIDE;
override PARTS: u32 = 1024u;
// Vectors of 16 bytes of a row that are its numbers.
override ROW_QUADS: u32 = select(ROW_VECTORS, ROW_VECTORS - CODES, FP8);
// Of an 8-bit row, and of a subgroup's columns.
const CODES: u32 = 32u;
const GROUP_VECTORS: u32 = 16u;

struct Params {
    tokens: u32,
    heads: u32,
    k: u32,
    // Shares of a token's selection, and positions of one: a multiple of KEYS.
    splits: u32,
    split: u32,
    scale: f32,
    page_size: u32,
    window_pages: u32,
    max_blocks: u32,
    // Of a row in the cache, in vectors of 16 bytes.
    row_quads: u32,
}

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read> seq_ids: array<u32>;
@group(0) @binding(1) var<storage, read> block_table: array<u32>;
@group(0) @binding(2) var<storage, read> topk_indices: array<i32>;
@group(0) @binding(3) var<storage, read> q: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> cache_0: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read> cache_1: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read> cache_2: array<vec4<u32>>;
@group(0) @binding(7) var<storage, read> cache_3: array<vec4<u32>>;
// As in `sparse_mla.wgsl`.
@group(0) @binding(8) var<storage, read_write> out: array<u32>;

var<workgroup> tile: array<vec4<f16>, TILE>;
// Of a subgroup: its part of the scores, or a matrix of its sums. Then, of 8-bit rows, its part of the scores by rotary columns.
var<workgroup> parts: array<f32, PARTS>;
// Weights of a tile, by heads: a matrix, of which the rows behind the eighth are nobody's; of 8-bit rows, one of each subgroup.
var<workgroup> weights: array<f16, 1024>;
var<workgroup> scales: array<vec4<f32>, KEYS>;
var<workgroup> factors: array<f32, HEADS>;
var<workgroup> totals: array<f32, HEADS>;
var<workgroup> references: array<f32, HEADS>;
// Of subgroups: their largest exponents, of numbers and of scales.
var<workgroup> largest_exponents: array<vec2<u32>, SUBGROUPS>;
// Whether sums are to be rescaled.
var<workgroup> rises: u32;
var<workgroup> slots: array<u32, 32>;

alias Left = coop_mat16x16<f16, A>;
alias Right = coop_mat16x16<f16, B>;
alias Sums = coop_mat16x16<f32, C>;

fn cached(slot: u32, i: u32) -> vec4<u32> {
    let at = in_window(slot) * params.row_quads + i;
    switch window_of(slot) {
        case 1u: { return cache_1[at]; }
        case 2u: { return cache_2[at]; }
        case 3u: { return cache_3[at]; }
        default: { return cache_0[at]; }
    }
}

// Where the row at `place` of the token's selection lies.
fn selected(t: u32, place: u32) -> u32 {
    var position = -1;
    if place < params.k {
        position = topk_indices[t * params.k + place];
    }
    if position < 0 {
        return HOLE;
    }
    let page = block_table[seq_ids[t] * params.max_blocks + u32(position) / params.page_size];
    return slot_of(page, u32(position) % params.page_size, params.page_size, params.window_pages);
}

// Vector `i` of a row's numbers in the cache.
fn row_quad(slot: u32, i: u32) -> vec4<u32> {
    // Between codes and rotary columns lie the scales.
    return cached(slot, select(i, i + 1u, FP8 && i >= CODES));
}

// The largest exponent of eight columns, in its place in a word.
fn largest(words: vec4<u32>) -> u32 {
    let both = max(words & vec4(0x7f800000u), (words << vec4(16u)) & vec4(0x7f800000u));
    return max(max(both.x, both.y), max(both.z, both.w));
}

// Those of all lanes, as numbers whose powers are numbers. All lanes call it.
fn largest_of_all(own: vec2<u32>, lane: Lane) -> vec2<u32> {
    let part = subgroupMax(own);
    if lane.place == 0u {
        largest_exponents[lane.subgroup] = part;
    }
    workgroupBarrier();
    let all = max(max(largest_exponents[0], largest_exponents[1]), max(largest_exponents[2], largest_exponents[3])) >> vec2(23u);
    return clamp(all, vec2(TARGET - 120u), vec2(250u));
}

// The power of two that brings `exponent` to TARGET; its inverse is that of `2 * TARGET - exponent`.
fn power(exponent: u32) -> f32 {
    return bitcast<f32>((127u + TARGET - exponent) << 23u);
}

fn put(at: u32, words: vec4<u32>, factor: f32) {
    let values = eight_bf16(words);
    tile[at] = vec4<f16>(values.low * factor);
    tile[at + 1u] = vec4<f16>(values.high * factor);
}

fn four_codes(codes: u32) -> vec4<f16> {
    return vec4<f16>(vec4(
        fp8_decode(codes & 0xffu),
        fp8_decode((codes >> 8u) & 0xffu),
        fp8_decode((codes >> 16u) & 0xffu),
        fp8_decode(codes >> 24u),
    ));
}

fn put_row(row: u32, i: u32, words: vec4<u32>, factor: f32) {
    let start = (HEADS + row) * STRIDE;
    if FP8 && i < CODES {
        let at = start + 4u * i;
        tile[at] = four_codes(words.x);
        tile[at + 1u] = four_codes(words.y);
        tile[at + 2u] = four_codes(words.z);
        tile[at + 3u] = four_codes(words.w);
    } else {
        put(start + 2u * select(i, i + CODES, FP8), words, factor);
    }
}

// What a lane loads of a tile: every LANES-th vector of 16 bytes; and a row's scales.
struct Rows {
    a: vec4<u32>,
    b: vec4<u32>,
    c: vec4<u32>,
    d: vec4<u32>,
    e: vec4<u32>,
    f: vec4<u32>,
    g: vec4<u32>,
    h: vec4<u32>,
    i: vec4<u32>,
    scales: vec4<u32>,
}

// Vector `i` of a tile; what lies behind its end is anything.
fn quad(turn: u32, i: u32) -> vec4<u32> {
    let within = min(i, KEYS * ROW_QUADS - 1u);
    let slot = slots[turn + within / ROW_QUADS];
    let words = row_quad(select(slot, 0u, slot == HOLE), within % ROW_QUADS);
    return select(words, vec4(0u), slot == HOLE);
}

fn load_rows(turn: u32, lane: Lane) -> Rows {
    var rows: Rows;
    rows.a = quad(turn, lane.index);
    rows.b = quad(turn, lane.index + LANES);
    rows.c = quad(turn, lane.index + 2u * LANES);
    rows.d = quad(turn, lane.index + 3u * LANES);
    rows.e = quad(turn, lane.index + 4u * LANES);
    if KEYS * ROW_QUADS > 5u * LANES {
        rows.f = quad(turn, lane.index + 5u * LANES);
        rows.g = quad(turn, lane.index + 6u * LANES);
        rows.h = quad(turn, lane.index + 7u * LANES);
        rows.i = quad(turn, lane.index + 8u * LANES);
    }
    if FP8 {
        let slot = slots[turn + lane.index % KEYS];
        let words = cached(select(slot, 0u, slot == HOLE), CODES);
        rows.scales = select(words, vec4(0u), slot == HOLE);
    }
    return rows;
}

// The largest exponent of vector `i` of a tile, unless it is of codes.
fn largest_of(words: vec4<u32>, i: u32) -> u32 {
    return select(largest(words), 0u, FP8 && i % ROW_QUADS < CODES);
}

fn largest_of_rows(rows: Rows, lane: Lane) -> u32 {
    let at = lane.index;
    var most = max(largest_of(rows.a, at), largest_of(rows.b, at + LANES));
    most = max(most, max(largest_of(rows.c, at + 2u * LANES), largest_of(rows.d, at + 3u * LANES)));
    most = max(most, largest_of(rows.e, at + 4u * LANES));
    if KEYS * ROW_QUADS > 5u * LANES {
        most = max(most, max(largest_of(rows.f, at + 5u * LANES), largest_of(rows.g, at + 6u * LANES)));
        most = max(most, max(largest_of(rows.h, at + 7u * LANES), largest_of(rows.i, at + 8u * LANES)));
    }
    return most;
}

fn put_quad(i: u32, words: vec4<u32>, factor: f32) {
    if i < KEYS * ROW_QUADS {
        put_row(i / ROW_QUADS, i % ROW_QUADS, words, factor);
    }
}

fn put_rows(rows: Rows, factor: f32, lane: Lane) {
    put_quad(lane.index, rows.a, factor);
    put_quad(lane.index + LANES, rows.b, factor);
    put_quad(lane.index + 2u * LANES, rows.c, factor);
    put_quad(lane.index + 3u * LANES, rows.d, factor);
    put_quad(lane.index + 4u * LANES, rows.e, factor);
    if KEYS * ROW_QUADS > 5u * LANES {
        put_quad(lane.index + 5u * LANES, rows.f, factor);
        put_quad(lane.index + 6u * LANES, rows.g, factor);
        put_quad(lane.index + 7u * LANES, rows.h, factor);
        put_quad(lane.index + 8u * LANES, rows.i, factor);
    }
}

// What the sums are multiplied by, while the exponents are those of the rows and of their scales; and its inverse.
fn factor_of_sums(exponents: vec2<u32>) -> f32 {
    return select(power(exponents.x), bitcast<f32>((254u - exponents.y) << 23u), FP8);
}

fn unit_of_sums(exponents: vec2<u32>) -> f32 {
    return select(power(2u * TARGET - exponents.x), bitcast<f32>(exponents.y << 23u), FP8);
}

// Multiplies a subgroup's matrix, which lies in `parts`, by its heads' factors. The sums of heads behind the eighth are nobody's.
fn rescale(lane: Lane) {
    for (var i = lane.place; i < HEADS * 16u; i += 32u) {
        parts[256u * lane.subgroup + i] *= factors[i / 16u];
    }
}

fn rescaled(sums: Sums, lane: Lane) -> Sums {
    coopStoreT(sums, &parts[256u * lane.subgroup], 16u);
    workgroupBarrier();
    rescale(lane);
    workgroupBarrier();
    return coopLoadT<Sums>(&parts[256u * lane.subgroup], 16u);
}

// Writes matrix `j` of every subgroup.
fn put_out(sums: Sums, j: u32, unit: f32, row: u32, heads: u32, split: u32, lane: Lane) {
    workgroupBarrier();
    coopStoreT(sums, &parts[256u * lane.subgroup], 16u);
    workgroupBarrier();
    for (var i = lane.place; i < heads * 8u; i += 32u) {
        let head = i / 8u;
        let column = 2u * (i % 8u);
        let at = 256u * lane.subgroup + 16u * head + column;
        let pair = unit * vec2(parts[at], parts[at + 1u]);
        let first = 128u * lane.subgroup + 16u * j + column;
        let total = totals[head];
        if params.splits == 1u {
            // Nothing selected gives zeros.
            let mean = pair / select(total, 1.0, total == 0.0);
            out[((row + head) * LATENT + first) / 2u] = pack_bf16(mean.x, mean.y);
        } else {
            let of_split = ((row + head) * params.splits + split) * (LATENT + 2u);
            out[of_split + first] = bitcast<u32>(pair.x);
            out[of_split + first + 1u] = bitcast<u32>(pair.y);
            if first == 0u {
                out[of_split + LATENT] = bitcast<u32>(references[head]);
                out[of_split + LATENT + 1u] = bitcast<u32>(total);
            }
        }
    }
}

// What subgroups have of a number of `parts`.
fn of_subgroups(i: u32) -> vec4<f32> {
    return vec4(parts[i], parts[256u + i], parts[512u + i], parts[768u + i]);
}

// Adds the products of columns `8 * v..8 * v + 16`.
fn dots_of(v: u32, dots: Sums) -> Sums {
    let queries = coopLoadT<Left>(&tile[2u * v], STRIDE);
    let keys = coopLoad<Right>(&tile[HEADS * STRIDE + 2u * v], STRIDE);
    return coopMultiplyAdd(queries, keys, dots);
}

fn product(weights: Left, first: u32, sums: Sums) -> Sums {
    let values = coopLoadT<Right>(&tile[HEADS * STRIDE + first / 4u], STRIDE);
    return coopMultiplyAdd(weights, values, sums);
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let head_groups = (params.heads + HEADS - 1u) / HEADS;
    // What is more than there are does the last one's work again: matrices want no lane to have left.
    let number = min(flat(group, groups), params.tokens * head_groups * params.splits - 1u);
    let split = number % params.splits;
    let t = number / params.splits / head_groups;
    let first_head = number / params.splits % head_groups * HEADS;
    let heads = min(HEADS, params.heads - first_head);
    let first_query = (t * params.heads + first_head) * ROW_VECTORS;

    var exponent = 0u;
    for (var i = lane.index; i < heads * ROW_VECTORS; i += LANES) {
        exponent = max(exponent, largest(q[first_query + i]));
    }
    let of_queries = largest_of_all(vec2(exponent, 0u), lane).x;
    for (var i = lane.index; i < HEADS * ROW_VECTORS; i += LANES) {
        var words = vec4(0u);
        if i < heads * ROW_VECTORS {
            words = q[first_query + i];
        }
        put(i / ROW_VECTORS * STRIDE + 2u * (i % ROW_VECTORS), words, power(of_queries));
    }
    let query_unit = params.scale * power(2u * TARGET - of_queries);

    // Of the softmax: one row, one head.
    let own_head = lane.index / KEYS;
    let own_key = lane.index % KEYS;
    var reference = LOWEST;
    var total = 0.0;
    // The exponents that rows are brought to TARGET from, and scales to 1.
    var of_rows = vec2(TARGET - 120u);
    var sums_0 = Sums();
    var sums_1 = Sums();
    var sums_2 = Sums();
    var sums_3 = Sums();
    var sums_4 = Sums();
    var sums_5 = Sums();
    var sums_6 = Sums();
    var sums_7 = Sums();

    let end = min(params.k, (split + 1u) * params.split);
    var turn = 0u;
    if lane.index < 2u * KEYS {
        slots[lane.index] = selected(t, split * params.split + lane.index);
    }
    workgroupBarrier();
    var rows = load_rows(0u, lane);
    // Two tiles ahead: where a row lies is known by loads that wait for each other.
    var ahead = selected(t, split * params.split + 2u * KEYS + own_key);
    for (var first = split * params.split; first < end; first += KEYS) {
        workgroupBarrier();
        var own = vec2(largest_of_rows(rows, lane), 0u);
        if FP8 && lane.index < KEYS {
            scales[lane.index] = bitcast<vec4<f32>>(rows.scales);
            own.y = max(max(rows.scales.x, rows.scales.y), max(rows.scales.z, rows.scales.w)) & 0x7f800000u;
        }
        let of_tile = largest_of_all(own, lane);
        if lane.index == 0u {
            rises = 0u;
        }
        let before = of_rows;
        of_rows = select(of_rows, of_tile, of_tile > of_rows + vec2(1u));
        put_rows(rows, power(of_rows.x), lane);
        let there = slots[turn + own_key] != HOLE;
        workgroupBarrier();
        if lane.index < KEYS {
            slots[turn + lane.index] = ahead;
        }
        ahead = selected(t, first + 3u * KEYS + own_key);
        turn ^= KEYS;
        // They come while this tile is worked on.
        rows = load_rows(turn, lane);

        var dots = Sums();
        if FP8 {
            for (var step = 0u; step < GROUP_VECTORS / 2u; step++) {
                dots = dots_of(GROUP_VECTORS * lane.subgroup + 2u * step, dots);
            }
            coopStoreT(dots, &parts[256u * lane.subgroup], 16u);
            dots = Sums();
        }
        // The other columns: of 8-bit rows the rotary ones.
        let first_vector = select(0u, 2u * CODES, FP8);
        for (var step = 0u; step < (ROW_VECTORS - first_vector) / (2u * SUBGROUPS); step++) {
            dots = dots_of(first_vector + 2u * (lane.subgroup + step * SUBGROUPS), dots);
        }
        let others = select(0u, 1024u, FP8);
        coopStoreT(dots, &parts[others + 256u * lane.subgroup], 16u);
        workgroupBarrier();
        var dot_product = dot(of_subgroups(others + lane.index), vec4(1.0)) * power(2u * TARGET - of_rows.x);
        if FP8 {
            dot_product += dot(of_subgroups(lane.index), scales[own_key]);
        }
        let score = select(LOWEST, query_unit * dot_product, there);
        var highest = score;
        highest = max(highest, subgroupShuffleXor(highest, 8u));
        highest = max(highest, subgroupShuffleXor(highest, 4u));
        highest = max(highest, subgroupShuffleXor(highest, 2u));
        highest = max(highest, subgroupShuffleXor(highest, 1u));
        let raised = select(reference, highest, highest > reference + AHEAD || reference == LOWEST);
        let factor = exp(reference - raised);
        let weight = select(0.0, exp(score - raised), there);
        total = total * factor + weight;
        let factor_of_all = factor_of_sums(of_rows) * unit_of_sums(before);
        // Before the first tile there is nothing to rescale.
        let changes = first != split * params.split && (factor_of_all != 1.0 || raised != reference);
        reference = raised;
        if FP8 {
            let scaled = weight * (scales[own_key] * factor_of_sums(of_rows));
            weights[lane.index] = f16(scaled.x);
            weights[256u + lane.index] = f16(scaled.y);
            weights[512u + lane.index] = f16(scaled.z);
            weights[768u + lane.index] = f16(scaled.w);
        } else {
            weights[lane.index] = f16(weight);
        }
        if own_key == 0u {
            factors[own_head] = factor * factor_of_all;
        }
        if changes {
            rises = 1u;
        }
        if workgroupUniformLoad(&rises) != 0u {
            sums_0 = rescaled(sums_0, lane);
            sums_1 = rescaled(sums_1, lane);
            sums_2 = rescaled(sums_2, lane);
            sums_3 = rescaled(sums_3, lane);
            sums_4 = rescaled(sums_4, lane);
            sums_5 = rescaled(sums_5, lane);
            sums_6 = rescaled(sums_6, lane);
            sums_7 = rescaled(sums_7, lane);
        }
        let left = coopLoadT<Left>(&weights[select(0u, 256u * lane.subgroup, FP8)], 16u);
        let column = 128u * lane.subgroup;
        sums_0 = product(left, column, sums_0);
        sums_1 = product(left, column + 16u, sums_1);
        sums_2 = product(left, column + 32u, sums_2);
        sums_3 = product(left, column + 48u, sums_3);
        sums_4 = product(left, column + 64u, sums_4);
        sums_5 = product(left, column + 80u, sums_5);
        sums_6 = product(left, column + 96u, sums_6);
        sums_7 = product(left, column + 112u, sums_7);
    }

    total += subgroupShuffleXor(total, 8u);
    total += subgroupShuffleXor(total, 4u);
    total += subgroupShuffleXor(total, 2u);
    total += subgroupShuffleXor(total, 1u);
    if own_key == 0u {
        totals[own_head] = total;
        references[own_head] = reference;
    }
    let unit = unit_of_sums(of_rows);
    let row = t * params.heads + first_head;
    put_out(sums_0, 0u, unit, row, heads, split, lane);
    put_out(sums_1, 1u, unit, row, heads, split, lane);
    put_out(sums_2, 2u, unit, row, heads, split, lane);
    put_out(sums_3, 3u, unit, row, heads, split, lane);
    put_out(sums_4, 4u, unit, row, heads, split, lane);
    put_out(sums_5, 5u, unit, row, heads, split, lane);
    put_out(sums_6, 6u, unit, row, heads, split, lane);
    put_out(sums_7, 7u, unit, row, heads, split, lane);
}
