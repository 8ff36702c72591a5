//! Switches that only move bytes in time leave the logits bit-identical.
//!
//! Cache size down to the floor, direct or buffered reads, number of readers and number of threads:
//! the traces of all of them are equal bit for bit. The size of a prefill chunk changes sums' order,
//! so there only a bound holds, and it is stated here.

use crate::program::{Home, TraceFile, id_list, text};

/// Largest difference of a logit between prefill chunk sizes on the tiny models.
const CHUNK_BOUND: f32 = 1e-4;

fn converted() -> Home {
    let home = Home::new();
    let source = home.path("source");
    crate::fixture::write_checkpoint("q35-r4", &source);
    home.succeed(&["convert", "--bits", "4", &text(&source), &text(&home.path("container"))]);
    home
}

fn logits(home: &Home, extra: &[&str]) -> (u64, Vec<f32>) {
    let ids: Vec<u32> = (0..90).map(|i| i * 37 % 470).collect();
    let prompt = home.write("prompt.ids", id_list(&ids));
    let (model, trace) = (text(&home.path("container")), home.path("t.safetensors"));
    let trace_path = text(&trace);
    let mut args = vec!["--model", &model, "--prompt-tokens", &prompt, "--greedy", "--ignore-eos"];
    args.extend_from_slice(&["--max-tokens", "12", "--context", "256", "--trace", &trace_path]);
    args.extend_from_slice(extra);
    let summary = home.json(&args);
    let misses = summary["counters"]["misses"].as_u64().expect("misses");
    let trace = TraceFile::open(&trace);
    let mut all = trace.floats("prefill.logits").1;
    all.extend(trace.floats("decode.logits").1);
    (misses, all)
}

#[test]
fn cache_size_reader_and_threads_change_no_bit() {
    let home = converted();
    let (few_misses, reference) = logits(&home, &["--memory", "2GiB"]);
    let floor = home.refuse(&[
        "run",
        "--model",
        &text(&home.path("container")),
        "--context",
        "256",
        "--memory",
        "1MiB",
        "x",
    ]);
    let least =
        floor.split("--memory ").nth(1).and_then(|rest| rest.split([' ', ')', '\n']).next());
    let least = least.expect("the refusal names the smallest limit");
    let (many_misses, at_floor) = logits(&home, &["--memory", least]);
    assert!(many_misses > 2 * few_misses, "{many_misses} misses at the floor, {few_misses} above");
    assert_eq!(bits(&at_floor), bits(&reference), "pool at the floor");
    for extra in [
        ["--io", "buffered"],
        ["--io", "auto"],
        ["--readers", "1"],
        ["--readers", "9"],
        ["--threads", "1"],
        ["--threads", "3"],
    ] {
        let mut args = vec!["--memory", least];
        args.extend_from_slice(&extra);
        assert_eq!(bits(&logits(&home, &args).1), bits(&reference), "{extra:?}");
    }
}

#[test]
fn prefill_chunks_change_logits_within_the_bound() {
    let home = converted();
    let (_, reference) = logits(&home, &[]);
    for chunk in ["1", "7", "33", "64", "1000"] {
        let (_, other) = logits(&home, &["--prefill-chunk", chunk]);
        let worst = reference.iter().zip(&other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= CHUNK_BOUND, "chunk {chunk}: {worst}");
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}
