//! What a parallel region costs: opening it, handing out its items and seeing them done.
//!
//! `cargo bench -p flash-moe-engine --bench pool`; with `--test` only the answers are checked. On
//! Linux once more with every thread on a core of its own, to see whether that is worth doing.

use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use flash_moe_engine::pool::Pool;

/// Multiply-adds of an item of work: some microseconds, as in a layer.
const WORK: usize = 10_000;

fn main() {
    let test = std::env::args().any(|arg| arg == "--test");
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let regions = if test { 100 } else { 20_000 };
    for pinned in [false, true] {
        let pool = Pool::new(threads);
        if pinned && !pin(&pool) {
            println!("threads cannot be kept on their cores here");
            continue;
        }
        let items = 2 * threads;
        let empty = region(&pool, (regions, items), 0);
        let alone = region(&Pool::new(1), (regions / 10, items), WORK) / threads as f64;
        let together = region(&pool, (regions / 10, items), WORK);
        if !test {
            println!(
                "{threads} threads{}: {empty:.2} us an empty region; {:.2} us beyond {alone:.1} of work",
                if pinned { ", each on its core" } else { "" },
                together - alone
            );
        }
    }
    println!("every item was done once");
}

/// Microseconds of a region with so many items, each of so much work; the median of 9 rounds.
fn region(pool: &Pool, (regions, items): (usize, usize), work: usize) -> f64 {
    let mut times: Vec<f64> = (0..9)
        .map(|_| {
            let done = AtomicUsize::new(0);
            let started = Instant::now();
            for _ in 0..regions {
                pool.run(items, &|_| {
                    black_box((0..work).fold(1.0f32, |x, _| black_box(x * 0.999 + 0.001)));
                    done.fetch_add(1, Ordering::Relaxed);
                });
            }
            let each = started.elapsed().as_secs_f64() * 1e6 / regions as f64;
            assert_eq!(done.into_inner(), items * regions, "items done");
            each
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Keeps each of the pool's threads on a core of its own; false where that cannot be done.
#[cfg(target_os = "linux")]
fn pin(pool: &Pool) -> bool {
    use rustix::thread::{CpuSet, sched_setaffinity};
    let (arrived, failed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let threads = pool.threads();
    pool.run(threads, &|_| {
        let mut set = CpuSet::new();
        // Nobody leaves before all are here, so every thread takes exactly one item.
        set.set(arrived.fetch_add(1, Ordering::SeqCst));
        if sched_setaffinity(None, &set).is_err() {
            failed.fetch_add(1, Ordering::SeqCst);
        }
        while arrived.load(Ordering::SeqCst) < threads {
            std::hint::spin_loop();
        }
    });
    failed.into_inner() == 0
}

#[cfg(not(target_os = "linux"))]
fn pin(_: &Pool) -> bool {
    false
}
