//! The pages of the paged caches by number: which are free, who holds them, and which still hold a known
//! prefix.
//!
//! A page is in one of three states: *free* (contents worthless), *held* (one reference for every sequence
//! that has it in its block table), or *idle* (no references, but its contents are those of a known prefix).
//! Idle pages serve prefix hits until they are needed, the least recently used one first.

use std::collections::{BTreeMap, HashMap};

use sha2::{Digest, Sha256};

/// Names the contents of a full page: SHA-256 over the parent page's hash and this page's token ids. Cache
/// rows depend on every token before them, so equal hashes mean equal rows; a cryptographic hash, because a
/// collision would give one caller an answer about another caller's prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct PageHash([u8; 32]);

impl PageHash {
    /// The hash of the page that holds `tokens` behind `parent` (`None` for a sequence's first page).
    pub(super) fn new(parent: Option<&PageHash>, tokens: &[u32]) -> Self {
        let mut hasher = Sha256::new();
        // A first page hashes no parent; all pages of a model are equally long, so lengths keep the two
        // apart.
        if let Some(PageHash(parent)) = parent {
            hasher.update(parent);
        }
        for token in tokens {
            hasher.update(token.to_le_bytes());
        }
        Self(hasher.finalize().into())
    }
}

/// What the prefix cache has for a chain of page hashes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PrefixHit {
    /// Leading pages that are there.
    pub(super) pages: usize,
    /// Those of them that no sequence holds: taking them makes that many fewer pages available.
    pub(super) idle: usize,
}

#[derive(Debug, Default)]
struct Page {
    references: u32,
    /// Set while the page can be found by its contents.
    hash: Option<PageHash>,
    /// Key of the page in `idle`, meaningful only there.
    idle_since: u64,
}

/// Hands out pages, takes them back and finds them again by contents.
#[derive(Debug)]
pub(super) struct BlockManager {
    page_size: usize,
    pages: Vec<Page>,
    free: Vec<u32>,
    by_hash: HashMap<PageHash, u32>,
    /// Idle pages by the time they became so: the first one is evicted first.
    idle: BTreeMap<u64, u32>,
    clock: u64,
}

impl BlockManager {
    /// `num_pages` free pages of `page_size` tokens.
    pub(super) fn new(page_size: usize, num_pages: usize) -> Self {
        let num_pages = u32::try_from(num_pages).unwrap_or(u32::MAX);
        Self {
            page_size,
            pages: (0..num_pages).map(|_| Page::default()).collect(),
            free: (0..num_pages).rev().collect(),
            by_hash: HashMap::new(),
            idle: BTreeMap::new(),
            clock: 0,
        }
    }

    /// Tokens a page holds.
    pub(super) fn page_size(&self) -> usize {
        self.page_size
    }

    /// Pages in all.
    pub(super) fn total(&self) -> usize {
        self.pages.len()
    }

    /// Pages that [`allocate`](Self::allocate) can still hand out.
    pub(super) fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Pages that no sequence holds but that still serve prefix hits.
    pub(super) fn idle(&self) -> usize {
        self.idle.len()
    }

    /// A page of unknown contents with one reference; `None` when all are held.
    pub(super) fn allocate(&mut self) -> Option<u32> {
        let page = match self.free.pop() {
            Some(page) => page,
            None => {
                let (_, page) = self.idle.pop_first()?;
                if let Some(hash) = self.pages[page as usize].hash.take() {
                    self.by_hash.remove(&hash);
                }
                page
            }
        };
        self.pages[page as usize].references = 1;
        Some(page)
    }

    /// How much of the chain `hashes` is there. Changes nothing.
    pub(super) fn lookup(&self, hashes: &[PageHash]) -> PrefixHit {
        let mut hit = PrefixHit { pages: 0, idle: 0 };
        for page in hashes.iter().map_while(|hash| self.by_hash.get(hash)) {
            hit.pages += 1;
            hit.idle += usize::from(self.pages[*page as usize].references == 0);
        }
        hit
    }

    /// A reference to the page with these contents, if there is one.
    pub(super) fn acquire(&mut self, hash: &PageHash) -> Option<u32> {
        let number = *self.by_hash.get(hash)?;
        let page = &mut self.pages[number as usize];
        if page.references == 0 {
            self.idle.remove(&page.idle_since);
        }
        page.references += 1;
        Some(number)
    }

    /// Makes a held page, all of whose rows are computed, findable by its contents. When another page already
    /// holds the same contents, that one stays the one that is found.
    pub(super) fn publish(&mut self, page: u32, hash: PageHash) {
        if let std::collections::hash_map::Entry::Vacant(entry) = self.by_hash.entry(hash) {
            entry.insert(page);
            self.pages[page as usize].hash = Some(hash);
        }
    }

