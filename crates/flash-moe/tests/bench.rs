//! `bench` and `plan` on a tiny model, for their answers: nothing that was timed is compared.
//!
//! What must hold whatever the machine does: the sums of the stages, the counts of experts, the
//! shape of JSON, CSV and tables, and that a wrong answer is never timed.

use crate::fixture::converted;
use crate::program::{Home, text};
use serde_json::Value;

fn object(home: &Home, args: &[&str]) -> Value {
    let output = home.succeed(args);
    serde_json::from_slice(&output.stdout).expect("one JSON object on stdout")
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is not a number"))
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap_or_else(|| panic!("{value} is not a list"))
}

#[test]
fn a_bench_counts_what_it_says() {
    let home = converted();
    let (model, csv) = (text(&home.path("container")), text(&home.path("bench.csv")));
    let mut args = vec!["bench", "--model", &model, "--memory", "1GiB", "--quick", "--json"];
    args.extend_from_slice(&["--context-at", "16,64,80,100000", "--decode", "8"]);
    args.extend_from_slice(&["--prefill", "24", "--repeat", "2", "--csv", &csv]);
    let found = object(&home, &args);

    assert!(number(&found["check"]["difference"]) <= number(&found["check"]["bound"]));
    assert!(found["notes"].to_string().contains("100000"), "{}", found["notes"]);
    let disk = list(&found["limits"]["disk"]);
    let depths: Vec<u64> = disk.iter().map(|d| d["depth"].as_u64().unwrap()).collect();
    assert_eq!(depths, [1, 4, 8, 16]);
    let padded = found["model"]["record_bytes"].as_u64().unwrap().next_multiple_of(4096);
    for rate in disk {
        let records = rate["records"].as_u64().unwrap();
        assert!(records > 0 && rate["bytes"].as_u64().unwrap() == records * padded, "{rate}");
    }

    let runs = list(&found["runs"]);
    let kinds: Vec<String> =
        runs.iter().map(|r| format!("{} {} {}", r["phase"], r["pool"], r["position"])).collect();
    let once = [
        "prefill cold 0",
        "prefill warm 0",
        "prefill warm 0",
        "decode warm 16",
        "decode cold 24",
        "prefill warm 32",
        "decode warm 64",
        "decode cold 72",
        "decode warm 80",
        "decode cold 88",
    ];
    let twice: Vec<&str> = once.iter().chain(&once).copied().collect();
    assert_eq!(kinds.iter().map(|k| k.replace('"', "")).collect::<Vec<_>>(), twice);
    for run in runs {
        run_adds_up(run, &found["model"], padded);
        // One amount of bytes, held against two rates of the same memory.
        let best = number(&run["memory_fraction"])
            * number(&found["limits"]["memory"]["bytes_per_second"]);
        let beside =
            number(&run["memory_fraction_beside"]) * number(&run["memory_bytes_per_second_beside"]);
        assert!(beside > 0.0 && (best / beside - 1.0).abs() < 1e-9, "{run}");
        assert!(number(&run["limit_fraction"]) > 0.0, "{run}");
        assert!(number(&run["limit_fraction_beside"]) > 0.0, "{run}");
        let products = run["gemm_flops_per_second_beside"].as_f64().is_some_and(|rate| rate > 0.0);
        assert_eq!(products, run["phase"] == "prefill", "{run}");
    }
    csv_matches(&std::fs::read_to_string(&csv).expect("the CSV file"), runs);
}

fn run_adds_up(run: &Value, model: &Value, padded: u64) {
    let (seconds, tokens) = (number(&run["seconds"]), number(&run["tokens"]));
    let stages = list(&run["stages"]);
    let sum: f64 = stages.iter().map(|s| number(&s["seconds"])).sum();
    assert!((sum - seconds).abs() < 1e-9 * seconds.max(1.0), "{sum} of {seconds}");
    assert!((number(&run["tokens_per_second"]) * seconds / tokens - 1.0).abs() < 1e-9);
    assert!(stages.iter().all(|s| s["stage"] == "other" || number(&s["seconds"]) >= 0.0));

    let experts = &run["experts"];
    let (hits, misses) = (experts["hits"].as_u64().unwrap(), experts["misses"].as_u64().unwrap());
    assert_eq!(experts["read_bytes"].as_u64().unwrap(), misses * padded);
    assert_eq!(experts["demanded_bytes"], experts["read_bytes"]);
    assert_eq!(experts["lookahead"]["reads"], 0);
    assert!(run["pool"] == "warm" || misses > 0, "a cold run reads: {run}");
    if run["phase"] == "decode" {
        let each = model["layers"].as_u64().unwrap() * model["experts_per_token"].as_u64().unwrap();
        assert_eq!(hits + misses, each * run["tokens"].as_u64().unwrap());
        assert!(number(&run["step_ms_median"]) <= number(&run["step_ms_max"]));
    }
}

