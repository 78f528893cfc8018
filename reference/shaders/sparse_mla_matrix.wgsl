// `sparse_mla.wgsl` by matrices of 16 by 16 halves, where subgroups have 32 lanes: one workgroup a token, eight heads and a share of the
// token's selected rows, 16 rows at a time. `paged.wgsl` and `halves.wgsl` go before it.
//
// While a tile of rows is worked on, the next is on its way. A subgroup keeps a quarter of the queries' columns, and of the sums'.
//
// Rows and queries are brought near 2^13 by a power of two, rows by one that rises with the largest of them: what underflows is 2^-38 of that.
// 8-bit codes are halves as they are: a subgroup has the columns of one scale, and weights times that scale, each scale relative to its own
// power of two. Weights are relative to a highest score that is raised only once a row is far above it.

const HEADS: u32 = 8u;
const KEYS: u32 = 16u;
const LANES: u32 = 128u;
const SUBGROUPS: u32 = 4u;
// Columns of a latent: 8 matrices of a subgroup.
const LATENT: u32 = 512u;
// A score may be so far above the reference: its weight is a half.
const AHEAD: f32 = 8.0;
const LOWEST: f32 = -0x1p127f;

override FP8: bool = false;
// Vectors of eight columns of a row: those of the latent, and eight others or none.
override ROW_VECTORS: u32 = 72u;
// Of a row in `tile`, in vectors of four halves: rows lie in different banks.
const STRIDE: u32 = 146u;
const ONCE: u32 = 1u;
// Scales' exponents up to here have inverses that are normal numbers, with room for a rise.
const MOST_OF_SCALES: u32 = 250u;
// Of a row's latent: vectors of 16 bytes of 8-bit codes, of columns.
const CODES: u32 = 32u;
const VECTORS: u32 = 64u;

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

// The queries at first, of which what a matrix has behind the eighth is nobody's; then a tile of rows.
var<workgroup> tile: array<vec4<f16>, 2336>;
// Of a subgroup: a matrix of its sums, or its part of the scores. Then, of 8-bit rows, its part of the scores by other columns than codes.
override PARTS: u32 = select(1024u, 2048u, FP8);
var<workgroup> parts: array<f32, PARTS>;
// Weights of a tile, by heads: a matrix, of which the rows behind the eighth are nobody's; of 8-bit rows, one of each subgroup.
override WEIGHTS: u32 = select(256u, 1024u, FP8);
var<workgroup> weights: array<f16, WEIGHTS>;
var<workgroup> scales: array<vec4<f32>, KEYS>;
// Of two tiles.
var<workgroup> slots: array<u32, 32>;
var<workgroup> factors: array<f32, HEADS>;
var<workgroup> totals: array<f32, HEADS>;
var<workgroup> references: array<f32, HEADS>;
// The largest exponents so far: of each scale, of numbers, of queries.
var<workgroup> exponents: array<atomic<u32>, 6>;
const OF_NUMBERS: u32 = 4u;
const OF_QUERIES: u32 = 5u;
// Whether sums are to be rescaled.
var<workgroup> rises: u32;

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

// The position at `place` of the token's selection; below zero where there is none.
fn position_at(t: u32, place: u32) -> i32 {
    if place < params.k {
        return topk_indices[t * params.k + place];
    }
    return -1;
}

fn page_of(first_page: u32, position: i32) -> u32 {
    return block_table[first_page + u32(max(position, 0)) / params.page_size];
}

fn slot_at(page: u32, position: i32) -> u32 {
    if position < 0 {
        return HOLE;
    }
    return slot_of(page, u32(position) % params.page_size, params.page_size, params.window_pages);
}

// What a lane loads of a tile, 16 bytes each: of two rows every 16th vector of the latent, and one of other columns; and a row's scales.
struct Rows {
    a: vec4<u32>,
    b: vec4<u32>,
    c: vec4<u32>,
    d: vec4<u32>,
    e: vec4<u32>,
    f: vec4<u32>,
    g: vec4<u32>,
    h: vec4<u32>,
    other: vec4<u32>,
    scales: vec4<u32>,
}

