// A paged cache in up to four windows: what the adapter binds at once may be less than a cache. A slot is a number inside its window, and
// the window above that.

// Windows that are bound.
override WINDOWS: u32 = 1u;

const HOLE: u32 = 0xffffffffu;
const WINDOW_BITS: u32 = 30u;

fn slot_of(page: u32, place: u32, page_size: u32, window_pages: u32) -> u32 {
    if WINDOWS == 1u {
        return page * page_size + place;
    }
    return (page % window_pages * page_size + place) | page / window_pages << WINDOW_BITS;
}

fn window_of(slot: u32) -> u32 {
    return select(slot >> WINDOW_BITS, 0u, WINDOWS == 1u);
}

fn in_window(slot: u32) -> u32 {
    return select(slot & ((1u << WINDOW_BITS) - 1u), slot, WINDOWS == 1u);
}
