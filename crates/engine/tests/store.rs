//! The expert store and a session on the built-in model's own files.
//!
//! Records must be the files' bytes whatever the pool's size and the way of reading; what two fetches
//! want is read once; a file that is cut off under a running engine gives an error that names layer,
//! expert, file and offset, and a session that met it computes nothing more.

use std::fs::{self, OpenOptions};
use std::ops::{ControlFlow, Deref, DerefMut};
use std::path::Path;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use flash_moe_engine::budget::Budget;
use flash_moe_engine::container::Container;
use flash_moe_engine::engine::{Engine, Options};
use flash_moe_engine::memory::Block;
use flash_moe_engine::session::Session;
use flash_moe_engine::shape::{ExpertId, LayerId, TokenId};
use flash_moe_engine::store::{ExpertStore, IoMode, Landed, Purpose, Reader, StoreOptions};
use flash_moe_engine::{Arithmetic, Error, Lookahead};
use tempfile::TempDir;

const EXPERTS: u16 = 48;

fn model() -> (TempDir, Container) {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny");
    for name in ["flash-moe.json", "dense.safetensors", "tokenizer.json"] {
        fs::copy(tiny.join(name), dir.path().join(name)).expect("a file of the built-in model");
    }
    for folder in ["experts", "checksums"] {
        fs::create_dir(dir.path().join(folder)).expect("a folder");
        for file in fs::read_dir(tiny.join(folder)).expect("a folder of the built-in model") {
            let file = file.expect("an entry");
            fs::copy(file.path(), dir.path().join(folder).join(file.file_name())).expect("a copy");
        }
    }
    let container = Container::open(dir.path()).expect("the built-in model opens");
    (dir, container)
}

const READERS: [Reader; 2] = [Reader::Threads, Reader::Uring];

fn store(container: &Container, slots: usize, io: IoMode, reader: Reader) -> ExpertStore {
    let options = StoreOptions { slots, readers: 4, reader, io, spare_bytes: 0 };
    let store = ExpertStore::open(container, options).expect("a store");
    if store.reader() != reader {
        println!("SKIP {reader:?}: this system has none, {:?} took its place", store.reader());
    }
    store
}

/// Fetches in the order of landing and checks each record against the file.
fn fetch_all(store: &ExpertStore, container: &Container, layer: u16, experts: &[u16]) {
    let entry = &container.manifest().experts[usize::from(layer)];
    let file = fs::read(container.dir().join(&entry.file)).expect("a layer file");
    let ids: Vec<ExpertId> = experts.iter().map(|&e| ExpertId(e)).collect();
    let mut fetch = store.fetch(LayerId(layer), &ids);
    let mut landed = Landed::new();
    let mut seen = vec![false; experts.len()];
    loop {
        fetch.ready(&mut landed).expect("intact records");
        if landed.is_empty() {
            break;
        }
        for (place, record) in &landed {
            let start = usize::from(experts[*place]) * entry.stride_bytes;
            assert!(record[..entry.record_bytes] == file[start..][..entry.record_bytes]);
            assert!(!std::mem::replace(&mut seen[*place], true), "handed out twice");
        }
    }
    assert!(seen.into_iter().all(|s| s), "everything was handed out");
}

#[test]
fn records_are_the_files_bytes_in_any_pool_and_way_of_reading() {
    let (_dir, container) = model();
    for (io, reader) in ways() {
        for slots in [4, 7, 100, 1000] {
            let store = store(&container, slots, io, reader);
            let all: Vec<u16> = (0..EXPERTS).collect();
            for layer in [0, 11, 0] {
                fetch_all(&store, &container, layer, &all);
                fetch_all(&store, &container, layer, &[5, 1, 47, 1]);
            }
        }
    }
}

fn ways() -> impl Iterator<Item = (IoMode, Reader)> {
    READERS.into_iter().flat_map(|r| [IoMode::Auto, IoMode::Buffered].map(|io| (io, r)))
}

