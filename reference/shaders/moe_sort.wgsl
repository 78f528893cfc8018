// One workgroup: the pairs of tokens and experts, those of an expert together and in their order, and items of up to `item_pairs` of
// them. A pair whose expert does not exist is in no item.

struct Params {
    // `t * K + k`.
    pairs: u32,
    experts: u32,
    item_pairs: u32,
}

// Of an expert, its first among `sorted`, and how many.
struct Item {
    expert: u32,
    first: u32,
    count: u32,
}

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read> topk_ids: array<u32>;
@group(0) @binding(1) var<storage, read_write> sorted: array<u32>;
@group(0) @binding(2) var<storage, read_write> items: array<Item>;

// Ids, or sums, of the lanes.
var<workgroup> ids: array<u32, WORKGROUP>;
var<workgroup> more: array<u32, WORKGROUP>;

// The sums of `value` and of `other` over the lanes before this one, and over all. All lanes call it.
fn before(value: u32, other: u32, lane: u32) -> vec4<u32> {
    workgroupBarrier();
    ids[lane] = value;
    more[lane] = other;
    workgroupBarrier();
    var sums = vec4(0u);
    for (var i = 0u; i < WORKGROUP; i++) {
        let both = vec2(ids[i], more[i]);
        sums += vec4(select(vec2(0u), both, i < lane), both);
    }
    return sums;
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(local_invocation_index) lane: u32) {
    var pairs_before = 0u;
    var items_before = 0u;
    // A lane has an expert.
    for (var round = 0u; round < params.experts; round += WORKGROUP) {
        let expert = round + lane;
        var count = 0u;
        for (var first = 0u; first < params.pairs; first += WORKGROUP) {
            workgroupBarrier();
            ids[lane] = topk_ids[min(first + lane, params.pairs - 1u)];
            workgroupBarrier();
            for (var i = 0u; i < min(WORKGROUP, params.pairs - first); i++) {
                count += select(0u, 1u, ids[i] == expert && expert < params.experts);
            }
        }
        let own_items = (count + params.item_pairs - 1u) / params.item_pairs;
        let sums = before(count, own_items, lane);
        let start = pairs_before + sums.x;
        for (var i = 0u; i < own_items; i++) {
            let taken = i * params.item_pairs;
            items[items_before + sums.y + i] = Item(expert, start + taken, min(count - taken, params.item_pairs));
        }
        pairs_before += sums.z;
        items_before += sums.w;
        var next = start;
        for (var first = 0u; first < params.pairs; first += WORKGROUP) {
            workgroupBarrier();
            ids[lane] = topk_ids[min(first + lane, params.pairs - 1u)];
            workgroupBarrier();
            for (var i = 0u; i < min(WORKGROUP, params.pairs - first); i++) {
                if ids[i] == expert && expert < params.experts {
                    sorted[next] = first + i;
                    next++;
                }
            }
        }
    }
    // The rest of the items are empty.
    for (var i = items_before + lane; i < arrayLength(&items); i += WORKGROUP) {
        items[i] = Item(0u, 0u, 0u);
    }
}
