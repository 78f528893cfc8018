// `sparse_mla.wgsl` by matrices of 16 by 16 halves, where subgroups have 32 lanes: one workgroup a token, eight heads and a share of the
// token's selected rows, 16 rows at a time. `paged.wgsl` and `halves.wgsl` go before it.
//
// While a tile of rows is worked on, the next is on its way. A subgroup keeps a quarter of the queries' columns, and of the sums'. All of it
// is within 24 KiB of memory: a driver that counts 48 for a multiprocessor has two workgroups on it.
//
// Rows and queries are brought near 2^13 by a power of two, rows by one that rises with the largest of them: what underflows is 2^-38 of that.
// 8-bit codes are halves as they are: a subgroup has the columns of one scale, and weights times that scale, each scale relative to its own
// power of two. Weights are relative to a highest score that is raised only once a row is far above it. A tile that raises any of these is
// worked on again.

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
// A constant: what is divided by it takes no division.
override PAGE_SIZE: u32 = 64u;
// Vectors of eight columns of a row: those of the latent, and eight others or none.
override ROW_VECTORS: u32 = 72u;
// Of a row in `tile`, in vectors of four halves: rows lie in different banks.
const STRIDE: u32 = 146u;
const TILE: u32 = 15u * STRIDE + 144u;
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
// Nobody writes them; but what is read of what might be written is not moved behind a barrier, and these loads are wanted early.
@group(0) @binding(4) var<storage, read_write> cache_0: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read_write> cache_1: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read_write> cache_2: array<vec4<u32>>;
@group(0) @binding(7) var<storage, read_write> cache_3: array<vec4<u32>>;
// As in `sparse_mla.wgsl`.
@group(0) @binding(8) var<storage, read_write> out: array<u32>;

// The queries at first, then a tile of rows. Behind the eighth query a matrix has nobody's; or, of 8-bit rows, the columns that are no codes,
// so that one product has both kinds of dots apart: the rest is zeros.
var<workgroup> tile: array<vec4<f16>, TILE>;
// Of a subgroup: a matrix of its sums, or its part of the dots.
var<workgroup> parts: array<f32, 1024>;
// Weights of a tile, by heads: half a matrix; of 8-bit rows, one of each subgroup. Rows behind the eighth are nobody's, or the next one's.
override WEIGHTS: u32 = select(256u, 640u, FP8);
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
// Whether a tile raises something, and whether it is exponents.
var<workgroup> rises: u32;
var<workgroup> beyond: u32;

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
    return block_table[first_page + u32(max(position, 0)) / PAGE_SIZE];
}