/// Fetches into lent blocks of these sizes and checks each record against the file; how many were in them.
fn fetch_all_into(
    store: &ExpertStore,
    container: &Container,
    layer: u16,
    experts: &[u16],
) -> usize {
    let entry = &container.manifest().experts[usize::from(layer)];
    let file = fs::read(container.dir().join(&entry.file)).expect("a layer file");
    let lend = |&expert| (ExpertId(expert), Block::zeroed(entry.stride_bytes));
    let mut fetch = store.fetch_into(LayerId(layer), experts.iter().map(lend), Purpose::Use);
    let mut in_them = 0;
    for &expert in experts {
        let record = fetch.next_in_order().expect("an intact record").expect("one for each");
        let start = usize::from(expert) * entry.stride_bytes;
        assert!(record[..entry.record_bytes] == file[start..][..entry.record_bytes]);
        in_them += usize::from(record.is_lent());
    }
    assert!(fetch.next_in_order().expect("no read").is_none());
    in_them
}

#[test]
fn lent_blocks_get_the_files_bytes_and_the_pool_none_of_them() {
    let (_dir, container) = model();
    for (io, reader) in ways() {
        let store = store(&container, 4, io, reader);
        let all: Vec<u16> = (0..EXPERTS).collect();
        for layer in [0, 11, 0] {
            assert_eq!(fetch_all_into(&store, &container, layer, &all), all.len());
        }
        assert_eq!(store.occupancy(), (4, 0));
        let counters = store.counters();
        assert_eq!((counters.hits, counters.misses), (0, 3 * u64::from(EXPERTS)));
        fetch_all(&store, &container, 3, &[7, 9]);
        assert_eq!(fetch_all_into(&store, &container, 3, &[7, 8, 9]), 1);
        assert_eq!(store.counters().hits, 2);
        let block = Block::zeroed(container.layouts()[0].padded_bytes());
        assert_eq!(store.reads_into(block), store.reader() == Reader::Threads);
    }
}

#[test]
fn a_lent_block_that_is_too_short_or_a_file_that_is_cut_off_is_an_error_and_not_remembered() {
    for (io, reader) in ways() {
        let (dir, container) = model();
        let store = store(&container, 10, io, reader);
        let short = [(ExpertId(3), Block::zeroed(100))].into_iter();
        let error = store.fetch_into(LayerId(5), short, Purpose::Use).next_in_order();
        let said = error.err().expect("a refusal").to_string();
        assert!(said.contains("the block is shorter than the record"), "{said}");
        assert!(!store.reads_into(Block::zeroed(100)));
        let layer = dir.path().join("experts/layer_05.bin");
        let whole = fs::read(&layer).expect("a layer file");
        cut(&layer, 20 * 28_672 + 100);
        let lend = |expert| (ExpertId(expert), Block::zeroed(28_672));
        let mut fetch =
            store.fetch_into(LayerId(5), [20, 19, 18].into_iter().map(lend), Purpose::Scan);
        let error = fetch.next_in_order().err().expect("the record is cut off");
        drop(fetch);
        let text = error.to_string();
        assert!(text.contains("layer_05.bin") && text.contains("truncated"), "{text}");
        assert!(matches!(error, Error::Record { expert: ExpertId(20), .. }), "{text}");
        fs::write(&layer, whole).expect("the layer file");
        assert_eq!(fetch_all_into(&store, &container, 5, &[18, 20]), 2);
    }
}

#[test]
fn a_fetch_that_is_dropped_gives_its_blocks_back_when_no_read_has_them() {
    let (_dir, container) = model();
    for (io, reader) in ways() {
        let store = store(&container, 4, io, reader);
        let lent = Arc::new(());
        for layer in 0..12 {
            let lend = |expert| {
                let bytes = Watched { bytes: vec![0; 28_672], _lent: Arc::clone(&lent) };
                (ExpertId(expert), Block::lent(Box::new(bytes)))
            };
            let fetch = store.fetch_into(LayerId(layer), (0..40).map(lend), Purpose::Scan);
            drop(fetch);
            assert_eq!(Arc::strong_count(&lent), 1);
        }
    }
}

/// Bytes that tell when they are given back.
struct Watched {
    bytes: Vec<u8>,
    _lent: Arc<()>,
}

