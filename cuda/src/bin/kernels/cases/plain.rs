//! Kernels that make one tensor of others, row by row: what their cases share.

use std::cell::RefCell;

use dsa80_cuda::registry::PinnedTile;
use dsa80_cuda::{Cost, Gpu, Tile};
use dsa80_reference::Result;

use super::{Case, Run, copies, typed};
use crate::oracle::{Accuracy, half_ulp_bf16, spread};

/// A set of inputs and outputs of such a kernel.
pub(super) trait Plain: Sized + 'static {
    type Tile: PinnedTile;
    type Shape: Copy + 'static;
    /// What all sets read, as it is too large to be there more than once.
    type Common: 'static;

    fn common(gpu: &Gpu, shape: Self::Shape) -> Result<Self::Common>;

    fn new(gpu: &Gpu, common: &Self::Common, shape: Self::Shape, seed: u64) -> Result<Self>;

    fn cost(shape: Self::Shape) -> Cost;

    fn launch(&mut self, gpu: &Gpu, tile: &Self::Tile, common: &Self::Common) -> Result<()>;

    /// Fills what is only written.
    fn poison(&self, gpu: &Gpu) -> Result<()>;

    /// Launches once more where inputs were overwritten, and compares.
    fn check(&mut self, gpu: &Gpu, tile: &Self::Tile, common: &Self::Common) -> Result<Accuracy>;
}

/// One case a shape: its name, its class, the shape, whether `check` runs it.
pub(super) fn cases<K: Plain>(
    shapes: impl IntoIterator<Item = (String, &'static str, K::Shape, bool)>,
) -> Vec<Case> {
    let case = |(name, class, shape, check)| Case {
        kernel: K::Tile::KERNEL,
        name,
        class,
        goal_us: None,
        check,
        make: Box::new(move |gpu: &Gpu, _: &_| {
            Ok(Box::new(Sets::<K>::new(gpu, class, shape)?) as Box<dyn Run>)
        }),
    };
    shapes.into_iter().map(case).collect()
}

/// Rows to compare.
pub(super) fn sampled(rows: usize) -> Vec<usize> {
    spread(256, rows)
}

/// What is bf16 may round to either side of a boundary, which is one step of what was `added` up at most.
pub(super) fn compare(rows: usize, found: &[f64], expected: &[f64], added: f64) -> Accuracy {
    Accuracy::of(rows, 2.5e-3, found, expected, |i| 2.0 * half_ulp_bf16(expected[i]) + added / 65536.0)
}

struct Sets<K: Plain> {
    tile: K::Tile,
    shape: K::Shape,
    common: K::Common,
    sets: RefCell<Vec<K>>,
}

impl<K: Plain> Sets<K> {
    fn new(gpu: &Gpu, class: &str, shape: K::Shape) -> Result<Self> {
        let common = K::common(gpu, shape)?;
        let sets = (0..copies(gpu, K::cost(shape).bytes) as u64)
            .map(|seed| K::new(gpu, &common, shape, 16 * seed))
            .collect::<Result<_>>()?;
        let tile = K::Tile::safe(K::Tile::glm_dims(class));
        Ok(Self { tile, shape, common, sets: RefCell::new(sets) })
    }
}

impl<K: Plain> Run for Sets<K> {
    fn set_tile(&mut self, _gpu: &Gpu, tile: &toml::Table) -> Result<()> {
        self.tile = typed(tile)?;
        Ok(())
    }

    fn copies(&self) -> usize {
        self.sets.borrow().len()
    }

    fn cost(&self) -> Cost {
        K::cost(self.shape)
    }

    fn launch(&mut self, gpu: &Gpu, copy: usize) -> Result<()> {
        self.sets.borrow_mut()[copy].launch(gpu, &self.tile, &self.common)
    }

    fn poison(&mut self, gpu: &Gpu) -> Result<()> {
        self.sets.borrow().iter().try_for_each(|set| set.poison(gpu))
    }

    fn check(&self, gpu: &Gpu, copy: usize) -> Result<Accuracy> {
        self.sets.borrow_mut()[copy].check(gpu, &self.tile, &self.common)
    }
}
