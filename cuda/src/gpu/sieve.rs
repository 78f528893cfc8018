//! Captures of one kernel's launches among those of a step: what each takes, without a profiler.

use dsa80_reference::{RecordedKernel, Result};

use super::graph::Graph;
use super::{Gpu, lock};

/// A kernel and a shape, as tables show them.
type Key = (String, String);

/// What happens to launches while kernels are captured one by one.
#[derive(Debug)]
pub(super) enum Sieve {
    /// All are captured, and listed.
    Listing(Listed),
    /// Those of one key are captured. Whether NVIDIA's library has a product is asked once: asking launches it.
    Keeping { key: Key, products: std::vec::IntoIter<bool> },
}

/// The launches of a step.
#[derive(Debug, Default)]
pub(super) struct Listed {
    /// In the order of the first of each.
    kernels: Vec<(Key, usize)>,
    /// The answers of NVIDIA's library.
    products: Vec<bool>,
    /// A product of which it is not known yet whether the library has it.
    asked: Option<Key>,
}

impl Listed {
    fn count(&mut self, key: Key) {
        match self.kernels.iter_mut().find(|(known, _)| *known == key) {
            Some((_, launches)) => *launches += 1,
            None => self.kernels.push((key, 1)),
        }
    }
}

impl Gpu {
    /// Captures the launches of every kernel, on every shape, by themselves.
    ///
    /// # Errors
    /// As for [`capture`](Self::capture).
    pub fn capture_kernels(
        &self,
        mut launches: impl FnMut() -> Result<()>,
    ) -> Result<Vec<RecordedKernel<Graph>>> {
        let Listed { kernels, products, .. } = self.listed(&mut launches)?;
        let kept = kernels.into_iter().map(|(key, count)| {
            let graph = self.sieved(
                || Sieve::Keeping { key: key.clone(), products: products.clone().into_iter() },
                &mut launches,
            );
            let (name, shape) = key.clone();
            graph.0.map(|graph| RecordedKernel { name, shape, launches: count, graph })
        });
        kept.collect()
    }

    fn listed(&self, launches: &mut impl FnMut() -> Result<()>) -> Result<Listed> {
        let (graph, sieve) = self.sieved(|| Sieve::Listing(Listed::default()), launches);
        graph.map(|_| match sieve {
            Some(Sieve::Listing(listed)) => listed,
            _ => Listed::default(),
        })
    }

    /// A capture through a sieve, and what has become of it. A capture that is repeated begins with a new one.
    fn sieved(
        &self,
        sieve: impl Fn() -> Sieve,
        launches: &mut impl FnMut() -> Result<()>,
    ) -> (Result<Graph>, Option<Sieve>) {
        let graph = self.capture(|| {
            lock(&self.history).sieve = Some(sieve());
            launches()
        });
        (graph, lock(&self.history).sieve.take())
    }

    /// Whether a launch is not to be made.
    pub(super) fn leaves_out(&self, key: impl FnOnce() -> Key) -> bool {
        lock(&self.history).sieve.as_mut().is_some_and(|sieve| sieve.leaves_out(key()))
    }

    /// What is known of a product that is not to be launched; nothing where it is for NVIDIA's library to say.
    pub(super) fn leaves_out_product(&self, key: impl FnOnce() -> Key) -> Option<bool> {
        lock(&self.history).sieve.as_mut().and_then(|sieve| sieve.leaves_out_product(key()))
    }

    /// Whether NVIDIA's library had the product that was asked for.
    pub(super) fn has_answered(&self, launched: bool) {
        if let Some(sieve) = &mut lock(&self.history).sieve {
            sieve.has_answered(launched);
        }
    }
}

impl Sieve {
    fn leaves_out(&mut self, key: Key) -> bool {
        match self {
            Sieve::Listing(listed) => {
                listed.count(key);
                false
            }
            Sieve::Keeping { key: kept, .. } => *kept != key,
        }
    }

    fn leaves_out_product(&mut self, key: Key) -> Option<bool> {
        match self {
            Sieve::Listing(listed) => {
                listed.asked = Some(key);
                None
            }
            Sieve::Keeping { key: kept, products } => {
                let answer = products.next().unwrap_or(false);
                if answer && *kept == key { None } else { Some(answer) }
            }
        }
    }

    fn has_answered(&mut self, launched: bool) {
        if let Sieve::Listing(listed) = self {
            listed.products.push(launched);
            if let Some(key) = listed.asked.take().filter(|_| launched) {
                listed.count(key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two launches of one kernel, a product that the library has and one that it has not, for which a kernel of ours is launched.
    const STEP: [(&str, Option<bool>); 5] =
        [("a", None), ("p", Some(true)), ("a", None), ("p", Some(false)), ("b", None)];

    fn key(name: &str) -> Key {
        (name.to_owned(), "2 x 8".to_owned())
    }

    /// What of a step is launched through a sieve.
    fn launched(sieve: &mut Sieve) -> Vec<usize> {
        let launches = |&(_, &(name, library)): &(usize, &(&str, Option<bool>))| match library {
            None => !sieve.leaves_out(key(name)),
            Some(has) => match sieve.leaves_out_product(key(name)) {
                Some(known) => {
                    assert_eq!(known, has, "the answer of the first time");
                    false
                }
                None => {
                    sieve.has_answered(has);
                    has
                }
            },
        };
        STEP.iter().enumerate().filter(launches).map(|(index, _)| index).collect()
    }

    #[test]
    fn everything_is_listed_and_then_kept_kernel_by_kernel() {
        let mut sieve = Sieve::Listing(Listed::default());
        assert_eq!(launched(&mut sieve), [0, 1, 2, 4]);
        let Sieve::Listing(Listed { kernels, products, .. }) = sieve else { panic!("{sieve:?}") };
        assert_eq!(kernels, [(key("a"), 2), (key("p"), 1), (key("b"), 1)]);
        assert_eq!(products, [true, false]);
        for (name, expected) in [("a", &[0, 2][..]), ("p", &[1]), ("b", &[4])] {
            let mut sieve = Sieve::Keeping { key: key(name), products: products.clone().into_iter() };
            assert_eq!(launched(&mut sieve), expected, "{name}");
        }
    }
}