impl Deref for Watched {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for Watched {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

#[test]
fn what_two_threads_want_is_read_once() {
    READERS.into_iter().for_each(two_threads);
}

fn two_threads(reader: Reader) {
    let (_dir, container) = model();
    let store = store(&container, 600, IoMode::Auto, reader);
    let barrier = Barrier::new(2);
    let all: Vec<u16> = (0..EXPERTS).collect();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                barrier.wait();
                for layer in 0..12 {
                    fetch_all(&store, &container, layer, &all);
                }
            });
        }
    });
    let counters = store.counters();
    assert_eq!((counters.misses, counters.hits), (12 * 48, 12 * 48));
    let stride = container.manifest().experts[0].stride_bytes as u64;
    assert_eq!(counters.read_bytes, 12 * 48 * stride);
}

#[test]
fn a_guess_that_comes_true_is_not_read_again() {
    READERS.into_iter().for_each(guess_comes_true);
}

fn guess_comes_true(reader: Reader) {
    let (_dir, container) = model();
    let store = store(&container, 200, IoMode::Auto, reader);
    store.guess(LayerId(3), &[ExpertId(1), ExpertId(2), ExpertId(9)]);
    let started = Instant::now();
    while store.counters().read_bytes < 3 * 28_672 {
        assert!(started.elapsed() < Duration::from_secs(60), "idle readers read guesses");
        std::thread::yield_now();
    }
    fetch_all(&store, &container, 3, &[1, 2, 30]);
    assert_eq!(store.counters().misses, 1, "only the one that was not guessed");
    assert_eq!(store.counters().guessed.useful, 2);
}

#[test]
fn guesses_asked_for_or_withdrawn_at_any_moment_leave_records_right() {
    let (_dir, container) = model();
    for (io, reader) in ways() {
        let store = store(&container, 60, io, reader);
        for round in 0..40 {
            let guessed: Vec<ExpertId> = (0..12).map(|i| ExpertId((round * 5 + i) % 48)).collect();
            store.guess(LayerId(round % 12), &guessed);
            let asked: Vec<u16> = (0..6).map(|i| (round * 5 + 11 - i) % 48).collect();
            fetch_all(&store, &container, round % 12, &asked);
        }
        let counters = store.counters();
        assert_eq!(counters.hits + counters.misses, 40 * 6);
    }
}

#[test]
fn a_store_dropped_with_reads_in_flight_waits_for_them() {
    let (_dir, container) = model();
    for (io, reader) in ways() {
        for round in 0..20 {
            let store = store(&container, 100, io, reader);
            let all: Vec<ExpertId> = (0..EXPERTS).map(ExpertId).collect();
            drop(store.fetch(LayerId(round % 12), &all));
            store.preload(all.iter().map(|&e| (LayerId(round % 11 + 1), e, 1)));
        }
    }
}

#[test]
fn the_way_of_reading_is_chosen_and_the_reason_given() {
    let (_dir, container) = model();
    let choice = |slots, io, spare_bytes| {
        let options = StoreOptions { slots, readers: 4, reader: Reader::Threads, io, spare_bytes };
        ExpertStore::open(&container, options).expect("a store").choice().clone()
    };
    let asked = choice(1000, IoMode::Buffered, 1 << 40);
    assert_eq!((asked.direct, asked.why.as_str()), (false, "asked for"));
    let too_large = choice(100, IoMode::Auto, 1 << 20);
    if too_large.why.contains("no direct reads") {
        println!("SKIP: the scratch directory has no direct reads");
        return;
    }
    assert!(too_large.direct, "{}", too_large.why);
    assert!(too_large.why.contains("neither the pool nor the 1.0 MiB"), "{}", too_large.why);
    for (slots, spare) in [(100, 1 << 40), (1000, 0)] {
        let tried = choice(slots, IoMode::Auto, spare);
        let numbers: Vec<f64> = tried.why.split(' ').filter_map(|word| word.parse().ok()).collect();
        assert!(tried.why.starts_with("tried: ") && numbers.len() == 2, "{}", tried.why);
        assert!(numbers.iter().all(|&rate| rate >= 0.0), "{}", tried.why);
    }
}

#[test]
fn a_file_cut_off_under_a_store_is_named_and_the_rest_still_reads() {
    ways().for_each(|(io, reader)| file_cut_off(io, reader));
}