    /// Gives back one reference to each of a sequence's pages. The last page becomes idle first: a prefix
    /// without its end is still of use, an end without its prefix never is.
    pub(super) fn release(&mut self, pages: Vec<u32>) {
        for number in pages.into_iter().rev() {
            let page = &mut self.pages[number as usize];
            page.references =
                page.references.checked_sub(1).expect("a sequence gives back only references that it holds");
            if page.references > 0 {
                continue;
            }
            if page.hash.is_some() {
                page.idle_since = self.clock;
                self.idle.insert(self.clock, number);
                self.clock += 1;
            } else {
                self.free.push(number);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(tokens: &[u32]) -> PageHash {
        PageHash::new(None, tokens)
    }

    #[test]
    fn hands_out_every_page_once_and_then_none() {
        let mut blocks = BlockManager::new(4, 3);
        let mut pages: Vec<u32> = std::iter::from_fn(|| blocks.allocate()).collect();
        assert_eq!(blocks.available(), 0);
        pages.sort_unstable();
        assert_eq!(pages, [0, 1, 2]);
        blocks.release(pages);
        assert_eq!((blocks.available(), blocks.idle()), (3, 0));
    }

    #[test]
    fn a_published_page_is_found_again_until_it_is_evicted() {
        let mut blocks = BlockManager::new(2, 1);
        let page = blocks.allocate().unwrap();
        blocks.publish(page, hash(&[1, 2]));
        blocks.release(vec![page]);
        assert_eq!((blocks.available(), blocks.idle()), (1, 1));
        assert_eq!(blocks.lookup(&[hash(&[1, 2])]), PrefixHit { pages: 1, idle: 1 });
        assert_eq!(blocks.acquire(&hash(&[1, 2])), Some(page));
        assert_eq!((blocks.available(), blocks.idle()), (0, 0));
        assert_eq!(blocks.lookup(&[hash(&[1, 2])]), PrefixHit { pages: 1, idle: 0 });
        blocks.release(vec![page]);
        assert_eq!(blocks.allocate(), Some(page));
        assert_eq!(blocks.acquire(&hash(&[1, 2])), None);
        blocks.release(vec![page]);
        assert_eq!((blocks.available(), blocks.idle()), (1, 0));
    }

    #[test]
    fn a_shared_page_stays_held_until_its_last_holder_leaves() {
        let mut blocks = BlockManager::new(2, 2);
        let page = blocks.allocate().unwrap();
        blocks.publish(page, hash(&[1, 2]));
        assert_eq!(blocks.acquire(&hash(&[1, 2])), Some(page));
        blocks.release(vec![page]);
        let other = blocks.allocate().unwrap();
        assert_ne!(other, page);
        assert_eq!(blocks.allocate(), None);
        blocks.release(vec![page]);
        assert_eq!(blocks.allocate(), Some(page));
    }

    #[test]
    fn the_least_recently_used_page_is_evicted_first_and_ends_before_beginnings() {
        let mut blocks = BlockManager::new(1, 4);
        let a = hash(&[1]);
        let ab = PageHash::new(Some(&a), &[2]);
        let c = hash(&[3]);
        let pages: Vec<u32> = (0..3).map(|_| blocks.allocate().unwrap()).collect();
        for (page, hash) in pages.iter().zip([a, ab, c]) {
            blocks.publish(*page, hash);
        }
        blocks.release(vec![pages[0], pages[1]]);
        blocks.release(vec![pages[2]]);
        // The one free page goes first.
        assert_eq!(blocks.allocate(), Some(3));
        assert_eq!(blocks.lookup(&[a, ab]).pages, 2);
        assert_eq!(blocks.allocate(), Some(pages[1]));
        assert_eq!(blocks.lookup(&[a, ab]).pages, 1);
        assert_eq!(blocks.allocate(), Some(pages[0]));
        assert_eq!(blocks.lookup(&[c]).pages, 1);
        assert_eq!(blocks.allocate(), Some(pages[2]));
        assert_eq!(blocks.lookup(&[c]).pages, 0);
    }

    #[test]
    fn equal_contents_twice_keep_the_first_page_findable() {
        let mut blocks = BlockManager::new(2, 2);
        let first = blocks.allocate().unwrap();
        let second = blocks.allocate().unwrap();
        blocks.publish(first, hash(&[1, 2]));
        blocks.publish(second, hash(&[1, 2]));
        blocks.release(vec![second]);
        assert_eq!((blocks.available(), blocks.idle()), (1, 0), "the duplicate is free at once");
        assert_eq!(blocks.acquire(&hash(&[1, 2])), Some(first));
    }

    #[test]
    fn hashes_tell_the_parent_the_tokens_and_their_order_apart() {
        let root = hash(&[1, 2]);
        let hashes = [
            root,
            hash(&[2, 1]),
            hash(&[1]),
            PageHash::new(Some(&root), &[1, 2]),
            PageHash::new(Some(&hash(&[2, 1])), &[1, 2]),
        ];
        let distinct: std::collections::HashSet<_> = hashes.iter().collect();
        assert_eq!(distinct.len(), hashes.len());
    }
}