// A slot that can be read.
fn some_slot(slot: u32) -> u32 {
    return select(slot, 0u, slot == HOLE);
}

// `turn` is where a tile's slots begin.
fn load_rows(turn: u32, lane: Lane) -> Rows {
    var rows: Rows;
    let first = some_slot(slots[turn + lane.index / 16u]);
    let second = some_slot(slots[turn + 8u + lane.index / 16u]);
    let v = lane.index % 16u;
    rows.a = cached(first, v);
    rows.b = cached(first, v + 16u);
    rows.c = cached(second, v);
    rows.d = cached(second, v + 16u);
    if !FP8 {
        rows.e = cached(first, v + 32u);
        rows.f = cached(first, v + 48u);
        rows.g = cached(second, v + 32u);
        rows.h = cached(second, v + 48u);
    }
    let third = some_slot(slots[turn + lane.index / 8u]);
    if ROW_VECTORS > VECTORS {
        // Between codes and other columns lie the scales.
        rows.other = cached(third, select(VECTORS, CODES + 1u, FP8) + lane.index % 8u);
    }
    if FP8 {
        rows.scales = cached(some_slot(slots[turn + lane.index % KEYS]), CODES);
    }
    return rows;
}

// Rows of holes become zeros: the memory there may hold anything.
fn without_holes(own: Rows, turn: u32, lane: Lane) -> Rows {
    var rows = own;
    let none = vec4(0u);
    if slots[turn + lane.index / 16u] == HOLE {
        rows.a = none;
        rows.b = none;
        rows.e = none;
        rows.f = none;
    }
    if slots[turn + 8u + lane.index / 16u] == HOLE {
        rows.c = none;
        rows.d = none;
        rows.g = none;
        rows.h = none;
    }
    if slots[turn + lane.index / 8u] == HOLE {
        rows.other = none;
    }
    if slots[turn + lane.index % KEYS] == HOLE {
        rows.scales = none;
    }
    return rows;
}

// Rows as they are to be put in their place.
fn whole(rows: Rows, turn: u32, lane: Lane) -> Rows {
    if subgroupAny(slots[turn + lane.index % KEYS] == HOLE) {
        return without_holes(rows, turn, lane);
    }
    return rows;
}

// The largest exponent of the numbers among them.
fn largest_of_rows(rows: Rows) -> u32 {
    var most = largest(rows.other);
    if !FP8 {
        most = max(most, max(max(largest(rows.a), largest(rows.b)), max(largest(rows.c), largest(rows.d))));
        most = max(most, max(max(largest(rows.e), largest(rows.f)), max(largest(rows.g), largest(rows.h))));
    }
    return exponent_of(most);
}

// Puts eight columns in their place, times a factor.
fn put(at: u32, words: vec4<u32>, factor: f32) {
    let values = eight_bf16(words);
    tile[at] = vec4<f16>(values.low * factor);
    tile[at + 1u] = vec4<f16>(values.high * factor);
}

fn put_codes(at: u32, words: vec4<u32>) {
    tile[at] = four_codes(words.x);
    tile[at + 1u] = four_codes(words.y);
    tile[at + 2u] = four_codes(words.z);
    tile[at + 3u] = four_codes(words.w);
}

// Puts a tile's rows in their place, numbers times a factor.
fn put_rows(rows: Rows, factor: f32, lane: Lane) {
    let v = lane.index % 16u;
    let first = lane.index / 16u * STRIDE;
    let second = first + 8u * STRIDE;
    if FP8 {
        put_codes(first + 4u * v, rows.a);
        put_codes(first + 4u * v + 64u, rows.b);
        put_codes(second + 4u * v, rows.c);
        put_codes(second + 4u * v + 64u, rows.d);
    } else {
        put(first + 2u * v, rows.a, factor);
        put(first + 2u * v + 32u, rows.b, factor);
        put(second + 2u * v, rows.c, factor);
        put(second + 2u * v + 32u, rows.d, factor);
        put(first + 2u * v + 64u, rows.e, factor);
        put(first + 2u * v + 96u, rows.f, factor);
        put(second + 2u * v + 64u, rows.g, factor);
        put(second + 2u * v + 96u, rows.h, factor);
    }
    if ROW_VECTORS > VECTORS {
        put(lane.index / 8u * STRIDE + 2u * (VECTORS + lane.index % 8u), rows.other, factor);
    }
}