fn file_cut_off(io: IoMode, reader: Reader) {
    let (dir, container) = model();
    let store = store(&container, 100, io, reader);
    cut(&dir.path().join("experts/layer_05.bin"), 20 * 28_672 + 100);
    let mut fetch = store.fetch(LayerId(5), &[ExpertId(20)]);
    let error = fetch.ready(&mut Landed::new()).expect_err("the record is cut off");
    drop(fetch);
    let text = error.to_string();
    let Error::Record { layer, expert, offset, .. } = error else { panic!("{text}") };
    assert_eq!((layer, expert, offset), (LayerId(5), ExpertId(20), 20 * 28_672));
    assert!(text.contains("layer_05.bin") && text.contains("truncated"), "{text}");
    fetch_all(&store, &container, 4, &[20]);
    let again = store.fetch(LayerId(5), &[ExpertId(20)]).ready(&mut Landed::new());
    assert!(again.is_err(), "a failure is not remembered as a record");
}

fn cut(path: &Path, bytes: u64) {
    let file = OpenOptions::new().write(true).open(path).expect("a layer file");
    file.set_len(bytes).expect("a shorter file");
}

fn options() -> Options {
    Options {
        threads: 2,
        arithmetic: Arithmetic::Exact,
        memory_bytes: Some(512 << 20),
        context: Some(64),
        io: IoMode::Buffered,
        prefill_chunk: 16,
        readers: 2,
        ..Options::default()
    }
}

#[test]
fn a_session_that_met_a_failed_read_refuses_to_go_on_until_it_is_restored() {
    let (dir, container) = model();
    let engine = Arc::new(Engine::open(container, &options()).expect("the built-in model"));
    let layer = dir.path().join("experts/layer_07.bin");
    let whole = fs::read(&layer).expect("a layer file");
    let mut session = Session::new(&engine);
    session.step(TokenId(5)).expect("a whole file");
    let checkpoint = session.checkpoint().expect("no error before");
    cut(&layer, 0);
    let tokens: Vec<TokenId> = (10..20).map(TokenId).collect();
    let error = session.prefill(&tokens, &mut |_| ControlFlow::Continue(())).expect_err("no file");
    assert!(error.to_string().starts_with("layer 7 expert "), "{error}");
    let refused = session.step(TokenId(1)).expect_err("half a token is in the caches");
    assert!(refused.to_string().contains("start a new one"), "{refused}");
    assert!(session.checkpoint().is_err(), "half a token is not kept");
    fs::write(&layer, whole).expect("the file is whole again");
    session.restore(&checkpoint).expect("the same engine");
    assert_eq!(session.position(), 1);
    session.step(TokenId(1)).expect("a restored session works");
}

#[test]
fn every_lookahead_and_reader_gives_the_same_logits() {
    let logits = |lookahead, reader| {
        let (_dir, container) = model();
        let plan = Budget::plan(&container, &options()).expect("a plan");
        let memory_bytes = Some(plan.smallest());
        let options = Options { lookahead, reader, memory_bytes, io: IoMode::Auto, ..options() };
        let at_the_floor = Engine::open(container, &options).expect("it opens at the floor");
        let mut session = Session::new(&Arc::new(at_the_floor));
        let mut all = Vec::new();
        for token in 0..30 {
            session.step(TokenId(token * 91 % 4000)).expect("a step");
            all.extend(session.logits().iter().map(|l| l.to_bits()));
        }
        all
    };
    let off = logits(Lookahead::Off, Reader::Threads);
    for reader in READERS {
        assert_eq!(logits(Lookahead::Router, reader), off);
        assert_eq!(logits(Lookahead::Previous, reader), off);
    }
    assert_eq!(logits(Lookahead::Off, Reader::Uring), off);
}

/// Waits until so many records of a hot set are in the pool.
fn wait_for_preloads(store: &ExpertStore, reads: u64) {
    let started = Instant::now();
    while store.counters().preloaded.reads < reads {
        assert!(started.elapsed() < Duration::from_secs(60), "idle readers read the hot set");
        std::thread::yield_now();
    }
}

