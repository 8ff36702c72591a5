//! Records a second and processor time through the expert store, by reader.
//!
//!     cargo bench -p flash-moe-engine --bench readers -- DIR [ROUNDS [direct|buffered]]
//!
//! "stream" asks for a layer's experts at once and takes them as they land: a prompt. "step" asks for
//! 8 of a layer and waits for all before it asks again: a token. The readers take turns and every round
//! draws other records, so that what the disk does in those minutes falls on both. The answer is
//! checked: the readers must give the same bytes.

use std::path::Path;
use std::time::{Duration, Instant};

use flash_moe_engine::container::Container;
use flash_moe_engine::shape::{ExpertId, LayerId};
use flash_moe_engine::store::{ExpertStore, IoMode, Landed, Purpose, Reader, StoreOptions};

const READERS: [Reader; 2] = [Reader::Threads, Reader::Uring];
const DEPTH: usize = 8;
const SLOTS: usize = 64;
const TIME: Duration = Duration::from_millis(1500);
const STEP: usize = 8;

#[derive(Clone, Copy, PartialEq)]
enum Pattern {
    Stream,
    Step,
}

struct Row {
    reader: Reader,
    pattern: Pattern,
    rate: f64,
    processor: f64,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let Some(dir) = arguments.first().filter(|a| !a.starts_with("--")) else {
        println!("SKIP: no container named; cargo bench --bench readers -- DIR [ROUNDS]");
        return;
    };
    let rounds: usize = arguments.get(1).map_or(5, |n| n.parse().expect("a number of rounds"));
    let io = match arguments.get(2).map(String::as_str) {
        Some("buffered") => IoMode::Buffered,
        _ => IoMode::Direct,
    };
    let container = Container::open(Path::new(dir)).expect("a container");
    let stores = READERS.map(|reader| open(&container, io, reader));
    same_bytes(&stores, &container);
    let mut draw = Draw(1);
    let mut rows = Vec::new();
    for round in 0..rounds {
        for pattern in [Pattern::Stream, Pattern::Step] {
            // Who goes first changes from round to round.
            for turn in 0..stores.len() {
                let store = &stores[(round + turn) % stores.len()];
                rows.push(measure(store, &container, pattern, &mut draw));
            }
        }
    }
    for pattern in [Pattern::Stream, Pattern::Step] {
        for store in &stores {
            report(&rows, store.reader(), pattern);
        }
    }
}

fn open(container: &Container, io: IoMode, reader: Reader) -> ExpertStore {
    let options = StoreOptions { slots: SLOTS, readers: DEPTH, reader, io, spare_bytes: 0 };
    let store = ExpertStore::open(container, options).expect("a store");
    assert_eq!(store.reader(), reader, "this system has no such reader");
    store
}

/// Also touches every slot, whose pages are made on the first write.
fn same_bytes(stores: &[ExpertStore; 2], container: &Container) {
    let experts: Vec<_> = (0..container.shape().moe.experts as u16).map(ExpertId).collect();
    let [a, b] = stores.each_ref().map(|store| {
        let mut sums = Vec::new();
        let mut fetch = store.fetch(LayerId(0), &experts);
        while let Some(record) = fetch.next_in_order().expect("intact records") {
            sums.push(xxhash_rust::xxh3::xxh3_64(&record));
        }
        sums
    });
    assert!(a == b, "the readers gave different bytes");
}

fn measure(store: &ExpertStore, container: &Container, pattern: Pattern, draw: &mut Draw) -> Row {
    let (layers, experts) = (container.shape().layers.len(), container.shape().moe.experts);
    store.forget();
    let before = store.counters().read_bytes;
    let (started, processor) = (Instant::now(), processor_seconds());
    let mut landed = Landed::new();
    while started.elapsed() < TIME {
        let layer = LayerId(draw.below(layers) as u16);
        let count = if pattern == Pattern::Step { STEP } else { experts };
        let first = draw.below(experts);
        // A stride without a factor in common with a power of two visits every expert once.
        let ids = (0..count).map(|i| ExpertId(((first + i * 37) % experts) as u16));
        let mut fetch = store.sweep(layer, ids.map(|id| (id, Purpose::Scan)));
        loop {
            fetch.ready(&mut landed).expect("intact records");
            if landed.is_empty() {
                break;
            }
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    let gigabytes = (store.counters().read_bytes - before) as f64 / 1e9;
    Row {
        reader: store.reader(),
        pattern,
        rate: gigabytes / seconds,
        processor: (processor_seconds() - processor) / gigabytes,
    }
}

fn report(rows: &[Row], reader: Reader, pattern: Pattern) {
    let of = |value: fn(&Row) -> f64| {
        let rows = rows.iter().filter(|r| r.reader == reader && r.pattern == pattern);
        let mut values: Vec<f64> = rows.map(value).collect();
        values.sort_by(f64::total_cmp);
        (values[0], values[values.len() / 2], values[values.len() - 1])
    };
    let (rate, processor) = (of(|r| r.rate), of(|r| r.processor));
    println!(
        "{:<8}{:<8} GB/s {:.2}/{:.2}/{:.2}   processor s/GB {:.4}/{:.4}/{:.4}  (least/median/most)",
        if pattern == Pattern::Step { "step" } else { "stream" },
        reader.name(),
        rate.0,
        rate.1,
        rate.2,
        processor.0,
        processor.1,
        processor.2,
    );
}

/// Processor time of the process's threads so far; 0 where the system does not say.
fn processor_seconds() -> f64 {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return 0.0 };
    let of = |task: std::fs::DirEntry| {
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<f64>().ok()
    };
    tasks.flatten().filter_map(of).sum::<f64>() / 1e9
}

/// A fixed sequence.
struct Draw(u64);

impl Draw {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        ((self.0 >> 33) as usize) % n
    }
}