// Puts the scales of a tile in their place, and the exponents of those that are beyond `of_scales` into `exponents`.
fn put_scales(own: vec4<u32>, of_scales: vec4<u32>, lane: Lane) {
    if lane.index < KEYS {
        scales[lane.index] = bitcast<vec4<f32>>(own);
        let of_own = min((own & vec4(0x7f800000u)) >> vec4(23u), vec4(MOST_OF_SCALES));
        if any(of_own > of_scales + vec4(1u)) {
            atomicMax(&exponents[0], of_own.x);
            atomicMax(&exponents[1], of_own.y);
            atomicMax(&exponents[2], of_own.z);
            atomicMax(&exponents[3], of_own.w);
        }
    }
}

fn exponents_of_scales() -> vec4<u32> {
    return vec4(
        atomicLoad(&exponents[0]),
        atomicLoad(&exponents[1]),
        atomicLoad(&exponents[2]),
        atomicLoad(&exponents[3]),
    );
}

// Puts vector `i` of the queries, of which there are `count`, in its place; zeros behind them.
fn put_query(i: u32, count: u32, words: vec4<u32>, exponent: u32) {
    if i < HEADS * ROW_VECTORS {
        put(i / ROW_VECTORS * STRIDE + 2u * (i % ROW_VECTORS), select(vec4(0u), words, i < count), power(exponent));
    }
}

// What subgroups have of a number of `parts`.
fn of_subgroups(i: u32) -> vec4<f32> {
    return vec4(parts[i], parts[256u + i], parts[512u + i], parts[768u + i]);
}

// Multiplies a subgroup's sums by their heads' factors and by `ratio`. The sums of heads behind the eighth are nobody's.
fn rescaled(sums: Sums, ratio: f32, lane: Lane) -> Sums {
    let start = 256u * lane.subgroup;
    coopStoreT(sums, &parts[start], 16u);
    workgroupBarrier();
    for (var i = lane.place; i < HEADS * 16u; i += 32u) {
        parts[start + i] *= factors[i / 16u] * ratio;
    }
    workgroupBarrier();
    return coopLoadT<Sums>(&parts[start], 16u);
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
        let place = 128u * lane.subgroup + 16u * j + column;
        let total = totals[head];
        if params.splits == 1u {
            // Nothing selected gives zeros.
            let mean = pair / select(total, 1.0, total == 0.0);
            out[((row + head) * LATENT + place) / 2u] = pack_bf16(mean.x, mean.y);
        } else {
            let of_split = ((row + head) * params.splits + split) * (LATENT + 2u);
            out[of_split + place] = bitcast<u32>(pair.x);
            out[of_split + place + 1u] = bitcast<u32>(pair.y);
            if place == 0u {
                out[of_split + LATENT] = bitcast<u32>(references[head]);
                out[of_split + LATENT + 1u] = bitcast<u32>(total);
            }
        }
    }
}

// What a subgroup multiplies by its queries: 16 columns of eight steps, of codes those of its scale, and then one of others.
fn own_vector(step: u32, lane: Lane) -> u32 {
    if step == 8u {
        return VECTORS + 2u * lane.subgroup;
    }
    return select(2u * (lane.subgroup + step * SUBGROUPS), 16u * lane.subgroup + 2u * step, FP8);
}

fn query_of(step: u32, lane: Lane) -> Left {
    return coopLoadT<Left>(&tile[2u * own_vector(step, lane)], STRIDE);
}

fn dots_of(queries: Left, step: u32, dots: Sums, lane: Lane) -> Sums {
    let keys = coopLoad<Right>(&tile[2u * own_vector(step, lane)], STRIDE);
    return coopMultiplyAdd(queries, keys, dots);
}