/// The bytes that were demanded are those of the misses; what was read ahead is counted apart.
fn assert_demanded_is_missed(store: &ExpertStore) {
    let counters = store.counters();
    assert_eq!(counters.demanded_bytes(), counters.misses * 28_672, "{counters:?}");
    for ahead in [counters.guessed, counters.preloaded] {
        assert_eq!(ahead.read_bytes, ahead.reads * 28_672, "{counters:?}");
        assert_eq!(ahead.useful_bytes, ahead.useful * 28_672, "{counters:?}");
    }
}

#[test]
fn a_hot_set_fills_the_empty_slots_in_its_order_and_no_others() {
    let (_dir, container) = model();
    let store = store(&container, 10, IoMode::Auto, Reader::Threads);
    fetch_all(&store, &container, 2, &[0, 1, 2, 3]);
    // What this model does not have, and what is in the pool already, takes no slot.
    let foreign = [(LayerId(99), ExpertId(0), 9), (LayerId(0), ExpertId(48), 9)];
    let present = [(LayerId(2), ExpertId(3), 9)];
    let wanted = (0..20).map(|e| (LayerId(5), ExpertId(e), 8));
    store.preload(foreign.into_iter().chain(present).chain(wanted));
    wait_for_preloads(&store, 5);
    fetch_all(&store, &container, 5, &[0, 1, 2, 3, 4]);
    fetch_all(&store, &container, 2, &[0, 1, 2, 3]);
    let counters = store.counters();
    assert_eq!((counters.misses, counters.preloaded.useful), (4, 5), "{counters:?}");
    assert_demanded_is_missed(&store);
    let hot = store.hot_set();
    assert_eq!(hot[0], (LayerId(2), ExpertId(3), 9 / 2 + 2), "half of the saved uses count on");
    assert!(hot.contains(&(LayerId(5), ExpertId(0), 5)), "{hot:?}");
}

#[test]
fn a_hot_set_brings_more_hits_and_the_same_logits() {
    let run = |hot: &[(LayerId, ExpertId, u32)]| {
        let (_dir, container) = model();
        let plan = Budget::plan(&container, &options()).expect("a plan");
        // The working set of one token three times over: a quarter of the records.
        let room = 2 * plan.slots_floor as u64 * plan.slot_bytes;
        let options = Options { memory_bytes: Some(plan.smallest() + room), ..options() };
        let engine = Arc::new(Engine::open(container, &options).expect("it opens"));
        engine.store().preload(hot.iter().copied());
        let (slots, _) = engine.store().occupancy();
        wait_for_preloads(engine.store(), hot.len().min(slots) as u64);
        let mut session = Session::new(&engine);
        let mut logits = Vec::new();
        for token in 0..30 {
            session.step(TokenId(token * 91 % 4000)).expect("a step");
            logits.extend(session.logits().iter().map(|l| l.to_bits()));
        }
        assert_demanded_is_missed(engine.store());
        (engine.store().counters(), engine.store().hot_set(), logits)
    };
    let (cold, hot, expected) = run(&[]);
    let (warm, _, logits) = run(&hot);
    assert_eq!(logits, expected);
    assert_eq!(warm.hits + warm.misses, cold.hits + cold.misses);
    assert!(warm.hits > cold.hits + 10, "{warm:?} after {cold:?}");
    assert!(warm.preloaded.useful > 20 && cold.preloaded.reads == 0, "{warm:?} after {cold:?}");
}

#[test]
fn every_byte_is_demanded_or_guessed() {
    for lookahead in [Lookahead::Off, Lookahead::Router, Lookahead::Previous] {
        let (_dir, container) = model();
        let plan = Budget::plan(&container, &options()).expect("a plan");
        let options = Options { lookahead, memory_bytes: Some(plan.smallest()), ..options() };
        let engine = Arc::new(Engine::open(container, &options).expect("it opens"));
        let mut session = Session::new(&engine);
        for token in 0..20 {
            session.step(TokenId(token * 91 % 4000)).expect("a step");
        }
        assert_demanded_is_missed(engine.store());
        let counters = engine.store().counters();
        assert_eq!(counters.guessed.reads > 0, lookahead != Lookahead::Off, "{counters:?}");
    }
}