fn slot_at(page: u32, position: i32) -> u32 {
    if position < 0 {
        return HOLE;
    }
    return slot_of(page, u32(position) % PAGE_SIZE, PAGE_SIZE, params.window_pages);
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

// What the words of a slot's row are multiplied by, and what of them is left: nothing of a hole's, for the memory there may hold anything.
struct Kept {
    low: u32,
    high: u32,
}

fn kept(slot: u32) -> Kept {
    let hole = slot == HOLE;
    return Kept(select(0x10000u, 0u, hole), select(0xffff0000u, 0u, hole));
}

// Of the rows of a lane.
struct Here {
    first: Kept,
    second: Kept,
    third: Kept,
}

fn here(turn: u32, lane: Lane) -> Here {
    return Here(
        kept(slots[turn + lane.index / 16u]),
        kept(slots[turn + 8u + lane.index / 16u]),
        kept(slots[turn + lane.index / 8u]),
    );
}

// The largest exponent of the numbers among a tile's rows.
fn largest_of_rows(rows: Rows, held: Here) -> u32 {
    var most = select(largest(rows.other), 0u, held.third.low == 0u);
    if !FP8 {
        let first = max(max(largest(rows.a), largest(rows.b)), max(largest(rows.e), largest(rows.f)));
        let second = max(max(largest(rows.c), largest(rows.d)), max(largest(rows.g), largest(rows.h)));
        most = max(most, max(select(first, 0u, held.first.low == 0u), select(second, 0u, held.second.low == 0u)));
    }
    return exponent_of(most);
}

// Puts eight columns in their place, times a factor.
fn put(at: u32, words: vec4<u32>, held: Kept, factor: f32) {
    let lower = bitcast<vec4<f32>>(words * held.low) * factor;
    let upper = bitcast<vec4<f32>>(words & vec4(held.high)) * factor;
    tile[at] = vec4<f16>(vec4(lower.x, upper.x, lower.y, upper.y));
    tile[at + 1u] = vec4<f16>(vec4(lower.z, upper.z, lower.w, upper.w));
}

fn put_codes(at: u32, words: vec4<u32>, held: Kept) {
    let mask = held.high | (held.high >> 16u);
    tile[at] = four_codes(words.x & mask);
    tile[at + 1u] = four_codes(words.y & mask);
    tile[at + 2u] = four_codes(words.z & mask);
    tile[at + 3u] = four_codes(words.w & mask);
}

// Puts a tile's rows in their place, numbers times a factor.
fn put_rows(rows: Rows, held: Here, factor: f32, lane: Lane) {
    let v = lane.index % 16u;
    let first = lane.index / 16u * STRIDE;
    let second = first + 8u * STRIDE;
    if FP8 {
        put_codes(first + 4u * v, rows.a, held.first);
        put_codes(first + 4u * v + 64u, rows.b, held.first);
        put_codes(second + 4u * v, rows.c, held.second);
        put_codes(second + 4u * v + 64u, rows.d, held.second);
    } else {
        put(first + 2u * v, rows.a, held.first, factor);
        put(first + 2u * v + 32u, rows.b, held.first, factor);
        put(second + 2u * v, rows.c, held.second, factor);
        put(second + 2u * v + 32u, rows.d, held.second, factor);
        put(first + 2u * v + 64u, rows.e, held.first, factor);
        put(first + 2u * v + 96u, rows.f, held.first, factor);
        put(second + 2u * v + 64u, rows.g, held.second, factor);
        put(second + 2u * v + 96u, rows.h, held.second, factor);
    }
    if ROW_VECTORS > VECTORS {
        put(lane.index / 8u * STRIDE + 2u * (VECTORS + lane.index % 8u), rows.other, held.third, factor);
    }
}

// By bits: compilers may take numbers for finite.
fn is_finite(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u;
}

// The exponents of a row's scales.
fn exponents_of_row(row: vec4<u32>) -> vec4<u32> {
    return clamp((row & vec4(0x7f800000u)) >> vec4(23u), vec4(LEAST_EXPONENT), vec4(MOST_OF_SCALES));
}

// Raises `exponents` to those of a tile's rows, of which every lane has some.
fn raise_exponents(rows: Rows, held: Here, turn: u32, lane: Lane) {
    atomicMax(&exponents[OF_NUMBERS], largest_of_rows(rows, held));
    if FP8 && lane.index < KEYS && slots[turn + lane.index] != HOLE {
        let own = exponents_of_row(rows.scales);
        atomicMax(&exponents[0], own.x);
        atomicMax(&exponents[1], own.y);
        atomicMax(&exponents[2], own.z);
        atomicMax(&exponents[3], own.w);
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

// That of a subgroup's columns.
fn own_scale(exponents: vec4<u32>, lane: Lane) -> u32 {
    let half = select(exponents.xy, exponents.zw, lane.subgroup >= 2u);
    return select(half.x, half.y, lane.subgroup % 2u == 1u);
}

// Puts vector `i` of the queries, of which there are `count`, in its place; zeros behind them.
fn put_query(i: u32, count: u32, words: vec4<u32>, exponent: u32) {
    if i < HEADS * ROW_VECTORS {
        let v = i % ROW_VECTORS;
        let row = i / ROW_VECTORS + select(0u, HEADS, FP8 && v >= VECTORS);
        put(row * STRIDE + 2u * v, words, kept(select(HOLE, 0u, i < count)), power(exponent));
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

// Adds a tile's rows, times their weights, to a subgroup's sums.
fn add_tile(
    lane: Lane,
    sums_0: ptr<function, Sums>,
    sums_1: ptr<function, Sums>,
    sums_2: ptr<function, Sums>,
    sums_3: ptr<function, Sums>,
    sums_4: ptr<function, Sums>,
    sums_5: ptr<function, Sums>,
    sums_6: ptr<function, Sums>,
    sums_7: ptr<function, Sums>,
) {
    let left = coopLoadT<Left>(&weights[select(0u, 128u * lane.subgroup, FP8)], 16u);
    let column = 128u * lane.subgroup;
    *sums_0 = product(left, column, *sums_0);
    *sums_1 = product(left, column + 16u, *sums_1);
    *sums_2 = product(left, column + 32u, *sums_2);
    *sums_3 = product(left, column + 48u, *sums_3);
    *sums_4 = product(left, column + 64u, *sums_4);
    *sums_5 = product(left, column + 80u, *sums_5);
    *sums_6 = product(left, column + 96u, *sums_6);
    *sums_7 = product(left, column + 112u, *sums_7);
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
    if FP8 {
        for (var i = lane.index; i < TILE; i += LANES) {
            tile[i] = vec4<f16>();
        }
    }
    if lane.index < 6u {
        atomicStore(&exponents[lane.index], LEAST_EXPONENT);
    }
    rises = 0u;
    beyond = 0u;
    // By way of memory: a compiler may take a half that becomes a float again for what it was.
    weights[lane.index] = f16(0x1p20f * f32(params.tokens));
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
    raise_exponents(rows, here(0u, lane), 0u, lane);
    let query_unit = params.scale * power(2u * TARGET - of_queries);
    workgroupBarrier();
    var of_rows = atomicLoad(&exponents[OF_NUMBERS]);
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
    var of_scales = exponents_of_scales();
    var sums_0 = Sums();
    var sums_1 = Sums();
    var sums_2 = Sums();
    var sums_3 = Sums();
    var sums_4 = Sums();
    var sums_5 = Sums();
    var sums_6 = Sums();
    var sums_7 = Sums();
    var turn = 0u;
    // Whether what is too large for a half becomes the largest half: then every tile is worked on twice.
    let cut_off = is_finite(f32(weights[lane.index ^ 1u]));
    var first_row = first;
    // The tile whose exponents were looked at: those of the first were. Once more, then it is what it is; so is a score, which rises each time.
    var known = select(first, end, cut_off);
    var raised = reference;
    var factor = 1.0;
    var weight = 0.0;
    // Two loops: sums that might be rescaled in the inner one would be copied in every round.
    while first_row < end {
        while first_row < end {
            let held = here(turn, lane);
            var larger = false;
            if FP8 {
                let own = select(rows.scales, vec4(0u), slots[turn + lane.index % KEYS] == HOLE);
                if lane.index < KEYS {
                    scales[lane.index] = bitcast<vec4<f32>>(own);
                }
                larger = any(exponents_of_row(own) > of_scales + vec4(1u));
            }
            put_rows(rows, held, power(of_rows), lane);
            // They come while this tile is worked on.
            rows = load_rows(turn ^ KEYS, lane);
            let there = slots[turn + own_key] != HOLE;
            workgroupBarrier();
            var dots = dots_of(left_0, 0u, Sums(), lane);
            dots = dots_of(left_1, 1u, dots, lane);
            dots = dots_of(left_2, 2u, dots, lane);
            dots = dots_of(left_3, 3u, dots, lane);
            dots = dots_of(left_4, 4u, dots, lane);
            dots = dots_of(left_5, 5u, dots, lane);
            dots = dots_of(left_6, 6u, dots, lane);
            dots = dots_of(left_7, 7u, dots, lane);
            if ROW_VECTORS > VECTORS {
                dots = dots_of(left_8, 8u, dots, lane);
            }
            coopStoreT(dots, &parts[256u * lane.subgroup], 16u);
            workgroupBarrier();

            let own_scales = scales[own_key];
            // Of 8-bit rows, codes and other columns apart.
            var dot_product = dot(of_subgroups(select(0u, 128u, FP8) + lane.index), vec4(1.0)) * power(2u * TARGET - of_rows);
            if FP8 {
                dot_product += dot(of_subgroups(lane.index), own_scales) * CODE;
            }
            // A number that is beyond halves makes its row's dots infinite, or no numbers.
            if known != first_row && (larger || cut_off || !is_finite(dot_product)) {
                beyond = 1u;
                rises = 1u;
            }
            let score = select(LOWEST, query_unit * dot_product, there);
            raised = reference;
            factor = 1.0;
            if subgroupAny(score > reference + AHEAD) {
                var highest = score;
                highest = max(highest, subgroupShuffleXor(highest, 8u));
                highest = max(highest, subgroupShuffleXor(highest, 4u));
                highest = max(highest, subgroupShuffleXor(highest, 2u));
                highest = max(highest, subgroupShuffleXor(highest, 1u));
                raised = select(reference, highest, highest > reference + AHEAD);
                factor = exp(reference - raised);
            }
            weight = select(0.0, exp(score - raised), there);
            // Before the first tile there is nothing to rescale.
            if first_row != first && factor != 1.0 {
                rises = 1u;
            }
            if FP8 {
                let units = (vec4(254u) - of_scales) << vec4(23u);
                let scaled = weight * (own_scales * bitcast<vec4<f32>>(units));
                weights[lane.index] = f16(scaled.x);
                weights[128u + lane.index] = f16(scaled.y);
                weights[256u + lane.index] = f16(scaled.z);
                weights[384u + lane.index] = f16(scaled.w);
            } else {
                weights[lane.index] = f16(weight);
            }
            if own_key == 0u {
                factors[own_head] = factor;
            }
            workgroupBarrier();
            if rises != 0u {
                break;
            }
            reference = raised;
            total += weight;
            if lane.index < KEYS {
                slots[turn + lane.index] = slot_at(page, position);
            }
            page = page_of(first_page, position_after);
            position = position_after;
            position_after = position_at(t, first_row + 4u * KEYS + own_key);
            turn ^= KEYS;
            first_row += KEYS;
            add_tile(lane, &sums_0, &sums_1, &sums_2, &sums_3, &sums_4, &sums_5, &sums_6, &sums_7);
            workgroupBarrier();
        }
        if first_row >= end {
            break;
        }
        // Rarely: the tile once more with all that is known, and sums in its units; or with sums relative to a higher score.
        known = first_row;
        let units_fall = beyond != 0u;
        workgroupBarrier();
        rises = 0u;
        beyond = 0u;
        rows = load_rows(turn, lane);
        var ratio = 1.0;
        if units_fall {
            raise_exponents(rows, here(turn, lane), turn, lane);
            if own_key == 0u {
                factors[own_head] = 1.0;
            }
            workgroupBarrier();
            let most = atomicLoad(&exponents[OF_NUMBERS]);
            let before = own_scale(of_scales, lane);
            of_scales = exponents_of_scales();
            ratio = select(falls(of_rows, most), falls(before, own_scale(of_scales, lane)), FP8);
            of_rows = most;
        } else {
            total *= factor;
            reference = raised;
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

    total += subgroupShuffleXor(total, 8u);
    total += subgroupShuffleXor(total, 4u);
    total += subgroupShuffleXor(total, 2u);
    total += subgroupShuffleXor(total, 1u);
    if own_key == 0u {
        totals[own_head] = total;
        references[own_head] = reference;
    }
    let of_codes = CODE * bitcast<f32>(own_scale(of_scales, lane) << 23u);
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
