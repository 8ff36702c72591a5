//! Switches that only move bytes in time leave the logits bit-identical.
//!
//! Cache size down to the floor, direct or buffered reads, who reads, how many at once and number of
//! threads: the traces of all of them are equal bit for bit. The size of a prefill chunk changes
//! sums' order, so there only a bound holds, and it is stated here.

use crate::fixture::converted;
use crate::program::{Home, TraceFile, id_list, text};

/// Largest difference of a logit between prefill chunk sizes on the tiny models: in f32, and in fixed
/// point, where a sum in another order may round an activation to the next integer.
const CHUNK_BOUNDS: [(&[&str], f32); 2] = [(&["--exact"], 1e-4), (&[], 5e-3)];
/// Choices of experts, in a hundred, that fixed point may turn: random routers have near ties.
const TURNED_PERCENT: usize = 1;

fn logits(home: &Home, extra: &[&str]) -> (u64, Vec<f32>) {
    let (misses, trace) = traced(home, extra);
    let mut all = trace.floats("prefill.logits").1;
    all.extend(trace.floats("decode.logits").1);
    (misses, all)
}

fn traced(home: &Home, extra: &[&str]) -> (u64, TraceFile) {
    let ids: Vec<u32> = (0..90).map(|i| i * 37 % 470).collect();
    let prompt = home.write("prompt.ids", id_list(&ids));
    let (model, trace) = (text(&home.path("container")), home.path("t.safetensors"));
    let trace_path = text(&trace);
    let mut args = vec!["--model", &model, "--prompt-tokens", &prompt, "--greedy", "--ignore-eos"];
    args.extend_from_slice(&["--max-tokens", "12", "--context", "256", "--trace", &trace_path]);
    args.extend_from_slice(extra);
    let summary = home.json(&args);
    let misses = summary["counters"]["misses"].as_u64().expect("misses");
    (misses, TraceFile::open(&trace))
}

#[test]
fn cache_size_reader_and_threads_change_no_bit() {
    let home = converted();
    let (few_misses, reference) = logits(&home, &["--memory", "2GiB"]);
    // In bytes: the refusal of a smaller limit names whole MiB, in which many of these records fit.
    let model = text(&home.path("container"));
    let plan =
        home.succeed(&["plan", "-m", &model, "--context", "256", "--quick", "--json"]).stdout;
    let plan: serde_json::Value = serde_json::from_slice(&plan).expect("one JSON object");
    let floor = plan["memory"]["smallest_bytes"].as_u64().expect("bytes");
    // More threads and readers need buffers of their own.
    let (least, near) = (floor.to_string(), (floor + (1 << 20)).to_string());
    let (many_misses, at_floor) = logits(&home, &["--memory", &least]);
    assert!(many_misses > 2 * few_misses, "{many_misses} misses at the floor, {few_misses} above");
    assert_eq!(bits(&at_floor), bits(&reference), "pool at the floor");
    for extra in [
        ["--io", "buffered"],
        ["--io", "auto"],
        ["--readers", "1"],
        ["--readers", "9"],
        ["--reader", "threads"],
        ["--reader", "uring"],
        ["--threads", "1"],
        ["--threads", "3"],
    ] {
        let mut args = vec!["--memory", &near];
        args.extend_from_slice(&extra);
        assert_eq!(bits(&logits(&home, &args).1), bits(&reference), "{extra:?}");
    }
}

#[test]
fn in_every_kv_cache_threads_readers_and_cache_size_change_no_bit() {
    let home = converted();
    let mut plain = logits(&home, &["--memory", "2GiB"]).1;
    for format in ["f16", "bf16", "int8", "tq4", "k3v2", "tq2"] {
        let mut kept = vec!["--kv-cache", format];
        if format.contains(['q', 'v']) {
            kept.extend_from_slice(&["--kv-sink", "0", "--kv-recent", "0"]);
        }
        let run = |extra: &[&str]| logits(&home, &[&kept[..], extra].concat()).1;
        let reference = run(&["--memory", "2GiB", "--threads", "1"]);
        assert_ne!(bits(&reference), bits(&plain), "{format} does something");
        for extra in [["--threads", "3"], ["--memory", "80MiB"], ["--readers", "1"]] {
            assert_eq!(bits(&run(&extra)), bits(&reference), "{format} {extra:?}");
        }
        plain = reference;
    }
}

#[test]
fn prefill_chunks_change_logits_within_the_bound() {
    let home = converted();
    for (numbers, bound) in CHUNK_BOUNDS {
        let (_, reference) = traced(&home, numbers);
        for chunk in ["1", "7", "33", "64", "1000"] {
            let (_, other) = traced(&home, &[&["--prefill-chunk", chunk], numbers].concat());
            let turned = turned_choices(&reference, &other);
            let (shape, values) = reference.floats("prefill.logits");
            let (_, others) = other.floats("prefill.logits");
            // From the first token with other experts on, the two have read different things.
            let same = turned.iter().copied().min().unwrap_or(shape[0]) * shape[1];
            let apart = values[..same].iter().zip(&others).map(|(a, b)| (a - b).abs());
            let worst = apart.fold(0.0, f32::max);
            println!("{numbers:?}, chunks of {chunk}: {worst:.1e}, {turned:?} turned");
            assert!(worst <= bound, "{numbers:?}, chunks of {chunk}: {worst}");
            let choices = reference.ids("prefill.router_indices").1.len();
            let most = if numbers.is_empty() { choices * TURNED_PERCENT / 100 } else { 0 };
            assert!(turned.len() <= most, "{numbers:?}, chunks of {chunk}: {turned:?}");
        }
    }
}

/// The token of every choice of experts that differs.
fn turned_choices(a: &TraceFile, b: &TraceFile) -> Vec<usize> {
    let (shape, a) = a.ids("prefill.router_indices");
    let (_, b) = b.ids("prefill.router_indices");
    let (tokens, top_k) = (shape[1], shape[2]);
    let sorted = |ids: &[u32]| {
        let mut ids = ids.to_vec();
        ids.sort_unstable();
        ids
    };
    let choices = a.chunks(top_k).zip(b.chunks(top_k)).enumerate();
    let turned = choices.filter(|(_, (a, b))| sorted(a) != sorted(b));
    turned.map(|(i, _)| i % tokens).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}