fn csv_matches(csv: &str, runs: &[Value]) {
    let lines: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
    let names = &lines[0];
    assert!(lines.iter().all(|line| line.len() == names.len()), "columns differ");
    let stages: usize = runs.iter().map(|r| list(&r["stages"]).len()).sum();
    assert_eq!(lines.len(), 1 + stages);
    let column = |name: &str| names.iter().position(|n| *n == name).expect("a column");
    let bytes = |line: &Vec<&str>| line[column("bytes")].parse::<u64>().expect("bytes");
    let listed: u64 = lines[1..].iter().map(bytes).sum();
    let found = runs.iter().flat_map(|r| list(&r["stages"]));
    assert_eq!(listed, found.map(|s| s["bytes"].as_u64().unwrap()).sum::<u64>());
}

#[test]
fn tables_are_at_most_100_columns_wide() {
    let home = converted();
    let model = text(&home.path("container"));
    let bench = ["bench", "--model", &model, "--quick", "--quiet", "--decode", "4"];
    let plan = ["plan", "--model", &model, "--quick"];
    for args in [&bench[..], &plan] {
        let output = home.succeed(args);
        let page = String::from_utf8(output.stdout).expect("text");
        let widest = page.lines().map(|l| l.chars().count()).max();
        assert!(widest.is_some_and(|w| w <= 100), "{widest:?} columns:\n{page}");
        assert!(page.contains("tok/s") && page.contains("machine"), "{page}");
    }
}

#[test]
fn guessed_bytes_are_told_apart_from_demanded_ones() {
    let home = converted();
    let model = text(&home.path("container"));
    let args = ["bench", "--model", &model, "--quick", "--lookahead", "previous", "--decode", "16"];
    let found = object(&home, &[&args[..], &["--json"]].concat());
    assert_eq!(found["model"]["lookahead"], "previous");
    let padded = found["model"]["record_bytes"].as_u64().unwrap().next_multiple_of(4096);
    let mut guesses = 0;
    for run in list(&found["runs"]) {
        let (experts, ahead) = (&run["experts"], &run["experts"]["lookahead"]);
        let count = |value: &Value| value.as_u64().expect("a count");
        assert_eq!(count(&experts["demanded_bytes"]), count(&experts["misses"]) * padded, "{run}");
        let guessed = count(&experts["read_bytes"]) - count(&experts["demanded_bytes"]);
        assert_eq!(count(&ahead["read_bytes"]), guessed, "{run}");
        assert_eq!(guessed, count(&ahead["reads"]) * padded, "{run}");
        guesses += count(&ahead["reads"]);
    }
    assert!(guesses > 0, "a cold pool has something to guess");
    let page = String::from_utf8(home.succeed(&args).stdout).expect("text");
    assert!(page.contains("lookahead previous") && page.contains("wasted MB/token"), "{page}");
    assert!(page.lines().all(|line| line.chars().count() <= 100), "{page}");
}

#[test]
fn a_wrong_answer_is_never_timed() {
    let home = converted();
    let dense = home.path("container").join("dense.safetensors");
    let mut bytes = std::fs::read(&dense).expect("the dense file");
    let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).expect("a header");
    let name = "lm_head.scales";
    let at = 8 + header + metadata.info(name).expect("scales of the head").data_offsets.0;
    // The upper byte of a bf16: a scale that is not a number.
    bytes[at..at + 2].copy_from_slice(&[0xc0, 0x7f]);
    std::fs::write(&dense, bytes).expect("the dense file");
    let csv = text(&home.path("bench.csv"));
    let args = ["bench", "--model", &text(&home.path("container")), "--quick", "--csv", &csv];
    let said = home.refuse(&args);
    assert!(said.contains("the logit of token 0 is NaN; run `flash-moe verify`"), "{said}");
    assert!(home.run(&args).stdout.is_empty(), "a number was printed");
    assert!(!std::path::Path::new(&csv).exists(), "a number was written");
}

