//! Work that reader threads share.

use std::sync::{Mutex, PoisonError};

use super::CheckpointError;

/// Does `work` on every one of `parts`, on up to `readers` threads. The first error ends it.
pub(super) fn for_each<T: Send>(
    readers: usize,
    parts: Vec<T>,
    work: impl Fn(T) -> Result<(), CheckpointError> + Sync,
) -> Result<(), CheckpointError> {
    let threads = readers.min(parts.len());
    if threads <= 1 {
        return parts.into_iter().try_for_each(work);
    }
    let parts = Mutex::new(parts.into_iter());
    let failed = Mutex::new(None);
    let next = || {
        let stop = failed.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        if stop { None } else { parts.lock().unwrap_or_else(PoisonError::into_inner).next() }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(part) = next() {
                    if let Err(error) = work(part) {
                        failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    }
                }
            });
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn every_part_is_done_once_and_an_error_ends_it() {
        for readers in [0, 1, 3, 100] {
            let mut done = vec![0; 40];
            for_each(readers, done.iter_mut().collect(), |part: &mut i32| {
                *part += 1;
                Ok(())
            })
            .unwrap();
            assert_eq!(done, [1; 40]);
            let started = AtomicUsize::new(0);
            let error = for_each(readers, (0..1000).collect(), |part| {
                started.fetch_add(1, Ordering::Relaxed);
                let error = CheckpointError::OutOfRange { what: "part", found: part, limit: 3 };
                if part < 3 { Ok(()) } else { Err(error) }
            });
            assert!(error.unwrap_err().to_string().starts_with("part = "));
            assert!(started.into_inner() < 500);
        }
    }
}