fn product(left: Left, column: u32, sums: Sums) -> Sums {
    let values = coopLoadT<Right>(&tile[column / 4u], STRIDE);
    return coopMultiplyAdd(left, values, sums);
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
    let first = split * params.split;
    let end = min(params.k, first + params.split);
    // Of the softmax: one row, one head.
    let own_head = lane.index / KEYS;
    let own_key = lane.index % KEYS;

    // Where a row lies is known by loads that wait for each other: they are made long before.
    let first_page = seq_ids[t] * params.max_blocks;
    let position_0 = position_at(t, first + own_key);
    let position_1 = position_at(t, first + KEYS + own_key);
    var position = position_at(t, first + 2u * KEYS + own_key);
    var position_after = position_at(t, first + 3u * KEYS + own_key);
    let first_query = (t * params.heads + first_head) * ROW_VECTORS;
    let queries = heads * ROW_VECTORS;
    let query_0 = q[first_query + min(lane.index, queries - 1u)];
    let query_1 = q[first_query + min(lane.index + LANES, queries - 1u)];
    let query_2 = q[first_query + min(lane.index + 2u * LANES, queries - 1u)];
    let query_3 = q[first_query + min(lane.index + 3u * LANES, queries - 1u)];
    let query_4 = q[first_query + min(lane.index + 4u * LANES, queries - 1u)];
    let page_0 = page_of(first_page, position_0);
    let page_1 = page_of(first_page, position_1);
    var page = page_of(first_page, position);
    if lane.index < KEYS {
        slots[lane.index] = slot_at(page_0, position_0);
        slots[KEYS + lane.index] = slot_at(page_1, position_1);
    }
    if lane.index < 6u {
        atomicStore(&exponents[lane.index], LEAST_EXPONENT);
    }
    rises = 0u;
    workgroupBarrier();
    var rows = load_rows(0u, lane);
    let of_query = max(max(largest(query_0), largest(query_1)), max(largest(query_2), largest(query_3)));
    atomicMax(&exponents[OF_QUERIES], exponent_of(max(of_query, largest(query_4))));
    workgroupBarrier();
    let of_queries = atomicLoad(&exponents[OF_QUERIES]);
    put_query(lane.index, queries, query_0, of_queries);
    put_query(lane.index + LANES, queries, query_1, of_queries);
    put_query(lane.index + 2u * LANES, queries, query_2, of_queries);
    put_query(lane.index + 3u * LANES, queries, query_3, of_queries);
    put_query(lane.index + 4u * LANES, queries, query_4, of_queries);
    let query_unit = params.scale * power(2u * TARGET - of_queries);
    workgroupBarrier();
    let left_0 = query_of(0u, lane);
    let left_1 = query_of(1u, lane);
    let left_2 = query_of(2u, lane);
    let left_3 = query_of(3u, lane);
    let left_4 = query_of(4u, lane);
    let left_5 = query_of(5u, lane);
    let left_6 = query_of(6u, lane);
    let left_7 = query_of(7u, lane);
    var left_8 = Left();
    if ROW_VECTORS > VECTORS {
        left_8 = query_of(8u, lane);
    }
    workgroupBarrier();

    var reference = LOWEST;
    var total = 0.0;
    // The exponents that rows are brought to TARGET from, and scales to 1.
    var of_rows = LEAST_EXPONENT;
    var of_scales = vec4(LEAST_EXPONENT);
    var sums_0 = Sums();
    var sums_1 = Sums();
    var sums_2 = Sums();
    var sums_3 = Sums();
    var sums_4 = Sums();
    var sums_5 = Sums();
    var sums_6 = Sums();
    var sums_7 = Sums();
    var turn = 0u;
    for (var first_row = first; first_row < end; first_row += KEYS) {
        rows = whole(rows, turn, lane);
        let own = largest_of_rows(rows);
        if own > of_rows + 1u {
            atomicMax(&exponents[OF_NUMBERS], own);
        }
        if FP8 {
            put_scales(rows.scales, of_scales, lane);
        }
        put_rows(rows, power(of_rows), lane);
        let there = slots[turn + own_key] != HOLE;
        workgroupBarrier();
        // What the sums are to be multiplied by, for their unit changes.
        var ratio = 1.0;
        let most = atomicLoad(&exponents[OF_NUMBERS]);
        if most > of_rows + 1u {
            // Rarely, and in the first tile: numbers are beyond halves by the exponent so far.
            if !FP8 {
                ratio = falls(of_rows, most);
            }
            of_rows = most;
            put_rows(rows, power(most), lane);
            workgroupBarrier();
        }
        if FP8 {
            let before = of_scales[lane.subgroup];
            let met = exponents_of_scales();
            of_scales = select(of_scales, met, met > of_scales + vec4(1u));
            ratio = falls(before, of_scales[lane.subgroup]);
        }
        if lane.index < KEYS {
            slots[turn + lane.index] = slot_at(page, position);
        }
        page = page_of(first_page, position_after);
        position = position_after;
        position_after = position_at(t, first_row + 4u * KEYS + own_key);
        turn ^= KEYS;
        // They come while this tile is worked on.
        rows = load_rows(turn, lane);

        // A loop of one round, so that no compiler moves the loads above behind it: a quarter of the time is hidden so.
        for (var once = 0u; once < ONCE; once++) {
            var dots = dots_of(left_0, 0u, Sums(), lane);
            dots = dots_of(left_1, 1u, dots, lane);
            dots = dots_of(left_2, 2u, dots, lane);
            dots = dots_of(left_3, 3u, dots, lane);
            dots = dots_of(left_4, 4u, dots, lane);
            dots = dots_of(left_5, 5u, dots, lane);
            dots = dots_of(left_6, 6u, dots, lane);
            dots = dots_of(left_7, 7u, dots, lane);
            if FP8 {
                coopStoreT(dots, &parts[256u * lane.subgroup], 16u);
                dots = Sums();
            }
            if ROW_VECTORS > VECTORS {
                dots = dots_of(left_8, 8u, dots, lane);
            }
            coopStoreT(dots, &parts[select(0u, 1024u, FP8) + 256u * lane.subgroup], 16u);
        }
        workgroupBarrier();

        let own_scales = scales[own_key];
        let others = of_subgroups(select(0u, 1024u, FP8) + lane.index);
        var dot_product = dot(others, vec4(1.0)) * power(2u * TARGET - of_rows);
        if FP8 {
            dot_product += dot(of_subgroups(lane.index), own_scales) * CODE;
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
        // Before the first tile there is nothing to rescale.
        if first_row != first && (ratio != 1.0 || raised != reference) {
            rises = 1u;
        }
        reference = raised;
        if FP8 {
            let units = (vec4(254u) - of_scales) << vec4(23u);
            let scaled = weight * (own_scales * bitcast<vec4<f32>>(units));
            weights[lane.index] = f16(scaled.x);
            weights[256u + lane.index] = f16(scaled.y);
            weights[512u + lane.index] = f16(scaled.z);
            weights[768u + lane.index] = f16(scaled.w);
        } else {
            weights[lane.index] = f16(weight);
        }
        if own_key == 0u {
            factors[own_head] = factor;
        }
        workgroupBarrier();
        if rises != 0u {
            workgroupBarrier();
            if lane.index == 0u {
                rises = 0u;
            }
            sums_0 = rescaled(sums_0, ratio, lane);
            sums_1 = rescaled(sums_1, ratio, lane);
            sums_2 = rescaled(sums_2, ratio, lane);
            sums_3 = rescaled(sums_3, ratio, lane);
            sums_4 = rescaled(sums_4, ratio, lane);
            sums_5 = rescaled(sums_5, ratio, lane);
            sums_6 = rescaled(sums_6, ratio, lane);
            sums_7 = rescaled(sums_7, ratio, lane);
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
        workgroupBarrier();
    }

    total += subgroupShuffleXor(total, 8u);
    total += subgroupShuffleXor(total, 4u);
    total += subgroupShuffleXor(total, 2u);
    total += subgroupShuffleXor(total, 1u);
    if own_key == 0u {
        totals[own_head] = total;
        references[own_head] = reference;
    }
    let of_codes = CODE * bitcast<f32>(of_scales[lane.subgroup] << 23u);
    let unit = select(power(2u * TARGET - of_rows), of_codes, FP8);
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