#[test]
fn a_plan_adds_up_and_says_what_it_is() {
    let home = converted();
    let model = text(&home.path("container"));
    let plan = object(&home, &["plan", "--model", &model, "--quick", "--json", "--memory", "1GiB"]);
    assert_eq!(plan["estimate"], true);
    assert_eq!(plan["memory"]["fits"], true);
    let lines: f64 = list(&plan["memory"]["lines"]).iter().map(|l| number(&l["bytes"])).sum();
    let total = lines + number(&plan["memory"]["pool_bytes"]);
    assert!(total <= number(&plan["memory"]["limit_bytes"]));
    assert_eq!(plan["residency"], 1.0);
    for range in ["decode", "prefill", "hit_rate"] {
        let (low, high) = (&plan["expected"][range]["low"], &plan["expected"][range]["high"]);
        assert!(number(low) > 0.0 && number(low) <= number(high), "{range}: {low} to {high}");
    }
    let chunks: Vec<f64> = list(&plan["chunks"]).iter().map(|c| number(&c["chunk"])).collect();
    let context = number(&plan["context"]);
    assert!(!chunks.is_empty() && chunks.is_sorted() && chunks.iter().all(|c| *c <= context));
    let changes: Vec<&Value> = list(&plan["changes"]).iter().map(|c| &c["what"]).collect();
    assert_eq!(changes, ["memory", "disk", "threads"]);
}

#[test]
fn a_plan_without_a_container_tells_what_would_fit_and_leaves_nothing_behind() {
    let home = Home::new();
    let scratch = home.path("scratch");
    std::fs::create_dir(&scratch).expect("a directory");
    let disk = text(&scratch);
    let mut args = vec!["plan", "--like", "qwen3.5-397b-a17b", "--memory", "4GiB"];
    args.extend_from_slice(&["--quick", "--scratch", &disk]);
    let page = String::from_utf8(home.succeed(&args).stdout).expect("text");
    assert!(page.contains("does not fit") && page.contains("would run"), "{page}");
    args.push("--json");
    let plan = object(&home, &args);
    assert_eq!(plan["memory"]["fits"], false);
    let ways = list(&plan["ways_to_fit"]);
    assert_eq!(ways[0]["memory_bytes"], plan["memory"]["smallest_bytes"]);
    assert_eq!(plan["planned_limit_bytes"], plan["memory"]["smallest_bytes"]);
    assert!(number(&plan["expected"]["decode"]["low"]) > 0.0);
    assert!(number(&plan["disk_bytes"]) > 200e9, "397 billion weights at 4 bits and more");
    assert_eq!(std::fs::read_dir(&scratch).expect("a directory").count(), 0);
    let missing = text(&home.path("nowhere"));
    let said = home.refuse(&["plan", "--like", "qwen3.5-35b-a3b", "--scratch", &missing]);
    assert!(said.contains("--scratch"), "{said}");
}

#[test]
fn a_synthetic_context_is_reached_without_a_prompt_and_said_to_be_one() {
    let home = converted();
    let model = text(&home.path("container"));
    for format in ["f32", "tq2"] {
        let mut args = vec!["bench", "--model", &model, "--memory", "1GiB", "--quick", "--json"];
        args.extend_from_slice(&["--context-state", "synthetic", "--kv-cache", format]);
        args.extend_from_slice(&["--context-at", "64,700", "--decode", "4", "--prefill", "24"]);
        args.extend_from_slice(&["--context", "1024"]);
        let found = object(&home, &args);
        assert!(found["notes"].to_string().contains("SYNTHETIC"), "{}", found["notes"]);
        assert_eq!(found["notes"].to_string().contains("tq2"), format == "tq2");
        let decodes: Vec<u64> = list(&found["runs"])
            .iter()
            .filter(|run| run["phase"] == "decode")
            .map(|run| run["position"].as_u64().expect("a position"))
            .collect();
        assert_eq!(decodes, [64, 68, 700, 704]);
        assert_eq!(list(&found["runs"]).len(), 2 + 4);
    }
}
