//! Which parts of large pieces of memory are given out: pieces that are costly to get, such as memory that a device reaches.

use std::collections::BTreeMap;

/// Blocks begin at multiples of this: what a disk reads to, and no two blocks share.
const ALIGNMENT: usize = 4096;

/// Slabs, and what of each is free. The memory itself is somebody else's.
#[derive(Debug)]
pub struct Slabs {
    /// Of all slabs together, at most.
    most: usize,
    bytes: usize,
    /// By number: the slab's length, and its free parts by offset, no two of which touch.
    slabs: BTreeMap<usize, (usize, BTreeMap<usize, usize>)>,
    next: usize,
}

/// A part of a slab that is given out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The slab's number.
    pub slab: usize,
    /// Where it begins.
    pub offset: usize,
    /// How long it is: what was asked for, rounded up.
    bytes: usize,
}

impl Slabs {
    /// None yet, and never more than `most` bytes of them.
    pub fn new(most: usize) -> Self {
        Self { most, bytes: 0, slabs: BTreeMap::new(), next: 0 }
    }

    /// Bytes of all slabs.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether a slab of `bytes` is within the limit.
    pub fn has_room(&self, bytes: usize) -> bool {
        self.bytes.saturating_add(bytes) <= self.most
    }

    /// What so many bytes take of a slab: whole pages. None where that is more than there can be.
    pub fn taken_by(bytes: usize) -> Option<usize> {
        bytes.max(1).checked_next_multiple_of(ALIGNMENT)
    }

    /// A slab of `bytes`, all free, and its number.
    pub fn add(&mut self, bytes: usize) -> usize {
        let number = self.next;
        self.next += 1;
        self.bytes += bytes;
        self.slabs.insert(number, (bytes, BTreeMap::from([(0, bytes)])));
        number
    }

    /// The first free place of so many bytes.
    pub fn take(&mut self, bytes: usize) -> Option<Place> {
        let bytes = Self::taken_by(bytes)?;
        let (number, offset) = self.slabs.iter().find_map(|(&number, (_, free))| {
            free.iter().find(|(_, len)| **len >= bytes).map(|(&offset, _)| (number, offset))
        })?;
        let (_, free) = self.slabs.get_mut(&number)?;
        let len = free.remove(&offset)?;
        if len > bytes {
            free.insert(offset + bytes, len - bytes);
        }
        Some(Place { slab: number, offset, bytes })
    }

    /// Frees a place again; true if nothing of its slab is given out any more, which then is no longer one of these.
    pub fn give_back(&mut self, Place { slab, mut offset, mut bytes }: Place) -> bool {
        let Some((length, free)) = self.slabs.get_mut(&slab) else { return false };
        if let Some((&before, &len)) = free.range(..offset).next_back()
            && before + len == offset
        {
            free.remove(&before);
            (offset, bytes) = (before, len + bytes);
        }
        if let Some(len) = free.remove(&(offset + bytes)) {
            bytes += len;
        }
        if bytes < *length {
            free.insert(offset, bytes);
            return false;
        }
        self.bytes -= *length;
        self.slabs.remove(&slab);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random;

    #[test]
    fn places_are_the_first_that_fit_and_grow_together_when_they_come_back() {
        let mut slabs = Slabs::new(10 * ALIGNMENT);
        assert!(slabs.take(1).is_none() && slabs.has_room(10 * ALIGNMENT));
        assert_eq!(slabs.add(4 * ALIGNMENT), 0);
        assert!(slabs.has_room(6 * ALIGNMENT) && !slabs.has_room(6 * ALIGNMENT + 1));
        let [a, b, c] = [ALIGNMENT - 1, ALIGNMENT + 1, ALIGNMENT].map(|bytes| slabs.take(bytes).unwrap());
        assert_eq!([a.offset, b.offset, c.offset], [0, ALIGNMENT, 3 * ALIGNMENT]);
        assert!(slabs.take(1).is_none());
        assert!(!slabs.give_back(a) && !slabs.give_back(c));
        // Two of one page, apart.
        assert!(slabs.take(2 * ALIGNMENT).is_none());
        let first = slabs.take(1).unwrap();
        assert!(first == a && !slabs.give_back(first));
        assert!(slabs.give_back(b), "all of it is free");
        assert!(slabs.bytes() == 0 && slabs.take(1).is_none());
        assert!(slabs.take(usize::MAX).is_none());
        // A slab for what is no whole number of pages holds it.
        let odd = 40 * ALIGNMENT + 1;
        let slab = slabs.add(Slabs::taken_by(odd).unwrap());
        let place = slabs.take(odd).unwrap();
        assert!(place.slab == slab && slabs.give_back(place));
        assert_eq!(slabs.add(8 * ALIGNMENT), 2);
        assert_eq!(slabs.take(8 * ALIGNMENT).unwrap().slab, 2);
        assert!(slabs.take(usize::MAX).is_none());
    }

    #[test]
    fn no_two_places_overlap_and_in_the_end_nothing_is_left() {
        let mut slabs = Slabs::new(usize::MAX);
        let mut taken: Vec<Place> = Vec::new();
        for i in 0..4000 {
            let draw = random::word(i, 3) as usize;
            if draw.is_multiple_of(3) && !taken.is_empty() {
                slabs.give_back(taken.swap_remove(draw / 3 % taken.len()));
                continue;
            }
            let bytes = 1 + draw / 3 % (9 * ALIGNMENT);
            let place = slabs.take(bytes).unwrap_or_else(|| {
                slabs.add(16 * ALIGNMENT);
                slabs.take(bytes).unwrap()
            });
            let apart = |other: &Place| {
                other.slab != place.slab
                    || other.offset + other.bytes <= place.offset
                    || place.offset + place.bytes <= other.offset
            };
            assert!(taken.iter().all(apart), "{place:?} {taken:?}");
            assert!(place.offset + bytes <= 16 * ALIGNMENT && place.bytes >= bytes);
            taken.push(place);
            if i > 2000 {
                // Most come back: holes are used again, instead of more slabs.
                assert!(
                    slabs.bytes()
                        <= 3 * taken.iter().map(|place| place.bytes).sum::<usize>().max(16 * ALIGNMENT)
                );
            }
        }
        let places = taken.len();
        let emptied = taken.into_iter().filter(|&place| slabs.give_back(place)).count();
        assert!(places > emptied && slabs.bytes() == 0 && slabs.slabs.is_empty());
    }
}
