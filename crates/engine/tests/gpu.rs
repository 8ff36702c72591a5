//! The GPU's blocks against the CPU's, on the built-in model, on every adapter of the machine.
//!
//! Without an adapter these tests print SKIP; where `FLASH_MOE_GPU_TESTS` is set, as in CI, they fail
//! instead. Mesa's lavapipe is an adapter like any other.
#![cfg(feature = "gpu")]

use std::env;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use flash_moe_engine::Arithmetic;
use flash_moe_engine::budget::Budget;
use flash_moe_engine::container::{Container, Precision, ScaleKind};
use flash_moe_engine::engine::{Engine, Options};
use flash_moe_engine::gpu::{AdapterKind, ChunkOf, GpuOptions, Misses, adapters, chunk_rates};
use flash_moe_engine::kv_cache::KvFormat;
use flash_moe_engine::session::Session;
use flash_moe_engine::shape::{ExpertId, LayerId, TokenId};
use flash_moe_engine::store::{ExpertStore, IoMode};
use flash_moe_engine::trace::{Trace, Values};

/// Largest difference of any value from the CPU's in f32; the logits' spread is 3.
const BOUND: f32 = 1e-3;
/// Over the end of a page of keys and values.
const PROMPT: usize = 66;

/// Numbers of the adapters to test on.
fn all_adapters() -> Vec<usize> {
    let count = adapters().len();
    if count == 0 {
        assert!(env::var_os("FLASH_MOE_GPU_TESTS").is_none(), "a GPU test needs an adapter");
        println!("SKIP: no adapter");
    }
    (0..count).collect()
}

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny")
}

fn options(gpu: Option<GpuOptions>) -> Options {
    Options {
        threads: 2,
        arithmetic: Arithmetic::Exact,
        memory_bytes: Some(512 << 20),
        context: Some(256),
        io: IoMode::Buffered,
        prefill_chunk: 40,
        readers: 2,
        gpu,
        ..Options::default()
    }
}

fn open(options: &Options) -> Arc<Engine> {
    open_at(&tiny(), options)
}

fn open_at(dir: &Path, options: &Options) -> Arc<Engine> {
    let container = Container::open(dir).expect("the built-in model");
    Arc::new(Engine::open(container, options).unwrap_or_else(|e| panic!("{e}")))
}

fn on(adapter: usize) -> Option<GpuOptions> {
    Some(GpuOptions {
        adapter: Some(adapter),
        memory_bytes: Some(600 << 20),
        misses: Misses::Upload,
        ..GpuOptions::default()
    })
}

/// Options of both ways in which an adapter can take a prompt's products; of one where it has no tensor
/// cores.
fn both_ways(adapter: usize) -> Vec<Option<GpuOptions>> {
    let plain = on(adapter).map(|gpu| GpuOptions { plain: true, ..gpu });
    match adapters()[adapter].features.contains(&"tensor products") {
        true => vec![plain, on(adapter)],
        false => {
            println!("SKIP: adapter {adapter} has no tensor cores, products in f32 alone");
            vec![plain]
        }
    }
}

/// A copy of the built-in model whose last layer of experts can come up short for a while.
struct Breakable {
    file: PathBuf,
    bytes: Vec<u8>,
}

