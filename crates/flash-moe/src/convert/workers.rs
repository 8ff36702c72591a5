//! Threads for streaming work: jobs start in order, and memory does not grow with the machine.
//!
//! Jobs are handed out one by one, so that reads and writes stay nearly sequential, and each thread
//! brings its own scratch. The number of threads is bounded by memory as well as by cores. Which
//! thread does a job never changes its result; of several errors the earliest job's is reported.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result};

/// Memory that all threads together may use for buffers, in bytes.
const BUFFER_BYTES: usize = 768 << 20;

/// A pool of threads.
pub struct Workers {
    pool: rayon::ThreadPool,
}

impl Workers {
    /// A pool for jobs that need `bytes` of buffers each; `asked` threads, or one a core.
    ///
    /// # Errors
    /// The system refuses to start threads.
    pub fn new(asked: Option<usize>, bytes: usize) -> Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let threads = asked.unwrap_or(cores).min(BUFFER_BYTES / bytes.max(1)).max(1);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("convert {i}"))
            .build()
            .context("cannot start threads")?;
        Ok(Self { pool })
    }

    /// Runs `job(0..count)`, each thread with a scratch of its own.
    ///
    /// # Errors
    /// The error of the earliest job that failed; later jobs may not have run.
    pub fn run<S>(
        &self,
        count: usize,
        scratch: impl Fn() -> S + Sync,
        job: impl Fn(usize, &mut S) -> Result<()> + Sync,
    ) -> Result<()> {
        let next = AtomicUsize::new(0);
        let failed = AtomicBool::new(false);
        let first_error: Mutex<Option<(usize, anyhow::Error)>> = Mutex::new(None);
        self.pool.broadcast(|_| {
            let mut scratch = scratch();
            while !failed.load(Ordering::Relaxed) {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= count {
                    return;
                }
                if let Err(error) = job(index, &mut scratch) {
                    failed.store(true, Ordering::Relaxed);
                    let mut slot = first_error.lock().expect("no job panics while holding it");
                    if slot.as_ref().is_none_or(|(earliest, _)| index < *earliest) {
                        *slot = Some((index, error));
                    }
                }
            }
        });
        match first_error.into_inner().expect("no job panics while holding it") {
            Some((_, error)) => Err(error),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_job_runs_once_and_the_earliest_error_wins() {
        let workers = Workers::new(Some(3), 1).unwrap();
        let runs: Vec<AtomicUsize> = (0..100).map(|_| AtomicUsize::new(0)).collect();
        workers
            .run(
                100,
                || (),
                |i, ()| {
                    runs[i].fetch_add(1, Ordering::Relaxed);
                    Ok(())
                },
            )
            .unwrap();
        assert!(runs.iter().all(|n| n.load(Ordering::Relaxed) == 1));
        let fails = |i: usize, (): &mut ()| if i >= 40 { anyhow::bail!("job {i}") } else { Ok(()) };
        assert_eq!(workers.run(100, || (), fails).unwrap_err().to_string(), "job 40");
    }

    #[test]
    fn threads_are_bounded_by_the_memory_that_they_need() {
        for (bytes, threads) in [(BUFFER_BYTES / 2, 2), (BUFFER_BYTES * 2, 1)] {
            let workers = Workers::new(Some(64), bytes).unwrap();
            assert_eq!(workers.pool.current_num_threads(), threads);
        }
    }
}
