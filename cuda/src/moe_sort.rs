//! `moe_sort`: pairs of token and k in the order of their experts.

use dsa80_reference::Result;

use crate::device::{Arg, Device, Launch, Program, ProgramEntry};
use crate::int4::PackedInt4;
use crate::moe_int4_grouped::next_args;

const KERNEL: &str = "moe_sort";

/// Experts at most: what shared memory counts for every warp.
pub(crate) const MAX_EXPERTS: usize = 1024;
/// Pairs that few warps sort.
const SHORT: usize = 1024;

/// How many experts' weights are brought to the L2 during the sort, by how many blocks each: what the memory gives in its few
/// microseconds. A long sort is of so many tokens that it does not matter.
fn early(pairs: usize, expert_bytes: usize) -> (usize, usize) {
    const BYTES: usize = 8 << 20;
    if pairs > SHORT {
        (0, 1)
    } else {
        ((BYTES / expert_bytes.max(1)).clamp(1, 8), (expert_bytes >> 16).clamp(1, 16))
    }
}

/// Items of at most `tokens` tokens that `pairs` pairs over `experts` experts can make.
pub(crate) fn max_items(pairs: usize, experts: usize, tokens: usize) -> usize {
    let active = experts.min(pairs);
    active + (pairs - active) / tokens
}

/// Pairs sorted by expert, in device memory.
#[derive(Debug)]
pub(crate) struct Sorted<D: Device> {
    /// `[pairs]` i32: pairs by expert, in order.
    pub(crate) order: D::Buffer,
    /// `[items, 4]` i32: expert, first place in `order`, count, 0.
    pub(crate) items: D::Buffer,
}

/// A block of so many warps sorts.
#[derive(Debug, Clone, Copy)]
struct Sort {
    warps: usize,
    experts: usize,
}

impl Sort {
    fn of(pairs: usize, experts: usize) -> Self {
        Self { warps: if pairs <= SHORT { 8 } else { 16 }, experts }
    }

    fn shared_bytes(self) -> usize {
        (self.warps * (self.experts + 2) * size_of::<i32>()).next_multiple_of(4)
    }

    fn entry(self) -> ProgramEntry {
        let defines = [
            ("EXPERTS", self.experts),
            ("TILE_WARPS", self.warps),
            ("TILE_SHARED_BYTES", self.shared_bytes()),
        ];
        ProgramEntry {
            program: Program::new("moe_sort.cu", defines),
            entry: KERNEL,
            threads: 32 * self.warps as u32,
            shared_bytes: self.shared_bytes(),
            variant: format!("sort, {} warps", self.warps),
        }
    }
}

/// Every variant.
pub(crate) fn programs(experts: usize) -> [ProgramEntry; 2] {
    [8, 16].map(|warps| Sort { warps, experts }.entry())
}

impl<D: Device> Sorted<D> {
    /// For up to `pairs` pairs, cut into items of at least `tokens` tokens.
    pub(crate) fn alloc(device: &D, pairs: usize, experts: usize, tokens: usize) -> Result<Self> {
        let word = size_of::<i32>();
        Ok(Self {
            order: device.alloc("moe order", pairs * word)?,
            items: device.alloc("moe items", max_items(pairs, experts, tokens) * 4 * word)?,
        })
    }

    /// Sorts the pairs `first..first + pairs` of `topk_ids`, whose experts then read `next`; returns the number of items that are written, used or not.
    pub(crate) fn sort(
        &self,
        device: &D,
        topk_ids: &D::Buffer,
        (first, pairs): (usize, usize),
        next: &PackedInt4<D>,
        tokens: usize,
    ) -> Result<usize> {
        let experts = next.count();
        let (chosen, parts) = early(pairs, next.shape().weight_bytes());
        let entry = Sort::of(pairs, experts).entry();
        let items = max_items(pairs, experts, tokens);
        let mut args = vec![Arg::Buffer(topk_ids), Arg::Buffer(&self.order), Arg::Buffer(&self.items)];
        args.extend([first, pairs, tokens, items].map(|number| Arg::I32(number as i32)));
        args.extend(next_args(Some(next)));
        args.push(Arg::I32(parts as i32));
        device.launch(&Launch {
            program: &entry.program,
            entry: entry.entry,
            grid: [1 + (chosen * parts) as u32, 1, 1],
            threads: entry.threads,
            shared_bytes: entry.shared_bytes,
            shape: format!("{pairs} pairs, {experts} experts, items of {tokens}"),
            args: &args,
        })?;
        Ok(items)
    }
}

#[cfg(test)]
mod tests {
    use super::max_items;

    #[test]
    fn items_are_enough_for_every_distribution() {
        for (pairs, experts, tokens) in [(1, 4, 8), (64, 4, 8), (63, 5, 16), (8, 256, 8), (3, 1, 2)] {
            // The most items: as many experts as can be with one pair more than a multiple.
            let most =
                (1..=experts.min(pairs)).map(|active| active + (pairs - active) / tokens).max().unwrap_or(0);
            assert_eq!(max_items(pairs, experts, tokens), most);
        }
        assert_eq!(max_items(0, 4, 8), 0);
    }
}
