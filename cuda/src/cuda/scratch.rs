//! What the backend keeps between launches: tiles that were looked up, and workspaces that grow.

use std::cell::RefCell;

use dsa80_reference::Result;

/// What was worked out for a key, so that a launch in a step costs no look-up in a tile file.
#[derive(Debug)]
pub(super) struct Memo<K, V>(RefCell<Vec<(K, V)>>);

impl<K, V> Default for Memo<K, V> {
    fn default() -> Self {
        Self(RefCell::default())
    }
}

impl<K: Copy + PartialEq, V: Copy> Memo<K, V> {
    /// The value of `key`, made by the first who asks.
    pub(super) fn get(&self, key: K, make: impl FnOnce() -> V) -> V {
        // A model has a handful of shapes: a search beats a hash.
        if let Some((_, value)) = self.0.borrow().iter().find(|(known, _)| *known == key) {
            return *value;
        }
        let value = make();
        self.0.borrow_mut().push((key, value));
        value
    }
}

/// A workspace for the largest launch so far, in each of `N` sizes.
///
/// A launch that is larger in any of them gets a new workspace, of a power of two in the first size, which counts the step's tokens, so
/// that a few are ever made. The old ones stay: a graph captured with one may still be launched.
#[derive(Debug)]
pub(super) struct Grown<W, const N: usize>(RefCell<Workspaces<W, N>>);

#[derive(Debug)]
struct Workspaces<W, const N: usize> {
    largest: Option<([usize; N], W)>,
    old: Vec<W>,
}

impl<W, const N: usize> Default for Grown<W, N> {
    fn default() -> Self {
        Self(RefCell::new(Workspaces { largest: None, old: Vec::new() }))
    }
}

impl<W, const N: usize> Grown<W, N> {
    /// Runs `launch` with a workspace that is large enough for `sizes`, which `alloc` makes where there is none.
    ///
    /// # Errors
    /// Memory runs out; the device captures launches, where nothing can be allocated (make a launch of that size before).
    pub(super) fn with<R>(
        &self,
        sizes: [usize; N],
        alloc: impl FnOnce([usize; N]) -> Result<W>,
        launch: impl FnOnce(&W) -> Result<R>,
    ) -> Result<R> {
        let Workspaces { largest, old } = &mut *self.0.borrow_mut();
        let known = match largest {
            Some((known, workspace)) if (0..N).all(|i| sizes[i] <= known[i]) => return launch(workspace),
            Some((known, _)) => *known,
            None => [0; N],
        };
        let sizes = std::array::from_fn(|i| match sizes[i].max(known[i]) {
            size if i == 0 => size.checked_next_power_of_two().unwrap_or(size),
            size => size,
        });
        let workspace = alloc(sizes)?;
        old.extend(largest.take().map(|(_, workspace)| workspace));
        let (_, workspace) = largest.insert((sizes, workspace));
        launch(workspace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_made_once_for_each_key() {
        let memo = Memo::default();
        assert_eq!([memo.get("a", || 1), memo.get("b", || 2), memo.get("a", || 3)], [1, 2, 1]);
    }

    #[test]
    fn a_workspace_grows_and_the_old_ones_stay() {
        let grown = Grown::default();
        let ask = |sizes| grown.with(sizes, Ok, |workspace| Ok(*workspace)).unwrap();
        assert_eq!(ask([0, 0]), [1, 0]);
        assert_eq!(ask([5, 3]), [8, 3]);
        assert_eq!(ask([7, 2]), [8, 3]);
        assert_eq!(ask([2, 9]), [8, 9]);
        assert_eq!(ask([9, 1]), [16, 9]);
        assert_eq!(grown.0.borrow().old, [[1, 0], [8, 3], [8, 9]]);
    }

    #[test]
    fn a_failed_allocation_leaves_what_was_there() {
        let grown = Grown::default();
        grown.with([1], |_| Ok(1), |_| Ok(())).unwrap();
        let refused = dsa80_reference::Error::Backend { backend: "cuda", message: "no".into() };
        assert_eq!(grown.with([2], |_| Err(refused.clone()), |_| Ok(())), Err(refused));
        assert_eq!(grown.with([1], |_| Ok(2), |workspace| Ok(*workspace)).unwrap(), 1);
    }
}