fn breakable(to: &Path) -> Breakable {
    let mut last = None;
    for entry in walk(&tiny()) {
        let name = entry.strip_prefix(tiny()).expect("inside");
        let copy = to.join(name);
        std::fs::create_dir_all(copy.parent().expect("a parent")).expect("a directory");
        std::fs::copy(&entry, &copy).expect("a copy");
        if name.starts_with("experts") {
            last = last.max(Some(copy));
        }
    }
    let file = last.expect("a layer of experts");
    Breakable { bytes: std::fs::read(&file).expect("the layer"), file }
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).expect("a directory").map(|e| e.expect("an entry").path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

impl Breakable {
    fn cut(&self) {
        std::fs::OpenOptions::new()
            .write(true)
            .open(&self.file)
            .expect("it")
            .set_len(10)
            .expect("cut");
    }

    fn mend(&self) {
        std::fs::write(&self.file, &self.bytes).expect("the layer");
    }
}

fn token(i: usize) -> TokenId {
    TokenId((i * 91 % 4000) as u32)
}

fn prefill(session: &mut Session, tokens: std::ops::Range<usize>) {
    let tokens: Vec<TokenId> = tokens.map(token).collect();
    session.prefill(&tokens, &mut |_| ControlFlow::Continue(())).unwrap_or_else(|e| panic!("{e}"));
}

/// Everything that a prompt and six more tokens compute, and the states after each.
fn traced(options: &Options) -> Trace {
    let mut session = Session::new(&open(options));
    session.record();
    prefill(&mut session, 0..PROMPT);
    session.mark("prefill").expect("the states");
    for i in PROMPT..PROMPT + 6 {
        session.step(token(i)).unwrap_or_else(|e| panic!("{e}"));
    }
    session.mark("decode").expect("the states");
    session.take_trace()
}

/// Logits after a prompt and after each of so many tokens.
fn logits(engine: &Arc<Engine>, steps: usize) -> Vec<f32> {
    let mut session = Session::new(engine);
    prefill(&mut session, 0..PROMPT);
    let mut all = session.logits().to_vec();
    for i in PROMPT..PROMPT + steps {
        session.step(token(i)).unwrap_or_else(|e| panic!("{e}"));
        all.extend(session.logits());
    }
    all
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let differences = a.iter().zip(b).filter(|(a, b)| a != b).map(|(a, b)| (a - b).abs());
    // Once it is no number it stays none.
    differences.fold(0.0, |worst: f32, d| if worst.is_nan() || d <= worst { worst } else { d })
}

fn close(ours: &Trace, theirs: &Trace, bound: f32) {
    assert_eq!(ours.arrays.keys().collect::<Vec<_>>(), theirs.arrays.keys().collect::<Vec<_>>());
    for (name, array) in &ours.arrays {
        let other = &theirs.arrays[name];
        assert_eq!(array.shape, other.shape, "{name}");
        match (&array.values, &other.values) {
            (Values::F32(a), Values::F32(b)) => {
                let worst = worst(a, b);
                assert!(worst <= bound, "{name}: differs by {worst}");
            }
            (a, b) => assert!(a == b, "{name}: other experts"),
        }
    }
}

#[test]
fn every_block_computes_what_the_cpu_computes() {
    let theirs = traced(&options(None));
    for gpu in all_adapters().into_iter().flat_map(both_ways) {
        close(&traced(&options(gpu)), &theirs, BOUND);
    }
}

#[test]
fn tensor_cores_change_a_prompt_by_roundings_alone() {
    for adapter in all_adapters() {
        let [plain, split] = &both_ways(adapter)[..] else { continue };
        let [plain, split] = [plain, split].map(|gpu| logits(&open(&options(gpu.clone())), 0));
        let apart = worst(&split, &plain);
        println!("adapter {adapter}: logits of both ways are {apart} apart");
        // Other bits, or they were not used.
        assert!(apart > 0.0 && apart <= BOUND, "they are {apart} apart");
    }
}

/// Logits of a short message behind so many tokens, and of the greedy tokens after it, with these tokens.
fn message_behind(engine: &Arc<Engine>, context: usize) -> (Vec<f32>, Vec<usize>) {
    let mut session = Session::new(engine);
    prefill(&mut session, 0..context);
    prefill(&mut session, context..context + 5);
    let (mut all, mut greedy) = (session.logits().to_vec(), Vec::new());
    for _ in 0..6 {
        let logits = session.logits();
        let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
        greedy.push(best.expect("logits"));
        let next = TokenId(greedy[greedy.len() - 1] as u32);
        session.step(next).unwrap_or_else(|e| panic!("{e}"));
        all.extend(session.logits());
    }
    (all, greedy)
}

#[test]
fn a_short_message_behind_a_long_context_is_answered_as_by_the_cpu() {
    // Parts of 512 positions and more: the message attends to three.
    let long = |gpu| Options { context: Some(1700), prefill_chunk: 400, ..options(gpu) };
    let (theirs, greedy) = message_behind(&open(&long(None)), 1600);
    for adapter in all_adapters() {
        let (ours, tokens) = message_behind(&open(&long(on(adapter))), 1600);
        let apart = worst(&ours, &theirs);
        assert!(apart <= BOUND, "it differs by {apart}");
        assert_eq!(tokens, greedy);
    }
}

#[test]
fn keys_and_values_in_halves_are_those_of_the_cpu() {
    let halves = |gpu| Options { kv_cache: KvFormat::F16, ..options(gpu) };
    let theirs = traced(&halves(None));
    for adapter in all_adapters() {
        // Where a value lies between two halves either may be kept: a step is 2^-10 of it.
        close(&traced(&halves(on(adapter))), &theirs, 1e-2);
    }
}

/// The same with so many slots in each layer, missing experts as they are said to be had.
fn with_misses(whole: &Engine, slots: usize, misses: Misses) -> Options {
    let mut options = with_slots(whole, slots);
    options.gpu.as_mut().expect("a GPU").misses = misses;
    options
}

/// The same with so many slots in each layer.
fn with_slots(whole: &Engine, slots: usize) -> Options {
    let plan = whole.gpu().expect("a GPU").budget();
    let mut options = whole.options().clone();
    let bytes = plan.fixed_bytes() + slots as u64 * plan.slot_bytes;
    options.gpu.as_mut().expect("a GPU").memory_bytes = Some(bytes);
    options
}

/// Whether records are read where the device reads them, as they are where both have one memory and most of
/// it is the device's. Buffered reads go to any memory.
fn in_place(engine: &Engine) -> bool {
    let budget = engine.gpu().expect("a GPU").budget();
    let slots = budget.slots_each * engine.shape().layers.len();
    budget.direct && budget.is_shared && engine.store().slots() <= slots
}

/// The same with a pool of one token's experts.
fn with_least(whole: &Engine, options: Options) -> Options {
    Options { memory_bytes: Some(whole.budget().smallest()), ..options }
}

/// The same with records that take memory for uploads on their way, or not where they need not.
fn by_way(options: Options, staged: bool) -> Options {
    Options { gpu: options.gpu.map(|gpu| GpuOptions { staged, ..gpu }), ..options }
}

#[test]
fn experts_that_stream_give_the_bits_of_experts_that_stay() {
    for adapter in all_adapters() {
        let whole = open(&options(on(adapter)));
        let gpu = whole.gpu().expect("a GPU");
        assert!(gpu.budget().resident);
        let counters = gpu.counters();
        assert_eq!(counters.read_in_place, counters.uploads * u64::from(in_place(&whole)));
        let expected = logits(&whole, 20);
        let (top_k, experts) = (whole.top_k(), whole.shape().moe.experts);
        let directly = adapters()[adapter].features.contains(&"direct uploads");
        for slots in [top_k, top_k + 1, experts / 2, experts - 1] {
            let small = with_slots(&whole, slots);
            let ways = [true, false].map(|staged| (staged, by_way(small.clone(), staged)));
            for (staged, way) in ways.into_iter().chain([(false, with_least(&whole, small))]) {
                let streamed = open(&way);
                let gpu = streamed.gpu().expect("a GPU");
                assert_eq!(gpu.budget().slots_each, slots);
                assert_eq!(gpu.budget().direct, directly && !staged);
                let own = logits(&streamed, 20);
                assert!(own == expected, "other bits with {slots} slots, staged: {staged}");
                let counters = gpu.counters();
                assert!(counters.uploads > experts as u64);
                let in_place = u64::from(in_place(&streamed));
                assert_eq!(counters.read_in_place, counters.uploads * in_place);
            }
        }
    }
}

#[test]
fn the_processor_computes_what_video_memory_misses() {
    for adapter in all_adapters() {
        let whole = open(&options(on(adapter)));
        let expected = logits(&whole, 20);
        let (top_k, experts) = (whole.top_k(), whole.shape().moe.experts);
        for (slots, staged) in [(top_k, true), (top_k, false), (experts / 2, false)] {
            let engine = open(&by_way(with_misses(&whole, slots, Misses::Cpu), staged));
            let gpu = engine.gpu().expect("a GPU");
            let own = logits(&engine, 20);
            let apart = worst(&own, &expected);
            assert!(apart <= BOUND, "it differs by {apart}");
            let counters = gpu.counters();
            assert!(counters.computed > 20, "{counters:?}");
            // A prompt is the device's own; what is admitted was chosen twice.
            assert!(counters.admitted > 0 && counters.admitted < counters.computed, "{counters:?}");
            // What has a slot behind a prompt depends on how it got there.
            let again = open(&by_way(with_misses(&whole, slots, Misses::Cpu), staged));
            assert!(logits(&again, 20) == own, "other bits in another run");
        }
    }
}

#[test]
fn what_is_chosen_again_moves_to_video_memory() {
    for adapter in all_adapters() {
        let whole = open(&options(on(adapter)));
        let engine = open(&with_misses(&whole, whole.shape().moe.experts / 2, Misses::Cpu));
        let gpu = engine.gpu().expect("a GPU");
        let mut session = Session::new(&engine);
        prefill(&mut session, 0..PROMPT);
        let mut computed = |steps: usize| {
            let before = gpu.counters().computed;
            (0..steps).for_each(|_| session.step(token(7)).unwrap_or_else(|e| panic!("{e}")));
            gpu.counters().computed - before
        };
        let (first, last) = (computed(10), [computed(10), computed(10), computed(10)][2]);
        assert!(last * 2 < first, "{last} after {first}");
    }
}

#[test]
fn who_computes_what_is_missing_is_measured_once() {
    for adapter in all_adapters() {
        let whole = open(&options(on(adapter)));
        let expected = logits(&whole, 6);
        for staged in [true, false] {
            let auto = with_misses(&whole, whole.top_k(), Misses::Auto);
            let engine = open(&by_way(auto.clone(), staged));
            let gpu = engine.gpu().expect("a GPU");
            let plan = gpu.misses();
            let rates = plan.rates.expect("measured");
            assert_eq!(rates.upload.is_none(), gpu.budget().direct);
            let all = [Some(rates.stage), rates.upload, Some(rates.compute)];
            assert!(all.iter().flatten().all(|r| *r > 0.0 && r.is_finite()));
            assert_eq!(plan.computed_eighths, rates.computed_eighths());
            assert!(worst(&logits(&engine, 6), &expected) <= BOUND);
            assert_eq!(gpu.misses(), plan);
            assert_eq!(gpu.counters().computed > 0, plan.computed_eighths > 0);
            let engine = open(&with_least(&whole, by_way(auto, staged)));
            let plan = engine.gpu().expect("a GPU").misses();
            // What is read to where the device reads it is the device's.
            assert_eq!(plan.rates.is_none(), in_place(&engine));
            assert!(plan.rates.is_some() || plan.computed_eighths == 0);
        }
    }
}

#[test]
fn a_token_asks_the_driver_for_no_buffer() {
    for adapter in all_adapters() {
        let whole = open(&options(on(adapter)));
        let streamed = open(&with_slots(&whole, whole.top_k()));
        let shared = open(&with_misses(&whole, whole.top_k(), Misses::Cpu));
        for engine in [whole, streamed, shared] {
            let gpu = engine.gpu().expect("a GPU");
            let mut session = Session::new(&engine);
            prefill(&mut session, 0..PROMPT);
            let before = gpu.counters();
            for i in PROMPT..PROMPT + 6 {
                session.step(token(i)).unwrap_or_else(|e| panic!("{e}"));
            }
            let token = gpu.counters().since(&before);
            assert_eq!(token.buffers, 0);
            assert_eq!(token.uploads + token.computed > 0, !gpu.budget().resident);
        }
    }
}

/// Holds every slot of the store, with experts of all layers but the first.
fn hold(store: &ExpertStore, engine: &Engine) -> Vec<impl Sized> {
    let mut held = Vec::new();
    let mut left = store.slots();
    for layer in (1..engine.shape().layers.len()).map(|i| LayerId(i as u16)) {
        let count = left.min(engine.shape().moe.experts).min(16);
        let ids: Vec<ExpertId> = (0..count).map(|i| ExpertId(i as u16)).collect();
        let mut fetch = store.fetch(layer, &ids);
        while let Some(record) = fetch.next_in_order().expect("a read") {
            held.push(record);
        }
        left -= count;
    }
    assert_eq!(left, 0);
    held
}

#[test]
fn what_is_here_is_handed_over_before_what_is_missing_is_waited_for() {
    for adapter in all_adapters() {
        let whole = open(&options(on(adapter)));
        // Records that go through the store's slots, which are all held.
        let small = by_way(with_slots(&whole, whole.top_k()), true);
        let engine = open(&with_least(&whole, small));
        let gpu = engine.gpu().expect("a GPU");
        let expected = logits(&whole, 1);
        let mut session = Session::new(&engine);
        prefill(&mut session, 0..PROMPT);
        let held = hold(engine.store(), &engine);
        let before = gpu.counters().submissions;
        let stepping = std::thread::spawn(move || {
            session.step(token(PROMPT)).unwrap_or_else(|e| panic!("{e}"));
            session.logits().to_vec()
        });
        // The first layer up to its choice, and the half of it whose experts are here. No read can
        // end, so nothing else follows.
        let started = Instant::now();
        while gpu.counters().submissions < before + 2 {
            assert!(started.elapsed() < Duration::from_secs(60), "only the choice was handed over");
            std::thread::yield_now();
        }
        assert_eq!(gpu.counters().submissions, before + 2);
        drop(held);
        let logits = stepping.join().expect("a token");
        assert!(logits == expected[expected.len() - logits.len()..], "other bits");
    }
}

#[test]
fn a_failed_read_harms_no_token_after_it() {
    for adapter in all_adapters() {
        let whole = open(&options(on(adapter)));
        let copy = tempfile::tempdir().expect("a directory");
        let layer = breakable(copy.path());
        // What is read in place fails as what is read to the pool does.
        let engine = open_at(copy.path(), &with_least(&whole, with_slots(&whole, whole.top_k())));
        let mut session = Session::new(&engine);
        prefill(&mut session, 0..PROMPT);
        let kept = session.checkpoint().expect("a whole session");
        engine.store().forget();
        layer.cut();
        let error = session.step(token(PROMPT)).expect_err("a failed read").to_string();
        assert!(error.contains("layer") && error.contains("expert"), "{error}");
        layer.mend();
        session.restore(&kept).expect("the same engine");
        let expected = logits(&whole, 1);
        session.step(token(PROMPT)).unwrap_or_else(|e| panic!("{e}"));
        let own = session.logits();
        assert!(*own == expected[expected.len() - own.len()..], "other bits");
    }
}

#[test]
fn a_checkpoint_goes_on_bit_for_bit_and_crosses_to_the_cpu() {
    for adapter in all_adapters() {
        let engine = open(&options(on(adapter)));
        let mut session = Session::new(&engine);
        prefill(&mut session, 0..PROMPT);
        let kept = session.checkpoint().expect("a whole session");
        let steps = |session: &mut Session| {
            let step = |i| {
                session.step(token(i)).unwrap_or_else(|e| panic!("{e}"));
                session.logits().to_vec()
            };
            (PROMPT..PROMPT + 5).flat_map(step).collect::<Vec<f32>>()
        };
        let first = steps(&mut session);
        session.restore(&kept).expect("the same engine");
        assert!(steps(&mut session) == first, "the same session");
        let mut other = Session::new(&engine);
        other.restore(&kept).expect("the same engine");
        assert!(steps(&mut other) == first, "another session");
        let cpu = open(&options(None));
        let mut crossed = Session::new(&cpu);
        crossed.restore(&kept).expect("a state of f32 activations");
        let apart = worst(&steps(&mut crossed), &first);
        assert!(apart <= BOUND, "on the CPU it differs by {apart}");
        let back = crossed.checkpoint().expect("a whole session");
        session.restore(&back).expect("a state of f32 activations");
    }
}

#[test]
fn kernels_by_themselves_touch_no_session() {
    for adapter in all_adapters() {
        let engine = open(&options(on(adapter)));
        let gpu = engine.gpu().expect("a GPU");
        let mut session = Session::new(&engine);
        prefill(&mut session, 0..PROMPT);
        let kernels = gpu.kernels_alone(PROMPT, Duration::ZERO).unwrap_or_else(|e| panic!("{e}"));
        session.step(token(PROMPT)).unwrap_or_else(|e| panic!("{e}"));
        let untouched = logits(&open(&options(on(adapter))), 1);
        let own = session.logits();
        assert!(*own == untouched[untouched.len() - own.len()..], "other bits");
        let dispatches: Vec<_> = kernels.iter().map(|k| (k.name, k.dispatches)).collect();
        let expected = [
            ("attention in", 3),
            ("turn", 3),
            ("attend", 3),
            ("combine", 3),
            ("attention out", 3),
            ("delta in", 9),
            ("delta rule", 9),
            ("delta out", 9),
            ("route", 12),
            ("experts up", 12),
            ("experts down", 12),
            ("logits", 1),
        ];
        assert_eq!(dispatches, expected);
        assert!(kernels.iter().all(|k| k.seconds > 0.0));
        let weightless = |name| ["turn", "combine"].contains(&name);
        assert!(kernels.iter().all(|k| (k.bytes > 0) != weightless(k.name)), "{kernels:?}");
    }
}

#[test]
fn memory_that_both_have_is_shared_out_once() {
    for adapter in all_adapters() {
        if adapters()[adapter].kind == AdapterKind::Discrete {
            println!("SKIP: adapter {adapter} has memory of its own");
            continue;
        }
        let limit = 512 << 20;
        let gpu = on(adapter).map(|gpu| GpuOptions { memory_bytes: None, ..gpu });
        let engine = open(&Options { memory_bytes: Some(limit), ..options(gpu) });
        let (budget, video) = (engine.budget(), engine.gpu().expect("a GPU").budget());
        let moved = ["dense weights", "KV cache", "delta-net states"];
        let stays = budget.fixed.iter().filter(|line| !moved.contains(&line.name));
        let stays = stays.map(|line| line.bytes).sum::<u64>();
        let pool = budget.slots as u64 * budget.slot_bytes;
        assert_eq!(budget.slots, budget.slots_floor);
        let both = stays + pool + video.limit;
        assert!(both <= limit && both > limit - limit / 20, "{both} of {limit}");
        let apart = open(&options(on(adapter)));
        assert!(logits(&engine, 6) == logits(&apart, 6));
        // A chunk's buffers are the device's.
        let scratch = |gpu: Option<GpuOptions>| {
            let container = Container::open(&tiny()).expect("the built-in model");
            let many = Options { prefill_chunk: 256, ..options(gpu) };
            let plan = Budget::plan(&container, &many).expect("a plan");
            plan.fixed.iter().find(|line| line.name == "scratch and logits").expect("it").bytes
        };
        assert!(scratch(on(adapter)) * 2 < scratch(None));
    }
}

#[test]
fn what_is_timed_of_a_chunk_is_checked_in_every_format() {
    let container = Container::open(&tiny()).expect("the built-in model");
    let (shape, records) = (container.shape(), container.layouts());
    let formats = [
        (Precision::Affine { bits: 4, group: 64, scales: ScaleKind::Bf16 }, KvFormat::F32),
        (Precision::Affine { bits: 8, group: 32, scales: ScaleKind::F16 }, KvFormat::F16),
        (Precision::Bf16, KvFormat::F32),
    ];
    for gpu in all_adapters().into_iter().flat_map(both_ways) {
        for (dense, kv_cache) in formats {
            let options = Options { kv_cache, ..options(gpu.clone()) };
            let of = ChunkOf { shape, records, dense, options: &options };
            let wanted = options.gpu.as_ref().expect("a GPU");
            let rates = chunk_rates(&of, wanted, Duration::ZERO).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!((rates.tokens, rates.tensor_cores), (40, !wanted.plain));
            let all = [rates.dense, rates.experts, rates.attention];
            assert!(all.iter().all(|rate| *rate > 0.0 && rate.is_finite()), "{rates:?}");
        }
    }
}

#[test]
fn what_the_device_cannot_do_is_refused_with_what_can() {
    let refusal = |options: &Options| {
        let container = Container::open(&tiny()).expect("the built-in model");
        Engine::open(container, options).err().expect("a refusal").to_string()
    };
    for adapter in all_adapters() {
        let said = refusal(&Options { kv_cache: KvFormat::Bf16, ..options(on(adapter)) });
        assert!(said.contains("f32 or f16"), "{said}");
        let said = refusal(&Options { arithmetic: Arithmetic::Fast8, ..options(on(adapter)) });
        assert!(said.contains("int8"), "{said}");
        let with = |bytes| on(adapter).map(|gpu| GpuOptions { memory_bytes: Some(bytes), ..gpu });
        let said = refusal(&options(with(64 << 20)));
        assert!(said.contains("--gpu-memory ") && said.contains("dense weights"), "{said}");
        let said = refusal(&options(on(99)));
        assert!(said.contains("flash-moe devices"), "{said}");
    }
}
